"""The demo's table, and the JSON that repeats it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from thumbwheel.demo.users import Answer
from thumbwheel.manifest import KLBound
from thumbwheel.rollout import Candidate
from thumbwheel.statistics import wilson


@dataclass(frozen=True)
class Rate:
    """Share of answers that the population likes, with a 95% Wilson interval."""

    rate: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Rate":
        interval = wilson(sum(answer.liked for answer in answers), len(answers))
        return cls(round(interval.estimate, 4), round(interval.low, 4), round(interval.high, 4), interval.n)

    def __str__(self) -> str:
        return f"{self.rate:.0%}  [{self.low:.0%}, {self.high:.0%}]  n={self.n}"


def open_gates(candidate: Candidate) -> list[str]:
    """The gates that a candidate did not pass, failed or inconclusive."""
    return [check.name for check in candidate.report.checks if check.verdict != "pass"] if candidate.report else []


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo measured."""

    before: Rate
    after: Rate
    after_greedy: Rate
    candidate: Candidate
    rejected: Sequence[Candidate]
    greedy: Candidate
    kl: KLBound
    greedy_kl: KLBound
    swap_s: float
    failed_requests: int
    refusal: str
    log: str

    @property
    def greedy_blocked_by(self) -> list[str]:
        """The gates that failed for the greedy candidate."""
        checks = self.greedy.report.checks if self.greedy.report else []
        return [check.name for check in checks if check.verdict == "fail"]

    def as_json(self) -> dict[str, Any]:
        return {
            "ups_before": asdict(self.before),
            "ups_after": asdict(self.after),
            "ups_greedy": asdict(self.after_greedy),
            "kl_upper": round(self.kl.upper, 4),
            "kl_budget": self.kl.budget,
            "gates": {check.name: check.verdict for check in self.candidate.report.checks}
            if self.candidate.report
            else {},
            "rejected_before": {candidate.version: open_gates(candidate) for candidate in self.rejected},
            "failed_requests": self.failed_requests,
            "swap_s": round(self.swap_s, 3),
            "greedy_kl_upper": round(self.greedy_kl.upper, 4),
            "greedy_blocked_by": self.greedy_blocked_by,
            "log": self.log,
        }


def show(
    console: Console, outcome: Outcome, before: Sequence[Answer], after: Sequence[Answer], greedy: Sequence[Answer]
) -> None:
    """Print the table, each gate, and one question answered three times."""
    new, wild = outcome.candidate.version, outcome.greedy.version
    table = Table(title="before and after, on held-out questions")
    for column in ("", "base", f"{new} (promoted)", f"{wild} (greedy, blocked)"):
        table.add_column(column)
    table.add_row("ups, 95% interval", str(outcome.before), str(outcome.after), str(outcome.after_greedy))
    table.add_row(
        "KL to the reference, nats/sequence",
        "0",
        f"≤ {outcome.kl.upper:.2f} (budget {outcome.kl.budget:g}, scale {outcome.kl.scale:.2f})",
        f"≤ {outcome.greedy_kl.upper:.2f} (budget off)",
    )
    table.add_row(
        "votes learned from", "", *(str(c.submitted.learned_from) for c in (outcome.candidate, outcome.greedy))
    )
    table.add_row("swap, approval to first request", "", f"{outcome.swap_s:.2f} s", "never")
    table.add_row("failed requests", "", str(outcome.failed_requests), "")
    table.add_row("event log", {"kafka": "Apache Kafka", "sqlite": "SQLite"}[outcome.log])
    console.print(table)
    gates = Table(title="gates")
    for column in ("gate", new, "", wild, ""):
        gates.add_column(column)
    others = {check.name: check for check in outcome.greedy.report.checks} if outcome.greedy.report else {}
    for check in outcome.candidate.report.checks if outcome.candidate.report else ():
        other = others.get(check.name)
        gates.add_row(
            check.name,
            _verdict(check.verdict),
            _estimate(check),
            *((_verdict(other.verdict), _estimate(other)) if other else ()),
        )
    console.print(gates)
    pairs = zip(before, after, greedy, strict=False)
    asked, first, last = next(
        (pair for pair in pairs if pair[1].liked and not pair[0].liked), (before[0], after[0], greedy[0])
    )
    console.print(f"[bold]{asked.question}")
    for name, answer in (("base", asked), (new, first), (wild, last)):
        console.print(f"[bold]{name}[/] ({answer.tokens} tokens): {answer.text}", markup=True)
    console.print(f"\nAn operator tries to approve {wild} all the same:\n[red]{outcome.refusal}")


def _verdict(verdict: str) -> str:
    colour = {"pass": "green", "fail": "red"}.get(verdict, "yellow")
    return f"[{colour}]{verdict}[/]"


def _estimate(check: Any) -> str:
    if check.estimate is None:
        return str(check.why)
    interval = f" [{check.low:.3g}, {check.high:.3g}]" if check.low is not None and check.high is not None else ""
    limit = f", limit {check.limit:g}" if check.limit is not None else ""
    return f"{check.estimate:.3g}{interval} {check.unit}{limit}, n={check.n}"
