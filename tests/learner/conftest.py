"""A tiny random Llama, and what a gateway and its users would have put on the log."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.policy import Policy
from learner.tokens import Tokens
from thumbwheel.events import Choice, FeedbackSubmitted, ResponseGenerated, Sampling, Timings
from thumbwheel.settings import EngineSettings, LearnerSettings, Settings

VOCABULARY = 32


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A causal language model of about 3,000 parameters, whose next token is far from sure and far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, as the learner loads it."""
    place = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(place)
    return place


@pytest.fixture
def settings(tmp_path: Path, tiny_dir: Path) -> Settings:
    """Settings for the tiny model: small batches, nothing to wait for."""
    return Settings(
        data=tmp_path / "state",
        engine=EngineSettings(model=tiny_dir),
        learner=LearnerSettings(
            metrics_port=0,
            batch=4,
            updates_per_candidate=2,
            learning_rate=1e-2,
            target_modules=["o_proj", "down_proj"],
            max_tokens=8,
            kl_samples=16,
            settle_s=0,
            poll_s=0.01,
        ),
    )


def move(policy: Policy, size: float, seed: int = 1) -> None:
    """Make the policy differ from the reference: lora_B, zero at first, gets random entries of this size."""
    generator = torch.Generator().manual_seed(seed)
    weights = policy.weights()
    policy.set_weights(
        {
            name: torch.randn(w.shape, generator=generator, dtype=w.dtype) * size if "lora_B" in name else w
            for name, w in weights.items()
        }
    )


@pytest.fixture
def exact(settings: Settings) -> Policy:
    """A policy in fp64, moved away from its reference."""
    policy = Policy(tiny(torch.float64), settings, "sha256:test")
    for parameter in policy.parameters():
        parameter.data = parameter.data.double()
    move(policy, 0.3)
    return policy


class Letters(Tokens):
    """A tokenizer for that model: 2 is a, 3 is b, and so on; 1 ends a turn. What is no letter is a token too many."""

    def __init__(self) -> None:
        super().__init__(Path("none"))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + id - 2) for id in ids if id > 1)

    def encode_turn(self, text: str) -> list[int]:
        return [*(ord(letter) - ord("a") + 2 for letter in text), 1]


Respond = Callable[..., ResponseGenerated]


def respond(response_id: str, prompt: list[int] | None = None, **changes: Any) -> ResponseGenerated:
    """A response of one choice, [4, 5, 1], that may be learned from, but for `changes`."""
    fields: dict[str, Any] = {
        "id": f"e-{response_id}",
        "source": "gateway/r1",
        "response_id": response_id,
        "endpoint": "chat.completions",
        "outcome": "completed",
        "replica": "r1",
        "version": "base",
        "digest": "sha256:0",
        "api_key": "test",
        "request": {},
        "prompt_token_ids": [prompt or [2, 3]],
        "choices": [Choice(index=0, finish_reason="stop", token_ids=[4, 5, 1], logprobs=[-1.0, -2.0, -0.5])],
        "sampling": Sampling(),
        "timings": Timings(duration_s=1.0),
    }
    return ResponseGenerated(**{**fields, **changes})


def vote(id: str, response_id: str, rating: str | None = "up", **changes: Any) -> FeedbackSubmitted:
    """A vote of user u1 on the first choice at time 100, but for `changes`."""
    fields: dict[str, Any] = {"time": 100.0, "user": "u1", "api_key": "test", "source": "gateway/r1", **changes}
    return FeedbackSubmitted(id=id, response_id=response_id, rating=rating, **fields)
