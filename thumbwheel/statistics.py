"""Pure functions from numbers to an estimate with its interval.

All intervals are two-sided at `confidence`; each end alone holds with (1 + confidence) / 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from scipy import special


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate from `n` observations between its confidence bounds."""

    n: int
    estimate: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22:209, eq. 3). Raises ValueError for n < 1."""
    _check_count(successes, n)
    z = _normal_quantile(confidence)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(n, share, low, high)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The exact interval of a share (Clopper & Pearson 1934, Biometrika 26:404): never too narrow, often too wide."""
    _check_count(successes, n)
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else beta_quantile(tail, successes, n - successes + 1)
    high = 1.0 if successes == n else beta_quantile(1 - tail, successes + 1, n - successes)
    return Interval(n, successes / n, low, high)


def mcnemar_exact(lost: int, gained: int) -> float:
    """One-sided exact p of McNemar's test: P(X ≥ lost), X ~ Binomial(lost + gained, 1/2).

    `lost` pairs changed for the worse, `gained` for the better; pairs that agree say nothing (McNemar 1947,
    Psychometrika 12:153; exact form Fay 2010, Biostatistics 11:373). One-sided, because only a loss is a reason to
    stop. 1 when nothing changed.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"counts of pairs cannot be negative: {lost}, {gained}")
    changed = lost + gained
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / (1 << changed)


def paired_shares(lost: int, gained: int, n: int, confidence: float = 0.95) -> Interval:
    """The difference of two shares over `n` pairs, (lost − gained) / n: how much more often the pair was lost.

    The interval adds half a pair to each of the four cells (Agresti & Min 2005, Statistics in Medicine 24:729, §2.4),
    so that it has a width even where all pairs agree.
    """
    if lost < 0 or gained < 0 or lost + gained > n or n < 1:
        raise ValueError(f"{lost} + {gained} changed pairs of {n} cannot be")
    b, c, total = lost + 0.5, gained + 0.5, n + 2
    centre = (b - c) / total
    half = _normal_quantile(confidence) * math.sqrt((b + c) - (b - c) ** 2 / total) / total
    return Interval(n, (lost - gained) / n, max(-1.0, centre - half), min(1.0, centre + half))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with Student's t interval (Student 1908, Biometrika 6:1). Raises ValueError for fewer than 2 values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, not {n}")
    mean = fmean(values)
    half = t_quantile((1 + confidence) / 2, n - 1) * math.sqrt(variance(values, mean) / n)
    return Interval(n, mean, mean - half, mean + half)


def paired_difference(left: Sequence[float], right: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of left − right over pairs, with the t interval of the differences."""
    return mean_interval([x - y for x, y in zip(left, right, strict=True)], confidence)


def ratio_of_means(left: Sequence[float], right: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean(left) / mean(right) over pairs of positive numbers; the interval is the delta method's on the logarithm.

    Var(log ratio) ≈ (s²_l/m²_l + s²_r/m²_r − 2 s_lr/(m_l m_r)) / n, with a t quantile at n − 1 degrees of freedom
    (Casella & Berger 2002, Statistical Inference, §5.5.4): the variance of the mean of l/m_l − r/m_r.
    Raises ValueError for fewer than 2 pairs or a mean that is not positive.
    """
    if len(left) < 2:
        raise ValueError(f"an interval needs at least two pairs, not {len(left)}")
    mean_left, mean_right = fmean(left), fmean(right)
    if mean_left <= 0 or mean_right <= 0:
        raise ValueError("a ratio of means needs positive means")
    relative = [x / mean_left - y / mean_right for x, y in zip(left, right, strict=True)]
    spread = mean_interval(relative, confidence).high
    ratio = mean_left / mean_right
    return Interval(len(left), ratio, ratio * math.exp(-spread), ratio * math.exp(spread))


def slope_through_origin(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Interval:
    """The least-squares slope of y on x without intercept, Σxy / Σx², with its t interval at n − 1 degrees of freedom.

    (Eisenhauer 2003, Teaching Statistics 25:76, eq. 4 and 6.) Raises ValueError for fewer than 2 points or x all zero.
    """
    n = len(x)
    total = sum(value * value for value in x)
    if n < 2 or total == 0.0:
        raise ValueError("a slope needs at least two points, not all of them at zero")
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / total
    residual = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (n - 1)
    half = t_quantile((1 + confidence) / 2, n - 1) * math.sqrt(residual / total)
    return Interval(n, slope, slope - half, slope + half)


def t_quantile(p: float, df: float) -> float:
    """The quantile of Student's t."""
    return float(special.stdtrit(df, p))


def beta_quantile(p: float, a: float, b: float) -> float:
    """The quantile of Beta(a, b)."""
    return float(special.betaincinv(a, b, p))


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_count(successes: int, n: int) -> None:
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no share")
