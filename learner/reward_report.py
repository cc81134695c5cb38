"""What a reward model makes of votes that it has not seen.

Intervals are such that each end alone holds with 95%. Votes on one prompt are not independent, so the standard errors
are those of prompts: each value's share in the estimate, summed by prompt (for the AUC, Obuchowski 1997, Biometrics
53:567), with Student's t. One value right and one wrong are added to either sample, as Agresti and Coull do (1998, Am.
Stat. 52:119): without them few votes that all agree would have no width, and the level is not held (7% for 5 against
5). Not covered: users who vote alike on many prompts.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from scipy import stats
from torch import Tensor

from learner.examples import Pair, Thumb
from thumbwheel.statistics import Interval, t_quantile

SURE = 0.95
"""With which either end of an interval holds."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """On prompts that were not learned from.

    `auc`: how often an up scores higher than a down, effects left out; None without both. `accuracy`: thumbs on their
    side of zero, `brier`: mean squared error of σ, both of s + effects as they were learned. `length_pearson` and
    `length_spearman` are correlations of s with the length in tokens over all answers; 0 where either is constant.
    """

    ups: int
    downs: int
    pairs: int
    auc: Interval | None
    accuracy: Interval | None
    brier: float | None
    pair_accuracy: Interval | None
    length_pearson: float
    length_spearman: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """Of one fit: thumbs and pairs that were learned from, and what came of it.

    `length_effect` is b of l = b log(tokens / 100), in logits. `mean` and `spread` are those of the scores of the
    reference's answers; `spread_within` is the spread among answers to one prompt, which alone can teach a policy: far
    below `spread`, the model mostly tells prompts apart. `loss` is the last epoch's, a row.
    """

    thumbs: int
    pairs: int
    held_out: HeldOut
    length_effect: float
    loss: float
    mean: float
    spread: float
    spread_within: float
    seconds: float


def measure(
    thumbs: Sequence[Thumb], pairs: Sequence[Pair], scores: Tensor, effects: Tensor, chosen: Tensor, rejected: Tensor
) -> HeldOut:
    """From the scores and effects of held-out thumbs, and the scores of both sides of held-out pairs; on the CPU."""
    ups = torch.tensor([thumb.up for thumb in thumbs], dtype=torch.bool)
    prompts = [tuple(thumb.prompt) for thumb in thumbs]
    logits = scores + effects
    right = ((logits > 0) == ups).double().tolist()
    better = ((chosen > rejected).double() + 0.5 * (chosen == rejected)).tolist()
    tokens = [len(thumb.completion) for thumb in thumbs]
    tokens += [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    every = torch.cat([scores, chosen, rejected]).tolist()
    return HeldOut(
        ups=int(ups.sum()),
        downs=int((~ups).sum()),
        pairs=len(pairs),
        auc=auc(scores, ups, prompts) if 0 < ups.sum() < len(ups) else None,
        accuracy=_interval(list(zip(right, prompts, strict=True))) if thumbs else None,
        brier=(torch.sigmoid(logits) - ups.float()).square().mean().item() if thumbs else None,
        pair_accuracy=_interval([(b, tuple(p.prompt)) for b, p in zip(better, pairs, strict=True)]) if pairs else None,
        length_pearson=_correlation(every, tokens),
        length_spearman=_correlation(stats.rankdata(every).tolist(), stats.rankdata(tokens).tolist()),
    )


def auc(scores: Tensor, ups: Tensor, prompts: Sequence[Hashable]) -> Interval:
    """The chance that an up scores higher than a down (half for a tie), from N scores and what their prompts are."""
    above = scores[ups][:, None], scores[~ups][None, :]
    wins = (above[0] > above[1]).double() + 0.5 * (above[0] == above[1])  # ups × downs
    of = [prompt for prompt, up in zip(prompts, ups.tolist(), strict=True) if up]
    against = [prompt for prompt, up in zip(prompts, ups.tolist(), strict=True) if not up]
    return _interval(
        list(zip(wins.mean(1).tolist(), of, strict=True)), list(zip(wins.mean(0).tolist(), against, strict=True))
    )


def _interval(*samples: Sequence[tuple[float, Hashable]]) -> Interval:
    """Of a mean of values in [0, 1], each with its prompt; of two samples' common mean, where each is of the other."""
    shares: dict[Hashable, float] = defaultdict(float)
    centres = []
    for i, sample in enumerate(samples):
        padded = [*sample, (0.0, f"wrong {i}"), (1.0, f"right {i}")]
        centres.append(fmean(value for value, _ in padded))
        for value, prompt in padded:
            shares[prompt] += (value - centres[-1]) / len(padded)
    n = len(shares)
    half = t_quantile(SURE, n - 1) * (n / (n - 1) * sum(share * share for share in shares.values())) ** 0.5
    centre = fmean(centres)
    estimate = fmean(value for value, _ in samples[0])
    return Interval(sum(map(len, samples)), estimate, max(0.0, centre - half), min(1.0, centre + half))


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    together = torch.tensor([x, y], dtype=torch.float64)
    together -= together.mean(1, keepdim=True)
    scale = together.norm(dim=1).prod().item()
    return (together[0] @ together[1]).item() / scale if scale > 0 else 0.0
