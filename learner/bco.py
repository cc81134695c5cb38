"""Binary classifier optimisation from single thumbs (Jung et al., arXiv 2404.04656).

The logit of a classifier "up or down" is the reward that the policy implies, β r with r = log πθ(y|x) − log πref(y|x)
in nats, shifted by δ:

    L = E[−λ_y log σ(β r − δ)]   for an up
    L = E[−λ_y log σ(δ − β r)]   for a down

This bounds the DPO loss from above (theorem 1), the closer the nearer δ is to the midpoint of the classes:

    δ = ½ (mean β r of ups + mean β r of downs)        (the reward shift)

δ is a constant to the gradient: a moving average (`kto.MovingAverage`) of the midpoints of past batches, zero at
first, where policy and reference agree and the midpoint is zero too. Each class counts for half of it, whatever the
batch holds; a batch of one class has no midpoint and leaves δ as it is. TRL's BCO trainer (1.13 has the last) took
the mean over all rows instead, so that the larger class draws δ to itself. Left out: the paper's matching of prompt
distributions, since ups and downs here come from the same traffic.

Weights λ are those of `kto.class_weights`. Unlike in KTO, a row on the wrong side never stops teaching; one on the
right side does when it is settled.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learner.algorithm import Algorithm, Figures, Models, figures, thumbs_of
from learner.batch import Batch, Plan
from learner.examples import Examples
from learner.kto import MovingAverage, thumb_plan
from thumbwheel.settings import LearnerSettings

SETTLED = 0.1
"""A row is settled when its gradient has fallen below this share of the largest."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch. Rewards are β r; `accuracy` is the share of rows on their side of δ, `settled` of those settled."""

    loss: float
    reward_up: float
    reward_down: float
    accuracy: float
    settled: float
    delta: float

    @property
    def margin(self) -> float:
        return self.reward_up - self.reward_down


def midpoint(policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float) -> float | None:
    """What a whole batch says δ is, from its sequence log-probs; None where a class is absent or has no weight."""
    rewards = beta * (policy - reference)
    if not weights[ups].any() or not weights[~ups].any():
        return None
    up = (weights[ups] * rewards[ups]).sum() / weights[ups].sum()
    down = (weights[~ups] * rewards[~ups]).sum() / weights[~ups].sum()
    return ((up + down) / 2).item()


def losses(policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float, delta: float) -> Tensor:
    """−λ_y log σ(±(β r − δ)) of each row, from its two sequence log-probs. Differentiable in `policy`."""
    logits = beta * (policy - reference) - delta
    return -weights * functional.logsigmoid(torch.where(ups, logits, -logits))


def diagnose(policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float, delta: float) -> Diagnostics:
    """What a whole batch looks like, with the loss as its mean."""
    rewards = beta * (policy - reference)
    right = torch.where(ups, rewards - delta, delta - rewards)
    return Diagnostics(
        loss=losses(policy, reference, ups, weights, beta, delta).mean().item(),
        reward_up=rewards[ups].mean().item(),
        reward_down=rewards[~ups].mean().item(),
        accuracy=(right > 0).float().mean().item(),
        settled=(torch.sigmoid(-right) < SETTLED).float().mean().item(),
        delta=delta,
    )


class BCO(Algorithm):
    """δ of an update comes from the updates before it."""

    def __init__(self, settings: LearnerSettings, width: int) -> None:
        super().__init__(settings, width)
        self._delta = MovingAverage()

    def plan(self, examples: Examples, models: Models) -> Plan:
        plan = thumb_plan(thumbs_of(examples), models, self.settings)
        return replace(plan, numbers={"delta": self._delta.value})

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        policy, reference, delta = batch.policy.sum(-1), batch["reference"].sum(-1), batch.numbers["delta"]
        each = losses(policy, reference, batch["ups"], batch["weights"], self.settings.beta, delta)
        seen = diagnose(policy.detach(), reference, batch["ups"], batch["weights"], self.settings.beta, delta)
        return each.sum() / batch.size, figures(seen)

    def after(self, whole: Batch) -> None:
        seen = midpoint(
            whole.policy.sum(-1), whole["reference"].sum(-1), whole["ups"], whole["weights"], self.settings.beta
        )
        if seen is not None:
            self._delta = self._delta.update(seen)

    def state(self) -> dict[str, Any]:
        return asdict(self._delta)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._delta = MovingAverage(**state)
