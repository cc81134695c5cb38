"""Fresh answers of a real vLLM: they are the policy's as it is in memory, and what is not is found out."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from learner.fresh import Engine, Fresh, FreshError, check_served
from learner.logprobs import completion_hidden, token_logprobs
from learner.policy import Policy
from learner.progress import Stopped
from tests.learner.conftest import move
from thumbwheel.errors import AdapterError
from thumbwheel.settings import EngineSettings, LearnerSettings, Settings

pytestmark = pytest.mark.engine

QUESTIONS = ("What is a river?", "How do plants grow?", "Say hello.", "Tell me in one word: what color is the sky?")


def load(model_dir: Path, rank: Any = 8) -> Policy:
    policy = Policy.load(
        Settings(engine=EngineSettings(model=model_dir.absolute()), learner=LearnerSettings(rank=rank))
    )
    move(policy, 0.03)
    return policy


@pytest.fixture(scope="module")
def policy(model_dir: Path) -> Policy:
    """Far enough from the reference to be told apart, near enough to answer in words."""
    return load(model_dir)


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@pytest.fixture
def engine(engine_url: str, policy: Policy, tmp_path: Path) -> Iterator[Engine]:
    with Engine(engine_url, policy, tmp_path) as engine:
        yield engine
    assert list(tmp_path.iterdir()) == []


def names(url: str) -> list[str]:
    return [card["id"] for card in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]


@torch.no_grad()
def scored(policy: Policy, fresh: list[Fresh]) -> list[torch.Tensor]:
    """The learner's own log-probs of each answer's tokens."""
    rows = [one.row for one in fresh]
    targets = torch.tensor([id for row in rows for id in row.completion])
    each = token_logprobs(policy.model, completion_hidden(policy.model, rows), targets)
    return list(torch.split(each, [len(row.completion) for row in rows]))


def both(policy: Policy, fresh: list[Fresh]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those of the policy and of the reference."""
    with policy.reference():
        reference = scored(policy, fresh)
    return scored(policy, fresh), reference


def test_answers_are_the_policys_own(engine: Engine, engine_url: str, policy: Policy, prompts: list[list[int]]) -> None:
    counts: list[int] = []
    answers = engine.answers(prompts, 3, 32, counts.append)
    assert [[one.row.prompt for one in group] for group in answers] == [[prompt] * 3 for prompt in prompts]
    assert sum(counts) == 12
    flat = [one for group in answers for one in group]
    assert len({tuple(one.row.completion) for one in flat}) > 8, "answers to one prompt differ"
    for one in flat:
        assert one.ended == (one.row.completion[-1] in policy.stop)
        assert one.ended or len(one.row.completion) == 32
        assert not policy.stop & set(one.row.completion[:-1])
    ours, reference = both(policy, flat)
    assert check_served(flat, ours, reference) < 0.12
    with pytest.raises(FreshError, match="does not serve"):
        check_served(flat, reference, ours)
    assert not [name for name in names(engine_url) if name.startswith("fresh-")]


def test_the_next_call_serves_the_adapter_as_it_is_by_then(
    engine: Engine, policy: Policy, prompts: list[list[int]]
) -> None:
    engine.answers(prompts[:1], 2, 8)
    weights = policy.weights()
    try:
        move(policy, 0.03, seed=2)
        flat = [one for group in engine.answers(prompts, 3, 16) for one in group]
        now, reference = both(policy, flat)
    finally:
        policy.set_weights(weights)
    assert check_served(flat, now, reference) < 0.12
    with pytest.raises(FreshError, match="does not serve"):
        check_served(flat, scored(policy, flat), now)


def test_an_engine_that_serves_the_base_model_in_silence_is_found_out(
    engine: Engine, policy: Policy, prompts: list[list[int]]
) -> None:
    trained = policy.weights()
    try:
        policy.set_weights(trained, scale=0.0)  # what it loads then changes nothing
        flat = [one for group in engine.answers(prompts, 3, 16) for one in group]
    finally:
        policy.set_weights(trained)
    ours, reference = both(policy, flat)
    with pytest.raises(FreshError, match="does not serve the adapter that is being trained"):
        check_served(flat, ours, reference)
    assert check_served(flat, reference, ours) < 0.12


def test_a_rank_above_the_engines_is_said_to_be(
    engine_url: str, model_dir: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    with (
        Engine(engine_url, load(model_dir, rank=64), tmp_path) as engine,
        pytest.raises(AdapterError, match=r"\[learner\] rank: .*64.*16"),
    ):
        engine.answers(prompts, 2, 8)


def test_files_that_the_engine_does_not_see_are_said_to_be(
    engine: Engine, policy: Policy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "save", lambda directory: directory.mkdir(parents=True))
    with pytest.raises(FreshError, match="has to see the learner's files"):
        engine.answers(prompts, 2, 8)


def test_a_prompt_that_does_not_fit_is_refused_with_the_engines_words(engine: Engine, engine_url: str) -> None:
    with pytest.raises(FreshError, match=r"answered 400: .*context length"):
        engine.answers([[504] * 3000], 2, 8)
    assert not [name for name in names(engine_url) if name.startswith("fresh-")]


def test_a_stop_ends_the_engines_work_too(engine: Engine, engine_url: str, prompts: list[list[int]]) -> None:
    def running() -> int:
        with urllib.request.urlopen(f"{engine_url}/metrics", timeout=30) as answer:
            found = re.findall(r"^vllm:num_requests_running\{.*\} ([\d.]+)$", answer.read().decode(), re.MULTILINE)
        return sum(int(float(value)) for value in found)

    def stop(done: int) -> None:
        if running() > 8:
            raise Stopped

    with pytest.raises(Stopped):
        engine.answers([prompt for prompt in prompts for _ in range(4)], 4, 1500, stop)
    assert not [name for name in names(engine_url) if name.startswith("fresh-")]
    # vLLM counts when it has computed something: what still ran would be counted with this.
    engine.answers(prompts[:1], 2, 4)
    assert running() <= 2
