"""What the demo does with a candidate that its gates stop."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from tests.adapters import append
from tests.thumbwheel.test_rollout import rejected, submitted
from thumbwheel.demo import play
from thumbwheel.demo.table import open_gates
from thumbwheel.demo.traffic import Traffic
from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import CheckResult, EvaluationReported, Verdict
from thumbwheel.log import SqliteLog
from thumbwheel.reader import RolloutFollower


class Scripted:
    """A loop whose learner offers a candidate after each round of votes, once it has seen `lacking` more of them; the
    guardrails say what they are told."""

    def __init__(self, path: Path, verdicts: list[Verdict], lacking: int = 0) -> None:
        self.log = SqliteLog(path)
        self.rollout = RolloutFollower(self.log)
        self.verdicts = verdicts
        self.lacking = lacking
        self.commands: list[tuple[str, ...]] = []

    def votes(self) -> int:
        return 0

    def lacks_votes(self) -> bool:
        return self.lacking >= 0

    def offer(self) -> None:
        self.lacking -= 1
        if self.lacks_votes():
            return
        self.rollout.poll()
        version = f"v{len(self.rollout.state.candidates) + 1}"
        verdict = self.verdicts.pop(0)
        checks = [CheckResult(name="sense_kept", verdict=verdict, n=1), CheckResult(name="empty", verdict="pass", n=1)]
        candidate = submitted(version)
        report = EvaluationReported(
            source="guardrails", version=version, digest=candidate.digest, verdict=verdict, checks=checks
        )
        append(self.log, candidate, report)

    def wait(self, until: Callable[[], bool], what: str, timeout_s: float, tick: Callable[[], None]) -> None:
        assert until(), what

    def command(self, *arguments: str) -> tuple[int, str]:
        self.commands.append(arguments)
        append(self.log, rejected(arguments[2]))
        return 0, ""


class Votes:
    def __init__(self, loop: Scripted) -> None:
        self.loop = loop
        self.failed = 0
        self.asked_for: list[int] = []

    async def chat_and_vote(self, asked: Iterator[str], votes: int, tick: Callable[[], None]) -> tuple[int, int]:
        self.asked_for.append(votes)
        self.loop.offer()
        return 0, 0


SIZE = play.Size(batch=4, updates=2)


async def settle(loop: Scripted, short: bool = False, users: Votes | None = None) -> tuple[Any, list[Any]]:
    console = Console(quiet=True)
    traffic = cast(Traffic, users or Votes(loop))
    return await play._candidate_that_passes(console, play.Stage(console), traffic, iter(()), SIZE, short)


async def test_what_does_not_pass_is_rejected_by_name_and_the_next_one_goes_on(tmp_path: Path) -> None:
    loop = Scripted(tmp_path / "log.sqlite", ["fail", "inconclusive", "pass"])
    candidate, stopped = await settle(loop)
    assert candidate.version == "v3"
    assert {one.version: open_gates(one) for one in stopped} == {"v1": ["sense_kept"], "v2": ["sense_kept"]}
    assert [arguments[:3] for arguments in loop.commands] == [
        ("adapters", "reject", "v1"),
        ("adapters", "reject", "v2"),
    ]
    assert "sense_kept" in json.dumps(loop.commands)


async def test_as_many_as_may_be_that_do_not_pass_end_the_demo_and_say_why(tmp_path: Path) -> None:
    loop = Scripted(tmp_path / "log.sqlite", ["fail"] * play.ATTEMPTS)
    with pytest.raises(ThumbwheelError, match=rf"{play.ATTEMPTS} candidates in a row.*sense_kept"):
        await settle(loop)


async def test_a_short_run_takes_the_first_one(tmp_path: Path) -> None:
    loop = Scripted(tmp_path / "log.sqlite", ["inconclusive"])
    candidate, stopped = await settle(loop, short=True)
    assert (candidate.version, stopped, loop.commands) == ("v1", [], [])


async def test_users_go_on_as_long_as_the_learner_lacks_thumbs_of_one_kind(tmp_path: Path) -> None:
    loop = Scripted(tmp_path / "log.sqlite", ["pass"], lacking=2)
    users = Votes(loop)
    candidate, _ = await settle(loop, users=users)
    assert candidate.version == "v1"
    assert users.asked_for == [8, 4, 4]


async def test_a_candidate_that_is_rejected_before_its_report_is_not_waited_for(tmp_path: Path) -> None:
    loop = Scripted(tmp_path / "log.sqlite", [])
    append(loop.log, submitted("v1"), rejected("v1"))
    with pytest.raises(ThumbwheelError, match="v1 was rejected before its evaluation was done: bad"):
        await play._wait_for_report(cast(Any, loop), "v1", lambda: None)
