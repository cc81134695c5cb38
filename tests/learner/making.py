"""A trainer over the tiny model, with all that its algorithm may ask for, and examples for it."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learner import algorithms
from learner.algorithm import Algorithm
from learner.algorithms import ALGORITHMS
from learner.compute import Compute
from learner.examples import Examples, Pair, Thumb
from learner.fresh import Memory
from learner.logprobs import Row
from learner.models import LearnerModels
from learner.policy import Policy
from learner.ranks import ALONE, Ranks
from learner.trainer import Trainer
from thumbwheel.settings import LearnerSettings

GOOD = 5
"""The token that users of the tiny model like."""


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS},
    "kto, mismatched z0": {"z0": "mismatched"},
    "kto, measured z0": {"z0": "measured"},
    "dpo, robust": {"algorithm": "dpo", "dpo_loss": "robust"},
    "dpo, ipo": {"algorithm": "dpo", "dpo_loss": "ipo"},
}


class Liking:
    """Stands for a reward model: the more of an answer is the good token, the better."""

    def rewards(self, rows: Sequence[Row], _: Any = None) -> Tensor:
        return torch.tensor([4.0 * row.completion.count(GOOD) / len(row.completion) - 1 for row in rows])


class Made:
    """A trainer with its parts."""

    def __init__(self, policy: Policy, settings: LearnerSettings, ranks: Ranks = ALONE) -> None:
        self.policy = policy
        self.algorithm: Algorithm = algorithms.make(settings, policy.width)
        if self.algorithm.head is not None:
            self.algorithm.head.to(policy.parameters()[0].dtype)
        self.compute = Compute(policy, self.algorithm, ranks)
        random = torch.Generator().manual_seed(7)
        self.models = LearnerModels(
            policy,
            self.compute,
            settings,
            lambda limit: [[2, i] for i in range(3, 11)][:limit],
            random,
            threading.Event(),
            Memory(policy, random),
        )
        self.models.reward = Liking()  # type: ignore[assignment]
        self.trainer = Trainer(policy, settings, self.algorithm, self.compute, self.models)


def change(settings: LearnerSettings, **changes: Any) -> LearnerSettings:
    """Settings but for these; `fresh`, `ppo` and `reward` take a dictionary."""
    nested = {
        name: getattr(settings, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return settings.model_copy(update=nested)


SYSTEM = [2, 9, 4, 7] * 10
"""What prompts may begin with: long enough to be read once for all."""


def thumbs(policy: Policy, system: Sequence[int] = ()) -> list[Thumb]:
    """Of odd sizes, with a prompt that comes twice and an answer of one token; the policy itself sampled them."""
    rows = [
        (Row([*system, 2, 3], [GOOD, 4, GOOD, 1]), True),
        (Row([*system, 2, 3], [7, 8, 9, 10, 1]), False),
        (Row([*system, 6, 2, 9], [11, 12, 1]), False),
        (Row([*system, 4], [GOOD]), True),
        (Row([*system, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22]), False),
    ]
    read, _ = Compute(policy, Algorithm(LearnerSettings(), policy.width)).read([row for row, _ in rows])
    return [
        Thumb(f"f{i}", row.prompt, row.completion, up, read[i, : len(row.completion)].tolist())
        for i, (row, up) in enumerate(rows)
    ]


def pairs(system: Sequence[int] = ()) -> list[Pair]:
    """Of odd sizes, one with a prompt that comes twice."""
    return [
        Pair(("f0", "f1"), [*system, 2, 3], [GOOD, 4, GOOD, 1], [7, 8, 9, 10, 1], "votes"),
        Pair(("f2",), [*system, 2, 3], [GOOD, 1], [11, 12, 1], "correction"),
        Pair(("f3",), [*system, 6, 2, 9, 4], [13, GOOD, 1], [17], "preferred"),
    ]


def examples_for(made: Made, system: Sequence[int] = ()) -> Examples:
    """What its algorithm learns from."""
    return pairs(system) if made.algorithm.needs.pairs else thumbs(made.policy, system)


def exactly(policy: Policy) -> None:
    """Let the norms of an fp64 model compute in fp64: by themselves they do in fp32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        result: Tensor = (
            norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        )
        return result

    for module in policy.model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(forward, module)
