"""Kahneman-Tversky optimisation from single thumbs (Ethayarajh et al., arXiv 2402.01306, section 4).

With r = log πθ(y|x) − log πref(y|x), the reward that the policy implies, in nats, and a point of reference z0, in nats:

    L = E[λ_y − v(x, y)]                              (equation 7)
    v(x, y) = λ_D σ(β (r − z0))   for an up
    v(x, y) = λ_U σ(β (z0 − r))   for a down

z0 is a constant to the gradient, and never below zero. It comes from one of three places:

- nowhere: z0 = 0 (APO-zero: D'Oosterlinck et al., arXiv 2408.06266, section 3.2). Zero says what the reference says:
  ups are to become likelier than under it, downs less likely.
- a KL that was measured on answers sampled from the policy, smoothed (`MovingAverage`): what the paper's z0 stands for.
- mismatched pairs, the paper's own estimate (section 4.1): the mean of r over prompts with other prompts' answers,
  x_i with y_{i+1} (`mismatched`, `estimate_z0`). It costs a forward pass, and small batches leave it below zero,
  where it is cut off; the raw value is reported, so that one can see it.

Class weights: λ_D n_D : λ_U n_U = weight_up : weight_down, whatever the batch holds, so that a rare up is not drowned
by many downs; n counts trust, not rows. The paper wants that ratio between 1 and 4/3 (equation 8).

σ′ falls with |β (r − z0)|: past about 3.6 a row pulls with less than a tenth of its first force. The share of such rows
is reported, since long answers get there early and then stop teaching.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learner.algorithm import Algorithm, Figures, Models, figures, thumbs_of
from learner.batch import Batch, Plan, of_one_prompt
from learner.examples import Examples, Thumb
from learner.logprobs import Row
from thumbwheel.settings import LearnerSettings

SATURATED = 0.1
"""A row is saturated when its gradient has fallen below this share of the largest, 4σ(1 − σ) < 0.1."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch. Rewards are β r; the margin is the mean reward of ups less that of downs.

    `z0` is raw, in nats: below zero, zero was used.
    """

    loss: float
    reward_up: float
    reward_down: float
    saturated: float
    z0: float = 0.0

    @property
    def margin(self) -> float:
        return self.reward_up - self.reward_down


@dataclass(frozen=True, slots=True)
class MovingAverage:
    """The plain mean of what it has seen at first, then an exponential one; zero before the first sample."""

    value: float = 0.0
    seen: int = 0
    keep: float = 0.9

    def update(self, sample: float) -> "MovingAverage":
        """The average with one more sample in it. Raises ValueError for a sample that is not finite."""
        if not math.isfinite(sample):
            raise ValueError(f"a moving average was given {sample}: one such sample would spoil it for good")
        weight = max(1 - self.keep, 1 / (self.seen + 1))
        return replace(self, value=self.value + weight * (sample - self.value), seen=self.seen + 1)


def class_weights(
    ups: Sequence[bool], weight_up: float, weight_down: float, trust: Sequence[float] | None = None
) -> list[float]:
    """λ of each row, in proportion to its trust within its class; they sum to the number of rows.

    A class that is absent, or without any trust, leaves its share to the other. All are zero where nobody is trusted.
    """
    trust = [1.0] * len(ups) if trust is None else trust
    up = sum(each for each, is_up in zip(trust, ups, strict=True) if is_up)
    down = sum(each for each, is_up in zip(trust, ups, strict=True) if not is_up)
    total = weight_up * (up > 0) + weight_down * (down > 0)
    share_up, share_down = (weight_up / total, weight_down / total) if total else (0.0, 0.0)
    return [
        len(ups) * (share_up * (each / up) if is_up else share_down * (each / down)) if each else 0.0
        for each, is_up in zip(trust, ups, strict=True)
    ]


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Prompts of a batch, each with an answer that was given to another prompt and never to this one.

    No prompt's row and no answer's row is used twice. Where all rows differ this is the paper's x_i with y_{i+1}.
    Otherwise rows of one prompt are put side by side and the answers are shifted by as much as leaves the fewest
    clashes, and the clashes are left out: no row is, as long as no prompt has more than half of the batch and no two
    prompts share an answer. One row, or one prompt, gives nothing.
    """
    prompts = [tuple(row.prompt) for row in rows]
    answers = [tuple(row.completion) for row in rows]
    own: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        own.setdefault(prompt, set()).add(answer)
    place = {prompt: position for position, prompt in enumerate(own)}
    order = sorted(range(len(rows)), key=lambda i: place[prompts[i]])
    best: list[tuple[int, int]] = []
    for shift in range(1, len(rows)):
        shifted = zip(order, order[shift:] + order[:shift], strict=True)
        pairs = [(i, j) for i, j in shifted if answers[j] not in own[prompts[i]]]
        if len(pairs) > len(best):
            best = pairs
        if len(best) == len(rows):
            break
    return [Row(rows[i].prompt, rows[j].completion) for i, j in sorted(best)]


def estimate_z0(policy: Tensor, reference: Tensor) -> float:
    """Raw z0 from the sequence log-probs of `mismatched` rows; 0 where there are none."""
    return (policy - reference).mean().item() if len(policy) else 0.0


def losses(policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float, z0: float = 0.0) -> Tensor:
    """λ_y − v(x, y) of each row, from its two sequence log-probs. Differentiable in `policy`; z0 is raw."""
    gained = policy - reference - max(0.0, z0)
    return weights * (1 - torch.sigmoid(beta * torch.where(ups, gained, -gained)))


def diagnose(
    policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float, z0: float = 0.0
) -> Diagnostics:
    """What a whole batch looks like, with the loss as its mean."""
    rewards = beta * (policy - reference)
    gained = rewards - beta * max(0.0, z0)
    slope = 4 * torch.sigmoid(gained) * torch.sigmoid(-gained)
    return Diagnostics(
        loss=losses(policy, reference, ups, weights, beta, z0).mean().item(),
        reward_up=rewards[ups].mean().item(),
        reward_down=rewards[~ups].mean().item(),
        saturated=(slope < SATURATED).float().mean().item(),
        z0=z0,
    )


def thumb_plan(thumbs: Sequence[Thumb], models: Models, settings: LearnerSettings) -> Plan:
    """A row for each thumb, with its class and its weight."""
    rows = [Row(thumb.prompt, thumb.completion) for thumb in thumbs]
    ups = [thumb.up for thumb in thumbs]
    trust = [thumb.trust for thumb in thumbs]
    weights = class_weights(ups, settings.weight_up, settings.weight_down, trust)
    facts = {"reference": models.reference(rows), "ups": torch.tensor(ups), "weights": torch.tensor(weights)}
    return Plan(rows, list(range(len(rows))), facts, units=of_one_prompt(rows))


class KTO(Algorithm):
    """z0 is as `[learner] z0` says."""

    def __init__(self, settings: LearnerSettings, width: int) -> None:
        super().__init__(settings, width)
        self._kl = MovingAverage()

    def plan(self, examples: Examples, models: Models) -> Plan:
        plan = thumb_plan(thumbs_of(examples), models, self.settings)
        return replace(plan, numbers={"z0": self._z0(plan.rows, models)})

    def _z0(self, rows: Sequence[Row], models: Models) -> float:
        match self.settings.z0:
            case "measured":
                self._kl = self._kl.update(models.measured_kl())
                return self._kl.value
            case "mismatched":
                if not (others := mismatched(rows)):
                    return 0.0
                return estimate_z0(models.policy(others)[0].sum(-1), models.reference(others, keep=False).sum(-1))
            case "none":
                return 0.0

    def __call__(self, batch: Batch) -> tuple[Tensor, Figures]:
        policy, reference, z0 = batch.policy.sum(-1), batch["reference"].sum(-1), batch.numbers["z0"]
        each = losses(policy, reference, batch["ups"], batch["weights"], self.settings.beta, z0)
        seen = diagnose(policy.detach(), reference, batch["ups"], batch["weights"], self.settings.beta, z0)
        return each.sum() / batch.size, figures(seen)

    def state(self) -> dict[str, Any]:
        return asdict(self._kl)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._kl = MovingAverage(**state)
