"""The demo from its first chat to its table."""

import asyncio
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from thumbwheel.demo.loop import LogName, Loop
from thumbwheel.demo.prompts import HELD_OUT_SUBJECTS, TRAFFIC_SUBJECTS, questions
from thumbwheel.demo.table import Outcome, Rate, open_gates, show
from thumbwheel.demo.traffic import Traffic
from thumbwheel.demo.users import PATIENCE
from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import BASE, AdapterPromoted, CandidateRejected
from thumbwheel.rollout import Candidate


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    held_out: int = 96
    batch: int = 16
    updates: int = 8
    kl_samples: int = 64
    greedy_held_out: int = 64
    greedy_learning_rate: float = 5e-3
    """One that takes the adapter far past what the gates allow, in so many updates."""

    @property
    def votes(self) -> int:
        return self.batch * self.updates


ATTEMPTS = 5
"""How many candidates the learner may offer: sampling is chance, and a gate that stops one is there for that."""

SHORT = Size(held_out=8, batch=8, updates=2, kl_samples=32, greedy_held_out=8, greedy_learning_rate=1e-2)


class Stage:
    """One line of progress at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def __call__(self, words: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ]
        began = time.monotonic()
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(words, total=total)
            yield lambda: progress.advance(task, 1 if total else 0)
        self._console.print(f"[green]✓[/] {words} [dim]{time.monotonic() - began:.0f} s[/]")


def play(model: Path, keep: Path | None, short: bool, log: LogName = "sqlite") -> None:
    """Run it all, on this kind of log, and print the table; the last line is one JSON object. Leaves nothing running.

    Raises ThumbwheelError where a part does not do what it should.
    """
    data = keep.absolute() if keep else Path(tempfile.mkdtemp(prefix="thumbwheel-demo-"))
    try:
        asyncio.run(_play(model.absolute(), data, short, log))
    finally:
        if keep is None:
            shutil.rmtree(data, ignore_errors=True)


async def _play(model: Path, data: Path, short: bool, log: LogName) -> None:
    size = SHORT if short else Size()
    console = Console(width=None if sys.stdout.isatty() else 120)
    stage = Stage(console)
    held_out = questions(HELD_OUT_SUBJECTS, size.held_out, seed=1)
    console.print(
        f"Users ask {model.name} everyday questions, and to be brief. A thumb goes up when the answer ends by itself "
        f"within {PATIENCE} tokens; nobody checks whether it makes sense."
    )
    with Loop(data, model, batch=size.batch, updates=size.updates, kl_samples=size.kl_samples, log=log) as loop:
        traffic = Traffic(loop)
        asked = itertools.cycle(questions(TRAFFIC_SUBJECTS, 400, seed=2))
        with stage("vLLM and the gateway start") as tick:
            await asyncio.to_thread(loop.wait, loop.ready, "the gateway's readiness", 300, tick)
        with stage("held-out questions, before", len(held_out)) as tick:
            before = await traffic.ask_all(held_out, tick, "app", "policy")
        candidate, rejected = await _candidate_that_passes(console, stage, traffic, asked, size, short)
        # As long as a candidate is undecided the learner waits: nothing of the next one is learned inside a budget.
        with stage("somebody switches the KL budget off for what comes next, and turns the learning rate up") as tick:
            await _be_greedy(loop, size.greedy_learning_rate, tick)
        with stage(f"an operator approves {candidate.version}; the gateway swaps under load") as tick:
            swap_s = await _approve_and_swap(loop, traffic, candidate, short, tick)
        with stage("held-out questions, after", len(held_out)) as tick:
            after = await traffic.ask_all(held_out, tick, "app", "policy")
        console.print("Users go on voting, now for the greedy learner.")
        words = "the greedy learner updates the adapter"
        greedy = await _next_candidate(console, stage, traffic, asked, size, len(rejected) + 2, words)
        with stage(f"the guardrails evaluate {greedy.version}") as tick:
            greedy = await _wait_for_report(loop, greedy.version, tick)
        with stage(f"held-out questions to {greedy.version}, pinned by an evaluator", size.greedy_held_out) as tick:
            pinned = f"policy@{greedy.version}"
            after_greedy = await traffic.ask_all(held_out[: size.greedy_held_out], tick, "evaluator", pinned)
        refusal = _must_be_refused(loop, greedy)
        outcome = Outcome(
            before=Rate.of(before),
            after=Rate.of(after),
            after_greedy=Rate.of(after_greedy),
            candidate=candidate,
            rejected=rejected,
            greedy=greedy,
            kl=loop.manifest(candidate.version).kl,
            greedy_kl=loop.manifest(greedy.version).kl,
            swap_s=swap_s,
            failed_requests=traffic.failed,
            refusal=refusal,
            log=log,
        )
        show(console, outcome, before, after, after_greedy)
        for error in traffic.errors[:3]:
            console.print(f"[red]a request failed: {error}")
    print(json.dumps(outcome.as_json()))


async def _candidate_that_passes(
    console: Console, stage: Stage, traffic: Traffic, asked: Iterator[str], size: Size, short: bool
) -> tuple[Candidate, list[Candidate]]:
    """Users vote, the learner learns, the guardrails judge; what does not pass an operator rejects, and it goes on.

    Also returns what was rejected. A short run has too few answers to settle a gate and takes the first candidate.
    """
    loop = traffic.loop
    rejected: list[Candidate] = []
    while True:
        words = "the learner updates the adapter and holds it to the KL budget"
        candidate = await _next_candidate(console, stage, traffic, asked, size, len(rejected) + 1, words)
        with stage(f"the guardrails evaluate {candidate.version} through the gateway") as tick:
            candidate = await _wait_for_report(loop, candidate.version, tick)
        assert candidate.report is not None
        if short or candidate.report.verdict == "pass":
            return candidate, rejected
        rejected.append(candidate)
        why = f"gates that did not pass: {', '.join(open_gates(candidate))}"
        if len(rejected) == ATTEMPTS:
            found = "; ".join(
                f"{check.name}: {check.why}" for check in candidate.report.checks if check.verdict != "pass"
            )
            raise ThumbwheelError(
                f"{ATTEMPTS} candidates in a row were not fit to go live; {candidate.version}: {found}"
            )
        code, words = await asyncio.to_thread(
            loop.command, "adapters", "reject", candidate.version, "--actor", "demo-operator", "--reason", why
        )
        if code != 0:
            raise ThumbwheelError(f"{candidate.version} could not be rejected: {words}")
        console.print(f"  [yellow]{candidate.version} is rejected: {why}[/]; users go on voting")


async def _chat(console: Console, stage: Stage, traffic: Traffic, asked: Iterator[str], votes: int) -> None:
    before = traffic.loop.votes()
    with stage("users chat and vote", votes) as tick:
        ups, downs = await traffic.chat_and_vote(asked, votes, tick)
    on_log = await _votes_on_log(traffic.loop, before + ups + downs - traffic.failed)
    console.print(f"  {ups} thumbs up, {downs} down; on the log: {on_log}")


async def _votes_on_log(loop: Loop, expected: int) -> int:
    """How many there are, once those that are on their way have arrived, or after a few seconds."""
    for _ in range(50):
        if (found := await asyncio.to_thread(loop.votes)) >= expected:
            break
        await asyncio.sleep(0.1)
    return found


async def _next_candidate(
    console: Console, stage: Stage, traffic: Traffic, asked: Iterator[str], size: Size, count: int, words: str
) -> Candidate:
    """The candidate of this number, which the learner makes of votes. Users go on where it has too few of one kind."""
    loop = traffic.loop

    def there() -> bool:
        loop.rollout.poll()
        return len(loop.rollout.state.candidates) >= count

    await _chat(console, stage, traffic, asked, size.votes)
    while True:
        with stage(words) as tick:
            await asyncio.to_thread(loop.wait, lambda: there() or loop.lacks_votes(), "a candidate", 600, tick)
        if there():
            return list(loop.rollout.state.candidates.values())[-1]
        console.print("  the learner lacks thumbs of one kind; users go on voting")
        await _chat(console, stage, traffic, asked, size.batch)


async def _wait_for_report(loop: Loop, version: str, tick: Callable[[], None]) -> Candidate:
    def there() -> bool:
        loop.rollout.poll()
        candidate = loop.rollout.state.candidates[version]
        last = candidate.history[-1]
        if candidate.report is None and isinstance(last, CandidateRejected):
            raise ThumbwheelError(f"{version} was rejected before its evaluation was done: {last.reason}")
        return candidate.report is not None

    await asyncio.to_thread(loop.wait, there, f"the report on {version}", 600, tick)
    return loop.rollout.state.candidates[version]


async def _be_greedy(loop: Loop, learning_rate: float, tick: Callable[[], None]) -> None:
    before = loop.starts()
    loop.be_greedy(learning_rate)
    await asyncio.to_thread(loop.wait, lambda: loop.renewed(before), "a new start of the learner", 120, tick)


async def _approve_and_swap(
    loop: Loop, traffic: Traffic, candidate: Candidate, force: bool, tick: Callable[[], None]
) -> float:
    """Approve under load; seconds from the approval to the first request that the new version serves.

    `force` goes past gates that cannot settle on a short run's few answers.
    """
    async with traffic.load() as served:
        await asyncio.sleep(2)
        code, words = await asyncio.to_thread(
            loop.command, "adapters", "approve", candidate.version, "--digest", candidate.digest,
            "--actor", "demo-operator", "--reason", "read the report", *(["--force"] if force else []),
        )  # fmt: skip
        if code != 0:
            raise ThumbwheelError(f"the approval of {candidate.version} was refused: {words}")
        await asyncio.to_thread(
            loop.wait, lambda: any(version == candidate.version for _, version in served), "the swap", 120, tick
        )
        await asyncio.sleep(2)
    loop.rollout.poll()
    promoted = loop.rollout.state.candidates[candidate.version]
    approved_at = promoted.approval.time if promoted.approval else 0.0
    promoted_at = next(event.time for event in promoted.history if isinstance(event, AdapterPromoted))
    first = min(began for began, version in served if version == candidate.version)
    late = [began for began, version in served if version == BASE and began > promoted_at + 1]
    if late:
        raise ThumbwheelError(f"{len(late)} requests were served by the old version a second after the promotion")
    return first - approved_at


def _must_be_refused(loop: Loop, greedy: Candidate) -> str:
    """Try to approve it all the same; what the command line answers."""
    code, words = loop.command(
        "adapters", "approve", greedy.version, "--actor", "demo-operator", "--reason", "more ups"
    )
    if code == 0:
        verdict = "?" if greedy.report is None else greedy.report.verdict
        kl = loop.manifest(greedy.version).kl.upper
        raise ThumbwheelError(
            f"{greedy.version} was approved: its gates said {verdict}, its KL is at most {kl:.2f} nats"
        )
    return words
