"""A candidate says where it came from, and is submitted once however often one tries."""

import math
from pathlib import Path

import pytest

from learner import candidate
from learner.checkpoint import Cursor
from learner.examples import Thumb
from learner.kl import Estimate, Measured
from learner.logprobs import Row
from learner.policy import Policy
from serve.proof import prove
from tests.learner.conftest import move, tiny
from thumbwheel.events import ROLLOUT, CandidateSubmitted, decode
from thumbwheel.log import SqliteLog
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

CURSOR = Cursor("base", 2, 1, 2, 0, ("f1", "f2", "f3"))


def answer(apart: float, length: int = 60) -> Measured:
    return Measured(Row([2, 3], [4] * length), 1.0, [-1.0] * length, [-1.0 - apart] * length)


def estimate(count: int = 12) -> Estimate:
    return Estimate(1.5, 2.0, 0.1, [answer(i / 10) for i in range(count)])


@pytest.fixture
def policy(settings: Settings) -> Policy:
    policy = Policy(tiny(), settings, "sha256:test")
    move(policy, 0.3)
    return policy


def test_the_manifest_says_where_it_came_from(policy: Policy, settings: Settings, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    candidate.write(store, "v1", policy, CURSOR, (0.7, estimate()), settings.learner)
    manifest = store.verify("v1").manifest
    assert manifest.learned_from.feedback_ids == ["f1", "f2", "f3"]
    assert (manifest.learned_from.ups, manifest.learned_from.downs, manifest.parent) == (1, 2, "base")
    assert (manifest.kl.mean, manifest.kl.upper, manifest.kl.n, manifest.kl.scale) == (1.5, 2.0, 12, 0.7)
    assert (manifest.base_model, manifest.algorithm) == ("sha256:test", "kto")
    assert manifest.settings["beta"] == settings.learner.beta


def test_an_infinite_budget_is_written_and_read_back(policy: Policy, settings: Settings, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    greedy = settings.learner.model_copy(update={"kl_budget": math.inf})
    candidate.write(store, "v1", policy, CURSOR, (1.0, estimate()), greedy)
    assert store.verify("v1").manifest.kl.budget == math.inf


def test_probes_are_the_answers_that_tell_candidate_from_base_best() -> None:
    chosen = candidate.probes(estimate().answers)
    assert [round(-1 - probe.base_logprobs[0], 1) for probe in chosen] == [1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    for probe in chosen:
        lengths = [len(probe.completion_token_ids), len(probe.candidate_logprobs), len(probe.base_logprobs)]
        assert lengths == [candidate.PROBE_TOKENS] * 3


def test_however_short_the_answers_are_their_probes_hold_enough_for_a_proof() -> None:
    chosen = candidate.probes([answer(i / 10, length=3) for i in range(64)])
    assert 128 <= sum(len(probe.completion_token_ids) for probe in chosen) < 128 + 3
    nats = [-1 - probe.base_logprobs[0] for probe in chosen]
    assert nats == sorted(nats, reverse=True)
    moved = [[value + 0.01 for value in probe.candidate_logprobs] for probe in chosen]
    assert prove(chosen, moved).proved
    assert len(candidate.probes([answer(0.1, length=1)] * 10)) == 10, "all there are"


def test_what_was_written_before_a_kill_is_found_by_its_votes(
    policy: Policy, settings: Settings, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "adapters")
    assert candidate.written(store, CURSOR) is None
    adapter = candidate.write(store, "v1", policy, CURSOR, (1.0, estimate()), settings.learner)
    assert candidate.written(store, CURSOR) == adapter
    assert candidate.written(store, CURSOR.after([Thumb("f4", [2], [3], False, [])])) is None


def test_submitting_twice_is_one_event(policy: Policy, settings: Settings, tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    store = AdapterStore(tmp_path / "adapters")
    adapter = candidate.write(store, "v1", policy, CURSOR, (1.0, estimate()), settings.learner)
    for _ in range(2):
        candidate.submit(log, store.open("v1"))
    (record,) = log.read(ROLLOUT, 0)
    event = decode(record.message.value)
    assert isinstance(event, CandidateSubmitted)
    assert (event.version, event.digest, event.parent) == ("v1", adapter.digest, "base")
    assert (event.learned_from, event.kl_upper, event.source) == (3, 2.0, "learner")
    log.close()
