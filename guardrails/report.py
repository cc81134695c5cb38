"""A report for a person (a table) or a script (JSON)."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from thumbwheel.events import CheckResult, EvaluationReported, Verdict

COLOURS: dict[Verdict, str] = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def table(report: EvaluationReported) -> Table:
    """One row a check: verdict, estimate with its interval, limit, n and why."""
    title = f"{report.version} · {report.verdict} · {', '.join(report.suites) or 'no suite'}"
    shown = Table(title=title, title_style=COLOURS[report.verdict], title_justify="left")
    shown.add_column("check", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for name in ("estimate", "interval", "limit", "n"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("unit")
    shown.add_column("why", overflow="fold")
    for check in report.checks:
        interval = "" if check.low is None else f"{_number(check.low)} … {_number(check.high)}"
        shown.add_row(
            check.name,
            Text(check.verdict, COLOURS[check.verdict]),
            _number(check.estimate),
            interval,
            _number(check.limit),
            str(check.n),
            check.unit,
            Text(check.why),  # Text, because answers in it may hold what looks like markup
        )
    return shown


def render(report: EvaluationReported, width: int = 140) -> str:
    """The table as plain text."""
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(table(report))
    return capture.get()


def to_json(report: EvaluationReported) -> str:
    """The report as one JSON object, as it lies on the log."""
    return report.model_dump_json(indent=1)


def summary(report: EvaluationReported) -> str:
    """One line: the verdict, and every check that did not pass with its reason."""
    short = [_reason(check) for check in report.checks if check.verdict != "pass"]
    return f"{report.version}: {report.verdict}" + (f" ({'; '.join(short)})" if short else "")


def _reason(check: CheckResult) -> str:
    return f"{check.name} {check.verdict}: {check.why}" if check.why else f"{check.name} {check.verdict}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
