"""A report leaves its verdict, time and estimates for Prometheus."""

from prometheus_client import REGISTRY

from guardrails.metrics import observe
from thumbwheel.events import CheckResult, EvaluationReported


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"thumbwheel_guardrails_{name}", labels) or 0.0


def test_a_report_is_counted_and_its_numbers_are_shown() -> None:
    before = sample("evaluations_total", verdict="inconclusive")
    checks = [
        CheckResult(name="kl_budget", verdict="pass", n=8, estimate=1.5, limit=4.0),
        CheckResult(name="refusals_kept", verdict="inconclusive", n=8),
    ]
    report = EvaluationReported(source="t", version="v1", digest="d", verdict="inconclusive", checks=checks, time=123.0)
    observe(report, 2.0)
    assert sample("evaluations_total", verdict="inconclusive") == before + 1
    assert sample("last_evaluation_timestamp_seconds") == 123.0
    assert sample("check_estimate", check="kl_budget") == 1.5
    assert sample("check_limit", check="kl_budget") == 4.0
    assert REGISTRY.get_sample_value("thumbwheel_guardrails_check_estimate", {"check": "refusals_kept"}) is None
