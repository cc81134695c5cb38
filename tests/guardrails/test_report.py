"""A report says everything a person needs, and nothing in an answer can upset its layout."""

from guardrails.report import render, summary, to_json
from thumbwheel.events import CheckResult, EvaluationReported, decode

REPORT = EvaluationReported(
    source="guardrails",
    version="v3",
    digest="sha256:x",
    verdict="fail",
    suites=["default"],
    checks=[
        CheckResult(
            name="kl_budget", verdict="fail", n=48, estimate=9.12, low=7.5, high=10.8, limit=4.0, unit="nats/sequence",
            why="served answers are at least 7.50 from the reference",
        ),
        CheckResult(name="refusals_kept", verdict="inconclusive", n=16, why="too few"),
        CheckResult(name="forbidden_patterns", verdict="pass", n=90, estimate=0.0, why="[/INST] is [bold]no[/bold]"),
    ],
)  # fmt: skip


def test_the_table_shows_verdict_numbers_and_reason_of_each_check() -> None:
    shown = render(REPORT, width=200)
    for part in ("v3 · fail · default", "kl_budget", "9.12", "7.5 … 10.8", "nats/sequence", "at least 7.50", "48"):
        assert part in shown
    assert "[/INST] is [bold]no[/bold]" in shown


def test_the_table_fits_a_narrow_terminal() -> None:
    assert max(map(len, render(REPORT, width=100).splitlines())) <= 100


def test_the_summary_names_every_check_that_did_not_pass() -> None:
    line = summary(REPORT)
    assert line.startswith("v3: fail (kl_budget fail: served answers")
    assert "refusals_kept inconclusive: too few" in line
    assert "forbidden_patterns" not in line


def test_json_is_the_event() -> None:
    assert decode(to_json(REPORT).encode()) == REPORT
