"""What an algorithm may ask of the models, while the learner runs."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner import kl
from learner.compute import Compute
from learner.logprobs import Row
from learner.policy import Policy
from learner.progress import Stopped
from thumbwheel.settings import LearnerSettings

if TYPE_CHECKING:
    from learner.fresh import Fresh, Source
    from learner.reward_model import RewardModel

KL_PROMPTS = 16
"""How many prompts KTO's z0 is measured on before each update."""


class LearnerModels:
    """The policy, its reference, and where the algorithm needs them a source of fresh answers and a reward model."""

    def __init__(
        self,
        policy: Policy,
        compute: Compute,
        settings: LearnerSettings,
        held_out: Callable[[int], Sequence[list[int]]],
        generator: torch.Generator,
        stop: threading.Event,
        source: "Source | None" = None,
    ) -> None:
        """`held_out` gives at most so many held-out prompts. `stop`, once set, ends long work with Stopped."""
        self._policy = policy
        self._compute = compute
        self._settings = settings
        self._held_out = held_out
        self._generator = generator
        self._stop = stop
        self._source = source
        self.parent = "base"
        self.reward: RewardModel | None = None

    def policy(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        return self._compute.read(rows, self._go_on)

    def reference(self, rows: Sequence[Row], keep: bool = True) -> Tensor:
        return self._compute.reference(rows, keep, self._go_on)

    def measured_kl(self) -> float:
        chosen, prompts = self._settings, self._held_out(KL_PROMPTS)
        estimate = kl.measure(
            self._policy, prompts, chosen.max_tokens, chosen.kl_confidence, self._generator, self._go_on
        )
        return estimate.mean

    def fresh(self, prompts: Sequence[list[int]]) -> "list[list[Fresh]]":
        assert self._source is not None
        chosen = self._settings
        return self._source.answers(prompts, chosen.fresh.answers, chosen.max_tokens, self._go_on)

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        assert self.reward is not None
        return self.reward.rewards(rows, self._go_on)

    def _go_on(self, _: int = 0) -> None:
        if self._stop.is_set():
            raise Stopped
