"""Kahneman-Tversky optimisation from single thumbs (Ethayarajh et al., arXiv 2402.01306, section 4.1).

With r = log πθ(y|x) − log πref(y|x), the reward that the policy implies, in nats, and a point of reference z0:

    v(x, y) = λ_D σ(β (r − z0))   for an up           (equation 8)
    v(x, y) = λ_U σ(β (z0 − r))   for a down
    L = E[λ_y − v(x, y)]                              (equation 7)

z0 = 0 here (APO-zero: D'Oosterlinck et al., arXiv 2408.06266, section 3.2): KTO's own z0 is estimated from mismatched
prompts and completions of the batch, which costs a forward pass, sits at zero for small batches and is corrupted by
duplicates. Zero says what the reference says: ups are to become likelier than under it, downs less likely.

Class weights: λ_D n_D : λ_U n_U = weight_up : weight_down, whatever the batch holds, so that a rare up is not drowned
by many downs. The paper wants that ratio between 1 and 4/3 (section 4.2).

σ′ falls with |βr|: past about 3.6 a row pulls with less than a tenth of its first force. The share of such rows is
reported, since long answers get there early and then stop teaching.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SATURATED = 0.1
"""A row is saturated when its gradient has fallen below this share of the largest, 4σ(1 − σ) < 0.1."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch. Rewards are β r; the margin is the mean reward of ups less that of downs."""

    loss: float
    reward_up: float
    reward_down: float
    saturated: float

    @property
    def margin(self) -> float:
        return self.reward_up - self.reward_down


def class_weights(ups: Sequence[bool], weight_up: float, weight_down: float) -> list[float]:
    """λ of each row; they sum to the number of rows. A class that is absent leaves its share to the other."""
    n_up = sum(ups)
    n_down = len(ups) - n_up
    total = weight_up * (n_up > 0) + weight_down * (n_down > 0)
    return [len(ups) * (weight_up / n_up if up else weight_down / n_down) / total for up in ups]


def losses(policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float) -> Tensor:
    """λ_y − v(x, y) of each row, from its two sequence log-probs. Differentiable in `policy`."""
    signed = torch.where(ups, policy - reference, reference - policy)
    return weights * (1 - torch.sigmoid(beta * signed))


def diagnose(policy: Tensor, reference: Tensor, ups: Tensor, weights: Tensor, beta: float) -> Diagnostics:
    """What a whole batch looks like, with the loss as its mean."""
    rewards = beta * (policy - reference)
    slope = 4 * torch.sigmoid(rewards) * torch.sigmoid(-rewards)
    return Diagnostics(
        loss=losses(policy, reference, ups, weights, beta).mean().item(),
        reward_up=rewards[ups].mean().item(),
        reward_down=rewards[~ups].mean().item(),
        saturated=(slope < SATURATED).float().mean().item(),
    )
