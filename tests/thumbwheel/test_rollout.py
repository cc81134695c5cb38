from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel.events import (
    BASE,
    AdapterPromoted,
    AdapterRolledBack,
    AnyEvent,
    CandidateApproved,
    CandidateRejected,
    CandidateSubmitted,
    EvaluationReported,
    ReplicaReported,
    Verdict,
)
from thumbwheel.rollout import Rollout, fold


def submitted(version: str = "v1", digest: str = "d1", parent: str = BASE, time: float = 1.0) -> CandidateSubmitted:
    return CandidateSubmitted(
        source="learner", version=version, digest=digest, parent=parent, algorithm="kto",
        learned_from=8, kl_upper=1.0, time=time
    )  # fmt: skip


def reported(verdict: Verdict, version: str = "v1", digest: str = "d1") -> EvaluationReported:
    return EvaluationReported(source="guardrails", version=version, digest=digest, verdict=verdict, checks=[])


def approved(version: str = "v1", digest: str = "d1", forced: bool = False) -> CandidateApproved:
    return CandidateApproved(source="o", version=version, digest=digest, actor="ann", reason="good", forced=forced)


def rejected(version: str = "v1", digest: str = "d1") -> CandidateRejected:
    return CandidateRejected(source="o", version=version, digest=digest, actor="ann", reason="bad")


def promoted(version: str = "v1", digest: str = "d1") -> AdapterPromoted:
    return AdapterPromoted(source="controller", version=version, digest=digest, previous=BASE, actor="controller")


def back(version: str, digest: str, rolled_back: str) -> AdapterRolledBack:
    return AdapterRolledBack(
        source="o", version=version, digest=digest, rolled_back=rolled_back, actor="ann", reason="worse"
    )


def life(version: str, digest: str, time: float = 1.0) -> list[AnyEvent]:
    return [
        submitted(version, digest, time=time),
        reported("pass", version, digest),
        approved(version, digest),
        promoted(version, digest),
    ]


def test_a_candidate_walks_from_submitted_to_champion() -> None:
    seen = []
    state = Rollout()
    for event in life("v1", "d1"):
        state = fold([event], state)
        seen.append(state.candidates["v1"].status)
    assert seen == ["submitted", "pending_approval", "approved", "promoted"]
    assert (state.champion, state.previous) == ("v1", BASE)
    assert len(state.candidates["v1"].history) == 4
    assert state.ignored == ()


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_no_approval_goes_past_a_gate_unless_it_is_forced(verdict: Verdict) -> None:
    state = fold([submitted(), reported(verdict), approved()])
    assert state.candidates["v1"].status == "evaluated"
    assert len(state.ignored) == 1
    assert fold([approved(forced=True)], state).candidates["v1"].status == "approved"


def test_a_promotion_that_nobody_approved_changes_nothing() -> None:
    state = fold([submitted(), reported("pass"), promoted()])
    assert state.champion == BASE
    assert "v1 is pending_approval" in state.ignored[0][1]


@pytest.mark.parametrize("event", [reported("pass", digest="d2"), approved(digest="d2"), promoted(digest="d2")])
def test_a_decision_about_another_digest_changes_nothing(event: AnyEvent) -> None:
    state = fold([submitted(), reported("pass")])
    after = fold([event], state)
    assert replace(after, ignored=()) == replace(state, ignored=())
    assert after.ignored


def test_a_name_is_never_used_twice() -> None:
    state = fold([submitted(), submitted(digest="d2")])
    assert state.candidates["v1"].digest == "d1"
    assert state.ignored


def test_rollback_puts_the_previous_champion_back_and_marks_the_one_that_left() -> None:
    state = fold([*life("v1", "d1"), *life("v2", "d2", 2.0), back("v1", "d1", "v2")])
    assert (state.champion, state.previous) == ("v1", None)
    assert state.candidates["v2"].status == "rolled_back"
    assert fold([back(BASE, BASE, "v1")], state).champion == BASE


@pytest.mark.parametrize(
    "event", [back("v9", "d9", "v1"), back("v1", "d1", "v1"), back(BASE, BASE, "v7"), back("v2", "d2", "v1")]
)
def test_a_rollback_to_what_was_never_champion_changes_nothing(event: AnyEvent) -> None:
    state = fold([*life("v1", "d1"), submitted("v2", "d2"), event])
    assert state.champion == "v1"
    assert state.ignored


def test_a_rejected_candidate_stays_rejected() -> None:
    state = fold([submitted(), reported("pass"), rejected(), approved(forced=True), promoted()])
    assert state.candidates["v1"].status == "rejected"
    assert state.champion == BASE


def test_engines_hold_the_champion_then_what_waits_then_the_previous() -> None:
    state = fold(
        [*life("v1", "d1"), *life("v2", "d2", 2.0), submitted("v3", "d3", time=3.0), submitted("v4", "d4", time=4.0)]
    )
    assert state.wanted(9) == ["v2", "v4", "v3", "v1"]
    assert state.wanted(2) == ["v2", "v4"]
    assert Rollout().wanted(3) == []


def test_a_replica_is_live_until_it_falls_silent_or_leaves() -> None:
    here = ReplicaReported(source="g", replica="r1", serving=BASE, time=100.0)
    gone = ReplicaReported(source="g", replica="r2", serving=BASE, time=100.0, leaving=True)
    state = fold([here, gone])
    assert [seen.replica for seen in state.live(110.0, 60.0)] == ["r1"]
    assert state.live(161.0, 60.0) == []


EVENTS = st.sampled_from(
    [*life("v1", "d1"), *life("v2", "d2"), rejected(), rejected("v2", "d2"), reported("fail"),
     reported("inconclusive", "v2", "d2"),
     back("v1", "d1", "v2"), back(BASE, BASE, "v1"), back("v2", "d2", "v1")]
)  # fmt: skip


@given(st.lists(EVENTS, max_size=14), st.integers(0, 14))
def test_whatever_comes_the_champion_was_approved_and_a_fold_can_be_resumed(events: list[AnyEvent], cut: int) -> None:
    state = fold(events)
    if state.champion != BASE:
        champion = state.candidates[state.champion]
        assert champion.approval is not None
        assert champion.status == "promoted"
    assert fold(events[cut:], fold(events[:cut])) == state
