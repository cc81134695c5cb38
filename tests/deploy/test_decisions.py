from collections.abc import Callable

import pytest

from deploy.decisions import approve, confirm, earlier_champions, reject, roll_back
from tests.deploy.lives import approved, champion, digest, promoted, rejected, replica, reported, rolled_back, submitted
from thumbwheel.errors import RolloutError
from thumbwheel.events import BASE, AnyEvent, Event
from thumbwheel.rollout import Rollout, fold

WAITING: list[AnyEvent] = [submitted("v1"), reported("v1", kl="pass")]


def test_an_approval_names_version_digest_actor_and_reason_and_the_fold_takes_it() -> None:
    state = fold(WAITING)
    event = approve(state, "v1", actor=" ann ", reason="read twenty answers", digest=digest("v1"))
    assert (event.version, event.digest, event.actor, event.reason, event.forced) == (
        "v1",
        "sha256:v1",
        "ann",
        "read twenty answers",
        False,
    )
    after = fold([event], state)
    assert after.candidates["v1"].status == "approved"
    confirm(after, event)


def test_gates_that_passed_are_never_said_to_be_forced() -> None:
    assert not approve(fold(WAITING), "v1", actor="ann", reason="sure", force=True).forced


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([submitted("v1")], "not evaluated yet"),
        (
            [submitted("v1"), reported("v1", kl="fail", sense="pass", refusals="inconclusive")],
            r"failed: kl \(kl is fail\); inconclusive: refusals \(refusals is inconclusive\)",
        ),
        ([submitted("v1"), reported("v1", length="inconclusive")], r"\(inconclusive: length"),
    ],
)
def test_a_gate_in_the_way_is_named_and_force_goes_past_it_and_says_so(events: list[AnyEvent], words: str) -> None:
    state = fold(events)
    with pytest.raises(RolloutError, match=words):
        approve(state, "v1", actor="ann", reason="sure")
    forced = approve(state, "v1", actor="ann", reason="sure", force=True)
    assert forced.forced
    assert fold([forced], state).candidates["v1"].status == "approved"


@pytest.mark.parametrize("verb", [approve, reject])
@pytest.mark.parametrize(
    ("events", "version", "given", "words"),
    [
        (WAITING, "v7", None, "no version v7 was ever submitted; these wait for a decision: v1"),
        (WAITING, BASE, None, "not a candidate"),
        (WAITING, "v1", "sha256:other", "has the digest sha256:v1, not sha256:other"),
        (champion("v1"), "v1", None, "decided already: it is promoted"),
        ([*WAITING, rejected("v1")], "v1", None, "decided already: it is rejected"),
        ([*champion("v1"), rolled_back("v1", BASE)], "v1", None, "decided already: it is rolled_back"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused_in_words(
    verb: Callable[..., Event], events: list[AnyEvent], version: str, given: str | None, words: str
) -> None:
    with pytest.raises(RolloutError, match=words):
        verb(fold(events), version, actor="ann", reason="sure", digest=given)


def test_nothing_is_approved_twice_by_force_or_not() -> None:
    state = fold([*WAITING, approved("v1")])
    for force in (False, True):
        with pytest.raises(RolloutError, match="approved already, by ann"):
            approve(state, "v1", actor="bob", reason="me too", force=force)


def test_what_was_approved_can_still_be_rejected_before_it_is_promoted() -> None:
    state = fold([*WAITING, approved("v1")])
    event = reject(state, "v1", actor="bob", reason="changed my mind")
    assert fold([event, promoted("v1")], state).champion == BASE


@pytest.mark.parametrize(("actor", "reason"), [("", "sure"), ("ann", ""), ("  ", "sure"), ("ann", "\n")])
def test_every_decision_takes_a_name_and_a_reason(actor: str, reason: str) -> None:
    with pytest.raises(RolloutError, match="takes a name and a reason"):
        approve(fold(WAITING), "v1", actor=actor, reason=reason)
    with pytest.raises(RolloutError, match="takes a name and a reason"):
        reject(fold(WAITING), "v1", actor=actor, reason=reason)
    with pytest.raises(RolloutError, match="takes a name and a reason"):
        roll_back(fold(champion("v1")), actor=actor, reason=reason)


THREE: list[AnyEvent] = [*champion("v1"), *champion("v2", "v1"), *champion("v3", "v2")]


@pytest.mark.parametrize(
    ("to", "target", "target_digest"), [(None, "v2", "sha256:v2"), ("v1", "v1", "sha256:v1"), (BASE, BASE, BASE)]
)
def test_a_rollback_goes_to_the_previous_an_earlier_champion_or_base(
    to: str | None, target: str, target_digest: str
) -> None:
    state = fold(THREE)
    event = roll_back(state, version=to, actor="ann", reason="rude")
    assert (event.version, event.digest, event.rolled_back) == (target, target_digest, "v3")
    after = fold([event], state)
    assert after.champion == target
    assert after.candidates["v3"].status == "rolled_back"
    assert after.ignored == ()


def test_a_target_that_no_engine_holds_becomes_the_first_that_every_engine_wants() -> None:
    state = fold([*THREE, submitted("v4", "v3", 9.0), replica("r1", "v3", "v2", serving="v3")])
    assert "v1" not in state.wanted(3)
    after = fold([roll_back(state, version="v1", actor="ann", reason="rude")], state)
    assert after.wanted(1) == ["v1"]


def test_a_former_champion_can_come_back_after_a_rollback_to_base() -> None:
    state = fold([*champion("v1"), *champion("v2", "v1"), rolled_back("v2", BASE)])
    assert earlier_champions(state) == ["v1"]
    after = fold([roll_back(state, version="v1", actor="ann", reason="base is worse")], state)
    assert (after.champion, after.ignored) == ("v1", ())


@pytest.mark.parametrize(
    ("events", "to", "given", "words"),
    [
        ([], None, None, "nothing is known to come before the champion base"),
        ([*champion("v1"), *champion("v2"), rolled_back("v2", "v1")], None, None, r"go back to \(base\)"),
        ([*champion("v1"), *champion("v2"), rolled_back("v2", "v1")], "v2", None, "it is rolled_back"),
        (champion("v1"), "v1", None, "v1 is the champion already"),
        (champion("v1"), "v9", None, "no such version was ever submitted.*come back: base"),
        ([*champion("v1"), submitted("v2")], "v2", None, "it is submitted"),
        (THREE, "v1", "sha256:v2", "has the digest sha256:v1, not sha256:v2"),
        (THREE, BASE, "sha256:v2", "base has the digest base, not sha256:v2"),
    ],
)
def test_a_rollback_that_does_not_fit_is_refused_in_words(
    events: list[AnyEvent], to: str | None, given: str | None, words: str
) -> None:
    with pytest.raises(RolloutError, match=words):
        roll_back(fold(events), version=to, digest=given, actor="ann", reason="rude")


def test_a_decision_that_came_too_late_is_told_so() -> None:
    state = fold(WAITING)
    late = approve(state, "v1", actor="ann", reason="sure")
    with pytest.raises(RolloutError, match=r"too late.*v1 is rejected"):
        confirm(fold([rejected("v1"), late], state), late)


def test_nobody_can_roll_back_twice_by_accident() -> None:
    state = fold(THREE)
    twice = [roll_back(state, actor=actor, reason="rude") for actor in ("ann", "bob")]
    after = fold(twice, state)
    assert after.champion == "v2"
    with pytest.raises(RolloutError, match="the champion is v2, not v3"):
        confirm(after, twice[1])


def test_an_empty_rollout_offers_nothing_to_decide() -> None:
    with pytest.raises(RolloutError, match="wait for a decision: none"):
        approve(Rollout(), "v1", actor="ann", reason="sure")
