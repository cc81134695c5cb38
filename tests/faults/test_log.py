"""A short fault run over Kafka, and the account itself: it has to see what it is there to see."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.account import Account, settle
from tests.faults.log import Size, balances, run
from tests.faults.traffic import Told, Vote
from tests.kafka import needs_release

pytestmark = pytest.mark.slow


@pytest.mark.kafka
def test_nothing_acknowledged_is_lost_doubled_or_disordered_by_kills_and_a_pause(tmp_path: Path) -> None:
    needs_release()
    found = run(Size(responses=500, votes=250, kills=4, pause_s=6.0, seed=3), tmp_path)
    assert balances(found), found
    assert set(found["killed"]) == {"broker", "gateway", "forwarder", "consumer"}
    assert found["responses"] >= 500
    assert found["votes"] >= 250
    assert found["most_waiting"] > 0, "the pause held nothing up"


RESPONSES = [{"id": "e1", "response_id": "r1"}, {"id": "e2", "response_id": "r2"}]


def vote(id: str, number: int) -> dict[str, Any]:
    return {"id": id, "response_id": "r1", "user": f"u{number}", "metadata": {"number": number}}


TOLD = Told(["r1", "r2"], [Vote("v0", "r1", "u0", 0), Vote("v1", "r1", "u1", 1)])
ON_LOG = [(0, vote("v0", 0)), (0, vote("v1", 1))]
COUNTED = [("v0", "r1"), ("v1", "r1")]


def account(
    responses: list[dict[str, Any]] = RESPONSES,
    votes: list[tuple[int, dict[str, Any]]] = ON_LOG,
    counted_responses: Counter[str] | None = None,
    counted: list[tuple[str, str]] = COUNTED,
) -> Account:
    return settle(TOLD, responses, votes, counted_responses or Counter(("r1", "r2")), counted)


def test_a_run_that_went_well_balances() -> None:
    found = account()
    assert (found.acknowledged, found.lost, found.twice, found.disordered, found.copies) == (4, 0, 0, 0, 0)


def test_an_event_that_is_on_the_log_and_was_not_counted_is_lost_and_the_other_way_round() -> None:
    assert account(responses=RESPONSES[:1]).lost == 1
    assert account(counted_responses=Counter(["r1"])).lost == 1
    assert account(votes=ON_LOG[:1]).lost == 1
    assert account(counted=COUNTED[:1]).lost == 1


def test_a_copy_on_the_log_is_no_harm_but_counting_it_is() -> None:
    found = account(votes=[*ON_LOG, ON_LOG[0]])
    assert (found.copies, found.twice, found.disordered) == (1, 0, 0)
    assert account(counted=[*COUNTED, COUNTED[0]]).twice == 1
    assert account(votes=[*ON_LOG, (0, {**vote("v9", 0)})]).twice == 1, "one vote that got two ids"


def test_an_event_before_an_earlier_one_of_its_key_is_disorder_wherever_it_shows() -> None:
    assert account(votes=ON_LOG[::-1]).disordered == 1
    assert account(counted=COUNTED[::-1]).disordered == 1
