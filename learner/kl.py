"""How far the policy has moved from the reference, and holding it to a budget.

The measure is KL(πθ ‖ πref) of whole answers, in nats a sequence, with histories sampled from the candidate itself on
held-out prompts. Per sequence it is Rao-Blackwellised (Amini et al., arXiv 2504.10637, section 4):

    D̂ = Σ_t KL(πθ(·|h_t) ‖ πref(·|h_t)),   each term over the whole vocabulary,

unbiased like Σ_t log πθ(y_t)/πref(y_t), never negative, and of less variance.

Upper bound: mean + t_{n−1}(confidence) · s/√n, one-sided. Not empirical Bernstein: that needs a largest possible value,
and a sequence's KL has none that is of use (its range term alone would be several budgets at n = 64). The price is
that the bound is approximate where a few sequences carry most of the KL; at n = 64 the mean is near enough to normal.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from learner.logprobs import Row, buckets, completion_hidden, log_softmax
from learner.policy import Policy
from learner.sampler import sample
from thumbwheel.statistics import mean_interval

BATCH = 64
"""How many answers are sampled side by side."""
CHUNK = 64
"""Positions of which the whole distribution is there at a time: 64 × 49152 in fp32 is 13 MB."""

BISECTIONS = 4
"""How often a scale is tried again after the first guess: each try samples anew and costs a whole measurement."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One sampled answer: its KL in nats, and what candidate and reference make of each of its tokens, in nats."""

    row: Row
    kl: float
    candidate: list[float]
    reference: list[float]


def work(prompts: int, max_tokens: int) -> int:
    """The most steps that `measure` reports for so many prompts: a step of sampling for each token, a row compared."""
    return math.ceil(prompts / BATCH) * max_tokens + prompts


@dataclass(frozen=True, slots=True)
class Estimate:
    """KL to the reference over `answers`. Nats: mean and upper bound a sequence, `per_token` a sampled token."""

    mean: float
    upper: float
    per_token: float
    answers: list[Measured]


def measure(
    policy: Policy,
    prompts: Sequence[list[int]],
    max_tokens: int,
    confidence: float,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda _: None,
) -> Estimate:
    """Sample one answer a prompt (at least two) from the policy as it is, and measure.

    `progress` is called as the work goes on, with its part of `work(prompts, max_tokens)`.
    """
    answers: list[Measured] = []
    for start in range(0, len(prompts), BATCH):
        rows = sample(policy.model, prompts[start : start + BATCH], max_tokens, policy.stop, generator, progress)
        answers += _compare(policy, rows, progress)
    each = [answer.kl for answer in answers]
    tokens = sum(len(answer.row.completion) for answer in answers)
    return Estimate(fmean(each), upper_bound(each, confidence), sum(each) / tokens, answers)


def hold(budget: float, measured: Estimate, at: Callable[[float], Estimate]) -> tuple[float, Estimate] | None:
    """The largest scale found at which the upper bound is inside `budget`, with its estimate; None if there is none.

    `measured` is the estimate at scale 1, `at` measures at another scale. KL grows as the square of a small scale,
    hence the first guess √(0.9 budget / upper); from there it is bisection between what was inside and what was
    outside, or the same guess again where that is a shorter step back. It stops early once it uses four fifths of the
    budget. A KL that is no number is outside of every budget, an infinite one included. Several tries at one bound make
    it a little less sure than its confidence says.
    """
    if not math.isfinite(measured.upper):
        return None
    if measured.upper <= budget:
        return 1.0, measured
    inside: tuple[float, Estimate] | None = None
    low, high = 0.0, 1.0
    scale = math.sqrt(0.9 * budget / measured.upper)
    for _ in range(1 + BISECTIONS):
        estimate = at(scale)
        if estimate.upper <= budget:
            inside, low = (scale, estimate), scale
            if estimate.upper >= 0.8 * budget:
                break
            scale = (low + high) / 2
        else:
            high = scale
            scale = max((low + high) / 2, scale * math.sqrt(0.85 * budget / estimate.upper))
    return inside


def upper_bound(values: Sequence[float], confidence: float) -> float:
    """One-sided upper confidence bound of the mean, by Student's t. Infinite where a value is not finite or n < 2."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return math.inf
    return mean_interval(values, 2 * confidence - 1).high  # a two-sided interval with half of the rest at each end


@torch.inference_mode()
def _compare(policy: Policy, rows: Sequence[Row], progress: Callable[[int], None]) -> list[Measured]:
    """Each row's KL, in the order of `rows`. Both models read it alike: the reference itself has exactly 0."""
    measured: dict[int, Measured] = {}
    for bucket in buckets(rows):
        part = [rows[i] for i in bucket]
        lengths = [len(row.completion) for row in part]
        candidate = torch.split(completion_hidden(policy.model, part), lengths)
        with policy.reference():
            reference = torch.split(completion_hidden(policy.model, part), lengths)
        for i, ours, theirs in zip(bucket, candidate, reference, strict=True):
            measured[i] = _measure_one(policy.model.get_output_embeddings(), rows[i], ours, theirs)
            progress(1)
    return [measured[i] for i in range(len(rows))]


def _measure_one(head: Any, row: Row, candidate: Tensor, reference: Tensor) -> Measured:
    """From the hidden states of one row's completion, each completion length × width."""
    ids = torch.tensor(row.completion, device=candidate.device)[:, None]
    total = 0.0
    chosen: tuple[list[float], list[float]] = ([], [])
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        ours, theirs = log_softmax(head, candidate[part]), log_softmax(head, reference[part])  # chunk × vocabulary
        for values, distribution in zip(chosen, (ours, theirs), strict=True):
            values += distribution.gather(-1, ids[part]).squeeze(-1).tolist()
        total += (ours.exp() * (ours - theirs)).sum().item()
    return Measured(row, total, *chosen)
