"""The losses of the reward model: one score s(x, y) for an answer, from pairs and from thumbs together.

    pairs    −log σ(s_w − s_l) + c (s_w + s_l)²           Ouyang et al., arXiv 2203.02155, equation 1; the second term,
                                                          c = 0.01, from Eisenstein et al., arXiv 2312.09244, equation 2
    thumbs   −log σ(±(s + u + t + l))                     + for an up, − for a down
    ridge    ½ κ (Σ u² + Σ t² + b²)                       once in all votes

Of a thumb's logit only s is the reward. The rest is what a thumb says about other things than the answer: u, how lavish
this user is with ups; t, how the topic is received, whatever the answer; l = b log(tokens / 100), the taste for long
answers. The ridge is the prior of a random-effects model, each effect ~ N(0, 1/κ): a user's first votes hardly move u,
many that are all alike are explained away by it. A user or topic never seen has effect zero.

Scores have no zero and no unit of their own: rewards are scores less the mean, over the spread, of the reference's
answers, clipped to ±5 (`calibrate`). All are in logits (nats of odds) before, in spreads after.

The loss of all votes is Σ losses of rows + ridge, rows being pairs and thumbs; that of a batch, given the effects, the
mean loss of its rows. How common ups are is an intercept beside the effects.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CENTRE = 0.01
"""How hard the mean score of a pair is drawn to zero."""

LEAST_SPREAD = 1e-3
"""Of the reference's scores, in logits: what is below is rounding."""

CLIP = 5.0
"""The largest reward, in spreads of the reference's scores."""

TYPICAL_TOKENS = 100
"""The length at which the length effect is zero."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of one batch. Accuracy: share of pairs with s_w > s_l, of thumbs on their side of zero, effects included.

    A kind of row that is absent has no figures (NaN). Mean and spread are those of all scores.
    """

    loss: float
    pair_accuracy: float
    pair_margin: float
    thumb_accuracy: float
    score_mean: float
    score_spread: float


class Effects(torch.nn.Module):
    """What is in a thumb beside the answer: parameters, all zero at first, for so many users and topics."""

    def __init__(self, users: int, topics: int) -> None:
        super().__init__()
        self.users = torch.nn.Parameter(torch.zeros(users))
        self.topics = torch.nn.Parameter(torch.zeros(topics))
        self.length = torch.nn.Parameter(torch.zeros(()))

    def forward(self, users: Tensor, topics: Tensor, tokens: Tensor) -> Tensor:
        """u + t + l of each thumb, from indexes (−1: unknown) and its answer's number of tokens."""
        known = _looked_up(self.users, users) + _looked_up(self.topics, topics)
        return known + self.length * torch.log(tokens / TYPICAL_TOKENS)

    def ridge(self, strength: float) -> Tensor:
        """½ κ times the sum of squares: once beside the summed losses of all thumbs."""
        return 0.5 * strength * (self.users.square().sum() + self.topics.square().sum() + self.length.square())


def _looked_up(effects: Tensor, indexes: Tensor) -> Tensor:
    # One more entry, zero, which −1 points at.
    return torch.cat([effects, effects.new_zeros(1)])[indexes]


def joint_weights(
    pair_trust: Tensor, thumb_trust: Tensor, weight_pairs: float, weight_thumbs: float
) -> tuple[Tensor, Tensor]:
    """Weights of the pairs and of the thumbs of a whole batch, in proportion to trust within each kind.

    Summed they are as weight_pairs : weight_thumbs, and together the number of rows. A kind that is absent, or without
    any trust, leaves its share to the other; all are zero where nobody is trusted.
    """
    pairs, thumbs = pair_trust.sum().item(), thumb_trust.sum().item()
    total = weight_pairs * (pairs > 0) + weight_thumbs * (thumbs > 0)
    rows = len(pair_trust) + len(thumb_trust)
    return (
        pair_trust * (rows * weight_pairs / total / pairs if pairs > 0 else 0.0),
        thumb_trust * (rows * weight_thumbs / total / thumbs if thumbs > 0 else 0.0),
    )


def pair_losses(chosen: Tensor, rejected: Tensor, weights: Tensor, centre: float = CENTRE) -> Tensor:
    """The loss of each pair from the scores of its two answers."""
    return weights * (centre * (chosen + rejected).square() - functional.logsigmoid(chosen - rejected))


def thumb_losses(scores: Tensor, effects: Tensor, ups: Tensor, weights: Tensor) -> Tensor:
    """The loss of each thumb from its answer's score and what `Effects` makes of the rest."""
    logits = scores + effects
    return -weights * functional.logsigmoid(torch.where(ups, logits, -logits))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Mean and spread of the scores that the reference's answers get."""

    mean: float
    spread: float

    def rewards(self, scores: Tensor) -> Tensor:
        """Scores as rewards: zero for a usual answer of the reference, one for a spread above it, at most ±5."""
        return ((scores - self.mean) / self.spread).clamp(-CLIP, CLIP)


def calibrate(scores: Tensor) -> Calibration:
    """From scores of answers sampled from the reference. Raises ValueError where they do not spread."""
    spread = scores.std(correction=0).item() if len(scores) else 0.0
    if not LEAST_SPREAD < spread < float("inf"):
        raise ValueError(
            f"the reward model gives {len(scores)} answers of the reference scores with spread {spread}: "
            "it tells no answer from another, and nothing can be learned from it"
        )
    return Calibration(scores.mean().item(), spread)


def diagnose(
    loss: float, chosen: Tensor, rejected: Tensor, scores: Tensor, effects: Tensor, ups: Tensor
) -> Diagnostics:
    """What a whole batch looks like: its loss, the scores of its pairs and of its thumbs."""
    every = torch.cat([chosen, rejected, scores])
    return Diagnostics(
        loss=loss,
        pair_accuracy=(chosen > rejected).float().mean().item(),
        pair_margin=(chosen - rejected).mean().item(),
        thumb_accuracy=((scores + effects > 0) == ups).float().mean().item(),
        score_mean=every.mean().item(),
        score_spread=every.std(correction=0).item(),
    )
