"""The whole loop by the algorithms that need more than thumbs: pairs, a reward model, fresh answers."""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from learner.algorithm import Algorithm
from learner.compute import Compute
from learner.logprobs import Row
from learner.loop import Learner
from learner.policy import Policy
from learner.reward_store import versions
from tests.learner.conftest import respond, vote
from tests.learner.making import change
from tests.learner.traffic import append, fill
from thumbwheel.events import Choice
from thumbwheel.log import Log, SqliteLog
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.slow

GOOD = 5
Start = Callable[..., Learner]


def chatter(log: Log, prompts: int, start: int = 0) -> None:
    """Four answers to each prompt, thumbs up for those with the good token in them, whose prompts are all different."""
    chance = random.Random(start)
    for p in range(start, start + prompts):
        for a in range(4):
            answer = [chance.randrange(6, 32) for _ in range(chance.randrange(2, 6))]
            if a % 2:
                answer[chance.randrange(len(answer))] = GOOD
            ids = [*answer, 1]
            choice = Choice(index=0, finish_reason="stop", token_ids=ids, logprobs=[-1.0] * len(ids))
            i = 4 * p + a
            append(
                log,
                respond(f"r{i}", [2 + p % 29, 2 + p // 29, 3], choices=[choice]),
                vote(f"f{i}", f"r{i}", "up" if a % 2 else "down", time=float(i), user=f"u{i % 7}"),
            )


@pytest.fixture
def log(settings: Settings) -> Iterator[SqliteLog]:
    log = SqliteLog(settings.path(settings.log.path))
    yield log
    log.close()


@pytest.fixture
def start(settings: Settings, log: SqliteLog) -> Iterator[Start]:
    """Start a learner, again as often as one likes; changes go to [learner]."""
    started: list[Learner] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def start(**changes: Any) -> Learner:
        for learner in started:
            learner.close()
        learner_settings = change(settings.learner, **{"reward": {"learning_rate": 1e-2, "epochs": 4}, **changes})
        changed = settings.model_copy(update={"learner": learner_settings})
        started.append(Learner(changed, log, Policy.load(changed), threading.Event()))
        return started[-1]

    yield start
    torch.set_num_threads(threads)
    for learner in started:
        learner.close()


@pytest.fixture
def store(settings: Settings) -> AdapterStore:
    return AdapterStore(settings.path(settings.store.path))


def settle(learner: Learner) -> list[str]:
    """Step until there is nothing to do; the open candidates."""
    for _ in range(100):
        if not learner.step():
            return [candidate.version for candidate in learner._rollout.state.open()]
    raise AssertionError("there is no end to it")


def test_dpo_makes_a_candidate_from_pairs_and_spends_both_votes_of_each(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    chatter(log, 120)
    assert settle(start(algorithm="dpo")) == ["v1"]
    learned = store.verify("v1").manifest.learned_from
    assert (learned.ups, learned.downs, learned.pairs) == (0, 0, 8)  # two updates of four
    assert len(set(learned.feedback_ids)) == 16


def test_dpo_without_pairs_says_what_makes_them(start: Start, log: SqliteLog, caplog: Any) -> None:
    fill(log, 120)  # no prompt comes twice
    caplog.set_level("INFO")
    assert settle(start(algorithm="dpo")) == []
    assert "corrections, preferred answers, or an up and a down on one prompt make them" in caplog.text


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "gspo"])
def test_fresh_answers_are_scored_by_a_reward_model_that_the_manifest_names(
    start: Start, log: SqliteLog, store: AdapterStore, settings: Settings, algorithm: str
) -> None:
    chatter(log, 120)
    assert settle(start(algorithm=algorithm)) == ["v1"]
    manifest = store.verify("v1").manifest
    assert (manifest.algorithm, manifest.reward_model) == (algorithm, "r1")
    assert versions(settings.path(settings.data) / "learner" / "rewards") == ["r1"]
    assert manifest.kl.upper <= manifest.kl.budget


def test_a_signal_that_is_not_there_is_not_learned_from(
    start: Start, log: SqliteLog, store: AdapterStore, caplog: Any
) -> None:
    fill(log, 200)  # thumbs that have nothing to do with the answers
    caplog.set_level("INFO")
    learner = start(algorithm="ppo", reward={"epochs": 1, "learning_rate": 1e-6})
    assert settle(learner) == []
    assert "no reward model" in caplog.text
    assert store.versions() == []


def test_a_restart_in_the_middle_of_a_cycle_goes_on_with_the_same_reward_model(
    start: Start, log: SqliteLog, store: AdapterStore, settings: Settings
) -> None:
    chatter(log, 120)
    learner = start(algorithm="ppo")
    learner.poll()
    learner.update(learner.join())
    once = learner._models.reward
    assert once is not None
    again = start(algorithm="ppo")
    assert again._models.reward is not None
    assert again._models.reward.report == once.report
    assert settle(again) == ["v1"]
    assert versions(settings.path(settings.data) / "learner" / "rewards") == ["r1"]
    assert len(store.verify("v1").manifest.learned_from.feedback_ids) == 8


def test_logged_answers_make_a_candidate_when_their_log_probs_are_the_policys(
    start: Start, log: SqliteLog, store: AdapterStore, settings: Settings
) -> None:
    policy = Policy.load(settings)
    compute = Compute(policy, Algorithm(settings.learner, policy.width))
    chance = random.Random(1)
    rows = [
        Row([2 + i % 29, 2 + i // 29, 3], [*(chance.randrange(2, 32) for _ in range(3)), GOOD if i % 3 else 6])
        for i in range(120)
    ]
    read, _ = compute.read(rows)
    for i, row in enumerate(rows):
        logprobs = [min(0.0, value) for value in read[i, : len(row.completion)].tolist()]
        choice = Choice(index=0, finish_reason="length", token_ids=row.completion, logprobs=logprobs)
        append(
            log,
            respond(f"r{i}", row.prompt, choices=[choice]),
            vote(f"f{i}", f"r{i}", "up" if i % 3 else "down", time=float(i)),
        )
    assert settle(start(algorithm="ppo-logged", learning_rate=1e-3)) == ["v1"]
    assert len(store.verify("v1").manifest.learned_from.feedback_ids) == 8


def test_logged_answers_of_something_else_are_set_aside_where_they_can_be_looked_at(
    start: Start, log: SqliteLog, store: AdapterStore
) -> None:
    fill(log, 120)  # their log-probs are made up
    learner = start(algorithm="ppo-logged")
    assert settle(learner) == []
    reasons = [learner._buffer.reason(f"f{i}") for i in range(120)]
    assert any(reason is not None and "other probabilities" in (reason[1] or "") for reason in reasons)
    assert store.versions() == []
