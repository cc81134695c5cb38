"""The statistics against scipy's, against known values, and against what an interval promises."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel.statistics import (
    Interval,
    clopper_pearson,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    paired_shares,
    ratio_of_means,
    slope_through_origin,
    wilson,
)


@pytest.fixture(scope="module")
def stats() -> Any:
    from scipy import stats  # half a second, for these tests alone

    return stats


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 16), (3, 16), (16, 16), (50, 96)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_of_a_share_are_scipys(stats: Any, successes: int, n: int, confidence: float) -> None:
    test = stats.binomtest(successes, n)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = test.proportion_ci(confidence, method)
        seen = ours(successes, n, confidence)
        assert (seen.low, seen.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (4, 0), (0, 5), (9, 3), (3, 3)])
def test_mcnemar_is_the_binomial_test_of_the_changed_pairs(stats: Any, lost: int, gained: int) -> None:
    if lost + gained == 0:
        assert mcnemar_exact(lost, gained) == 1
    else:
        theirs = stats.binomtest(lost, lost + gained, alternative="greater").pvalue
        assert mcnemar_exact(lost, gained) == pytest.approx(theirs, rel=1e-12)


def test_five_lost_of_five_is_the_least_that_is_significant() -> None:
    assert mcnemar_exact(5, 0) == 1 / 32
    assert mcnemar_exact(4, 0) > 0.05


def test_mean_interval_is_scipys(stats: Any) -> None:
    values = [0.3, -1.2, 4.0, 2.2, 0.1]
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    seen = mean_interval(values, 0.9)
    assert (seen.low, seen.high) == pytest.approx((theirs.low, theirs.high))
    assert seen.estimate == pytest.approx(sum(values) / 5)


def test_paired_difference_is_scipys(stats: Any) -> None:
    left, right = [1.0, 2.0, 4.0, 3.5], [0.5, 2.5, 3.0, 3.0]
    theirs = stats.ttest_rel(left, right).confidence_interval(0.95)
    seen = paired_difference(left, right)
    assert (seen.low, seen.high) == pytest.approx((theirs.low, theirs.high))


def test_slope_is_least_squares(stats: Any) -> None:
    # scipy fits an intercept; over points mirrored about the origin the intercept is zero and the slopes agree
    x, y = [1.0, 2.0, 3.0], [0.9, 2.2, 2.8]
    theirs = stats.linregress([*x, *(-v for v in x)], [*y, *(-v for v in y)])
    assert slope_through_origin(x, y).estimate == pytest.approx(theirs.slope)


def test_paired_shares_know_agresti_and_mins_formula() -> None:
    # lost 10, gained 3 of 50: (10.5 − 3.5) / 52, ± 1.96 · √(14 − 49/52) / 52
    seen = paired_shares(10, 3, 50)
    half = 1.959964 * math.sqrt(14 - 49 / 52) / 52
    assert seen.estimate == pytest.approx(0.14)
    assert (seen.low, seen.high) == pytest.approx((7 / 52 - half, 7 / 52 + half), abs=1e-6)


def test_pairs_that_all_agree_still_leave_doubt() -> None:
    seen = paired_shares(0, 0, 16)
    assert seen.low < 0 < seen.high < 0.2


def coverage(draw: Callable[[], Interval], truth: float, rounds: int = 600) -> float:
    held = [seen.low <= truth <= seen.high for seen in (draw() for _ in range(rounds))]
    return held.count(True) / rounds


def test_the_ratios_interval_holds_as_often_as_it_says() -> None:
    chance = random.Random(3)

    def draw() -> Interval:
        right = [chance.gauss(60, 15) for _ in range(40)]
        return ratio_of_means([0.5 * value + chance.gauss(6, 5) for value in right], right, 0.9)

    assert 0.86 < coverage(draw, 0.6) < 0.94


def test_the_slopes_interval_holds_as_often_as_it_says() -> None:
    chance = random.Random(4)

    def draw() -> Interval:
        x = [chance.gauss(0, 1) for _ in range(30)]
        return slope_through_origin(x, [0.7 * value + chance.gauss(0, 0.5) for value in x], 0.9)

    assert 0.86 < coverage(draw, 0.7) < 0.94


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.6, 0.99))
def test_an_interval_holds_its_estimate(counts: tuple[int, int], confidence: float) -> None:
    for interval in (wilson, clopper_pearson):
        seen = interval(*counts, confidence)
        assert 0 <= seen.low <= seen.estimate <= seen.high <= 1


@given(st.lists(st.floats(1, 100), min_size=2, max_size=30))
def test_a_ratio_turned_over_is_its_inverse(values: list[float]) -> None:
    other = [value + index % 3 for index, value in enumerate(values)]
    there, back = ratio_of_means(values, other), ratio_of_means(other, values)
    assert there.estimate == pytest.approx(1 / back.estimate)


def test_what_cannot_be_is_refused() -> None:
    for impossible in (
        lambda: wilson(3, 2),
        lambda: clopper_pearson(0, 0),
        lambda: mcnemar_exact(-1, 0),
        lambda: paired_shares(3, 3, 5),
        lambda: mean_interval([1.0]),
        lambda: paired_difference([1.0, 2.0], [1.0]),
        lambda: ratio_of_means([0.0, 0.0], [1.0, 1.0]),
        lambda: slope_through_origin([0.0, 0.0], [1.0, 1.0]),
    ):
        with pytest.raises(ValueError, match=r".+"):
            impossible()
