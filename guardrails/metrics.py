"""What the guardrails tell Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

from thumbwheel.events import EvaluationReported

EVALUATIONS = Counter("thumbwheel_guardrails_evaluations_total", "Candidates evaluated, by verdict.", ["verdict"])
SECONDS = Histogram(
    "thumbwheel_guardrails_evaluation_seconds",
    "How long an evaluation took.",
    buckets=(5, 10, 20, 40, 60, 90, 120, 240, 480, 960),
)
LAST = Gauge("thumbwheel_guardrails_last_evaluation_timestamp_seconds", "When the last report was appended.")
ESTIMATE = Gauge("thumbwheel_guardrails_check_estimate", "Estimate of each check in the last report.", ["check"])
LIMIT = Gauge("thumbwheel_guardrails_check_limit", "Limit of each check in the last report.", ["check"])


def observe(report: EvaluationReported, seconds: float) -> None:
    """Count one appended report."""
    EVALUATIONS.labels(report.verdict).inc()
    SECONDS.observe(seconds)
    LAST.set(report.time)
    for check in report.checks:
        for gauge, value in ((ESTIMATE, check.estimate), (LIMIT, check.limit)):
            if value is not None:
                gauge.labels(check.name).set(value)
