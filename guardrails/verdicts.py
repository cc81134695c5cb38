"""From an estimate with its interval to a verdict."""

from collections.abc import Sequence

from thumbwheel.events import CheckResult, Verdict
from thumbwheel.statistics import Interval


def at_most(seen: Interval, limit: float) -> Verdict:
    """Whether the whole interval is inside an upper limit, outside, or neither."""
    return "pass" if seen.high <= limit else "fail" if seen.low > limit else "inconclusive"


def at_least(seen: Interval, limit: float) -> Verdict:
    """Whether the whole interval is inside a lower limit, outside, or neither."""
    return "pass" if seen.low >= limit else "fail" if seen.high < limit else "inconclusive"


def overall(checks: Sequence[CheckResult]) -> Verdict:
    """Fail if any check failed, else inconclusive if any is, else pass."""
    verdicts = {check.verdict for check in checks}
    return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts or not checks else "pass"


def unknown(name: str, n: int, why: str) -> CheckResult:
    """Inconclusive, without an estimate."""
    return CheckResult(name=name, verdict="inconclusive", n=n, why=why)


def result(name: str, verdict: Verdict, seen: Interval, limit: float, unit: str, why: str) -> CheckResult:
    """A verdict with the numbers that it rests on."""
    return CheckResult(
        name=name,
        verdict=verdict,
        n=seen.n,
        estimate=seen.estimate,
        low=seen.low,
        high=seen.high,
        limit=limit,
        unit=unit,
        why=why,
    )
