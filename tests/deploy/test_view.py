import json

import pytest
from click import unstyle

from deploy.view import as_json, detail, detail_json, table
from tests.deploy.lives import champion, digest, replica, reported, submitted
from thumbwheel.errors import RolloutError
from thumbwheel.events import BASE, CandidateApproved
from thumbwheel.manifest import KLBound, LearnedFrom, Manifest
from thumbwheel.rollout import Rollout, fold

STATE = fold(
    [
        *champion("v1"),
        submitted("v2", "v1"),
        reported("v2", kl="fail", sense="pass"),
        replica("r1", "v1", "v2", serving="v1"),
        replica("r2", "v1", serving="v1", time=20.0),
    ]
)


def line(rendered: str, start: str) -> str:
    (found,) = [row for row in rendered.splitlines() if row.strip().startswith(start)]
    return found


def test_the_table_shows_each_version_with_its_state_its_gates_and_who_proved_it() -> None:
    shown = unstyle(table(STATE, 110.0, 60.0))
    assert line(shown, "v2").split()[:6] == ["v2", "evaluated", "v1", "fail", "16", "1.25"]
    assert "1/1" in line(shown, "v2")
    assert line(shown, "v1").split()[:3] == ["v1", "champion", "promoted"]
    assert line(shown, "base").split()[:2] == ["base", "previous"]
    assert "10 s ago" in line(shown, "r1")
    assert "90 s ago, silent" in line(shown, "r2")


def test_an_empty_rollout_shows_that_base_serves() -> None:
    assert "base champion" in unstyle(table(Rollout(), 0.0, 60.0))


def test_the_detail_shows_every_gate_and_every_decision() -> None:
    state = fold(
        [
            CandidateApproved(
                source="o",
                version="v2",
                digest=digest("v2"),
                actor="ann",
                reason="[bold]dire[/bold] need\x1b[2J",
                forced=True,
            )
        ],
        STATE,
    )
    shown = unstyle(detail(state, "v2"))
    assert digest("v2") in shown
    assert "kl is fail" in line(shown, "kl")
    assert "FORCED past the gates: [bold]dire[/bold] need·[2J" in shown


MANIFEST = Manifest(
    version="v2",
    parent="v1",
    base_model="sha256:base",
    created=1.0,
    algorithm="kto",
    learned_from=LearnedFrom(ups=10, downs=6, feedback_ids=["f1"]),
    kl=KLBound(mean=1.0, upper=1.25, per_token=0.02, n=64, budget=1.3, scale=0.5),
    probes=[],
)


def test_the_manifest_adds_what_it_learned_from_and_how_far_it_moved() -> None:
    shown = unstyle(detail(STATE, "v2", MANIFEST))
    assert "kto, 16 votes: 10 up, 6 down" in shown
    assert "1, at most 1.25 nats per sequence (n=64, 0.02 per token); budget 1.3; scaled back to 0.5" in shown
    assert detail_json(STATE, "v2", MANIFEST)["manifest"]["kl"]["scale"] == 0.5


def test_a_version_without_a_report_says_so() -> None:
    assert "not evaluated yet" in unstyle(detail(fold([submitted("v1")]), "v1"))


def test_json_holds_the_whole_rollout_and_survives_a_round_trip() -> None:
    whole = json.loads(json.dumps(as_json(STATE, 110.0, 60.0)))
    assert (whole["champion"], whole["previous"]) == ("v1", BASE)
    assert [version["version"] for version in whole["versions"]] == ["v1", "v2"]
    assert [(one["replica"], one["live"]) for one in whole["replicas"]] == [("r1", True), ("r2", False)]
    assert detail_json(STATE, "v2") == whole["versions"][1] | {"manifest": None}
    assert [check["verdict"] for check in whole["versions"][1]["report"]["checks"]] == ["fail", "pass"]


def test_an_unknown_version_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(RolloutError, match="known are: v1, v2"):
        detail(STATE, "v9")
    with pytest.raises(RolloutError, match="known are: v1, v2"):
        detail_json(STATE, "v9")
