"""The whole loop on a tiny model: what is learned, when, from where, and what is left alone."""

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from learner.examples import spent
from learner.loop import Learner
from learner.policy import Policy
from serve.proof import MIN_TOKENS
from tests.learner.traffic import append, fill
from thumbwheel.errors import AdapterError, LogError
from thumbwheel.events import (
    BASE,
    FEEDBACK,
    AdapterPromoted,
    AdapterRolledBack,
    CandidateApproved,
    CandidateRejected,
    EvaluationReported,
)
from thumbwheel.log import Log, SqliteLog
from thumbwheel.rollout import Rollout
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.slow

Start = Callable[..., Learner]


@pytest.fixture
def log(settings: Settings) -> Iterator[SqliteLog]:
    log = SqliteLog(settings.path(settings.log.path))
    yield log
    log.close()


@pytest.fixture
def store(settings: Settings) -> AdapterStore:
    return AdapterStore(settings.path(settings.store.path))


@pytest.fixture
def start(settings: Settings, log: SqliteLog) -> Iterator[Start]:
    """Start a learner, again as often as one likes; changes go to [learner]."""
    started: list[Learner] = []

    def start(**changes: Any) -> Learner:
        for learner in started:
            learner.close()
        changed = settings.model_copy(update={"learner": settings.learner.model_copy(update=changes)})
        started.append(Learner(changed, log, Policy.load(changed), threading.Event()))
        return started[-1]

    yield start
    for learner in started:
        learner.close()


def settle(learner: Learner) -> Rollout:
    """Step until there is nothing to do."""
    for _ in range(100):
        if not learner.step():
            return learner._rollout.state
    raise AssertionError("there is no end to it")


def decide(log: Log, store: AdapterStore, version: str, promote: bool) -> None:
    digest = store.open(version).digest
    common = {"source": "test", "version": version, "digest": digest}
    if not promote:
        append(log, CandidateRejected(**common, actor="op", reason="no"))
        return
    append(log, EvaluationReported(**common, verdict="pass", checks=[]))
    append(log, CandidateApproved(**common, actor="op", reason="yes"))
    append(log, AdapterPromoted(**common, previous=BASE, actor="op"))


def test_enough_votes_become_one_candidate_and_no_more(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 120)
    state = settle(start())
    assert [candidate.version for candidate in state.open()] == ["v1"]
    manifest = store.verify("v1").manifest
    learned = manifest.learned_from
    assert len(learned.feedback_ids) == len(set(learned.feedback_ids)) == 8  # two updates of four
    assert learned.ups > 0
    assert learned.ups + learned.downs == 8
    assert manifest.kl.upper <= manifest.kl.budget
    assert sum(len(probe.completion_token_ids) for probe in manifest.probes) >= MIN_TOKENS
    assert log.committed("learner", FEEDBACK) == 120


def test_while_a_candidate_is_open_votes_are_collected_and_not_learned(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    learner = start()
    settle(learner)
    fill(log, 30, start=120)
    append(
        log,
        EvaluationReported(source="t", version="v1", digest=store.open("v1").digest, verdict="fail", checks=[]),
    )
    state = settle(learner)
    assert state.candidates["v1"].status == "evaluated"  # a failed report leaves it open until somebody rejects it
    assert store.versions() == ["v1"]
    assert log.committed("learner", FEEDBACK) == 150


def test_after_a_promotion_training_goes_on_from_the_champion(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    learner = start()
    settle(learner)
    decide(log, store, "v1", promote=True)
    settle(learner)
    first, second = (store.verify(version).manifest for version in ("v1", "v2"))
    assert second.parent == "v1"
    assert not set(first.learned_from.feedback_ids) & set(second.learned_from.feedback_ids)


def test_after_a_rejection_the_weights_are_the_champions_again(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    learner = start()
    settle(learner)
    decide(log, store, "v1", promote=False)
    settle(learner)
    second = store.verify("v2").manifest
    assert second.parent == BASE
    assert not set(store.open("v1").manifest.learned_from.feedback_ids) & set(second.learned_from.feedback_ids)


def test_weights_whose_parent_was_rolled_back_are_thrown_away_and_their_votes_learned_again(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    learner = start()
    settle(learner)
    decide(log, store, "v1", promote=True)
    learner.poll()
    examples = learner.join()
    learner.update(examples)  # one of two, from v1
    append(
        log,
        AdapterRolledBack(source="t", version=BASE, digest="", rolled_back="v1", actor="op", reason="worse"),
    )
    settle(start())
    second = store.verify("v2").manifest
    assert second.parent == BASE
    assert set(spent(examples)) <= set(second.learned_from.feedback_ids)


def test_one_class_of_votes_alone_teaches_nothing(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 120, ups=1000, start=1)
    learner = start()
    settle(learner)
    assert store.versions() == []
    assert "one class" in learner._waits_for
    fill(log, 60, start=121, ups=1)
    settle(learner)
    assert store.versions() == ["v1"]


def test_without_held_out_prompts_nothing_is_trained(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 12)
    learner = start()
    settle(learner)
    assert "held-out prompts" in learner._waits_for
    assert store.versions() == []


def test_an_unsettled_vote_is_not_learned(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 120)
    settle(start(settle_s=1e10))
    assert store.versions() == []


def test_a_budget_that_is_too_small_scales_the_candidate_back(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    settle(start(learning_rate=0.3, kl_budget=0.05))
    bound = store.verify("v1").manifest.kl
    assert bound.upper <= 0.05
    assert bound.scale < 1


def test_an_infinite_budget_holds_nothing_back(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 120)
    settle(start(learning_rate=0.3, kl_budget=math.inf))
    bound = store.verify("v1").manifest.kl
    assert bound.upper > 1
    assert bound.scale == 1


def test_an_update_that_cannot_be_held_is_dropped_and_its_votes_are_spent(
    start: Start, log: SqliteLog, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, 120)
    monkeypatch.setattr("learner.kl.hold", lambda budget, measured, at: None)
    learner = start(learning_rate=0.3)
    for _ in range(2):
        learner.step()
    assert store.versions() == []
    assert learner._checkpoints.load() is None
    assert learner._buffer.counts()["learned"] == 8
    (reason,) = learner._buffer._db.execute("SELECT DISTINCT reason FROM votes WHERE state = 'learned'")
    assert reason == ("dropped: outside of the KL budget",)
    assert spent(learner.join())[0] not in {"f0", "f3"}


def test_a_restart_goes_on_after_the_last_update(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 120)
    learner = start()
    learner.poll()
    first = learner.join()
    learner.update(first)
    weights = learner._policy.weights()
    again = start()
    assert all((again._policy.weights()[name] == value).all() for name, value in weights.items())
    settle(again)
    ids = store.verify("v1").manifest.learned_from.feedback_ids
    assert ids[:4] == spent(first)
    assert len(set(ids)) == 8


def test_a_log_that_fails_at_the_submission_gets_the_same_candidate_later(
    start: Start, log: SqliteLog, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, 120)
    learner = start()

    def fails(*_: object) -> None:
        raise LogError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(log, "append", fails)
        with pytest.raises(LogError):
            settle(learner)
    written = store.verify("v1")
    state = settle(start())
    assert store.versions() == ["v1"]
    assert state.candidates["v1"].digest == written.digest


def test_a_lost_buffer_does_not_learn_again_what_versions_have_learned(
    start: Start, log: SqliteLog, store: AdapterStore, settings: Settings
) -> None:
    fill(log, 120)
    learner = start()
    settle(learner)
    learner.close()
    for file in (settings.data / "learner").glob("buffer.sqlite*"):
        file.unlink()
    decide(log, store, "v1", promote=False)
    settle(start())
    both = [id for version in ("v1", "v2") for id in store.verify(version).manifest.learned_from.feedback_ids]
    assert len(both) == len(set(both))


def test_a_checkpoint_of_another_shape_is_thrown_away_and_its_votes_are_not_lost(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    learner = start()
    learner.poll()
    examples = learner.join()
    learner.update(examples)
    settle(start(rank=1))
    assert set(spent(examples)) <= set(store.verify("v1").manifest.learned_from.feedback_ids)


def test_a_champion_that_was_altered_is_not_trained_on(start: Start, log: SqliteLog, store: AdapterStore) -> None:
    fill(log, 120)
    learner = start()
    settle(learner)
    decide(log, store, "v1", promote=True)
    weights = store.open("v1").path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterError, match="fails its digest"):
        settle(learner)


def test_told_to_stop_it_ends_in_the_middle_of_an_update_and_loses_nothing(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)
    learner = start()
    learner._stop.set()
    assert learner.step() is False
    assert learner._checkpoints.load() is None
    settle(start())
    assert store.versions() == ["v1"]
