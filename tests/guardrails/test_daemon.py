"""The daemon on a real log: whom it evaluates, when, and how often."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from guardrails.daemon import Guardrails, run
from guardrails.evaluator import report
from guardrails.sampler import SamplingError
from guardrails.suite import load
from tests import kafka
from thumbwheel.demo.broker import free_ports
from thumbwheel.errors import AdapterError, SettingsError
from thumbwheel.events import (
    ROLLOUT,
    CandidateRejected,
    CandidateSubmitted,
    CheckResult,
    EvaluationReported,
    Event,
    ReplicaReported,
    ReplicaVersion,
    decode,
)
from thumbwheel.log import Message, Record, SqliteLog, message_of
from thumbwheel.log.deadletter import letters
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings

pytestmark = pytest.mark.slow

DIGEST = "sha256:1"


class Evaluator:
    """Stands in the place of minutes of sampling: notes whom it was asked about, and reports a pass, or raises."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.errors: list[Exception] = []
        self.seconds = 0.0

    async def __call__(self, settings: Settings, version: str, digest: str) -> EvaluationReported:
        self.asked.append(version)
        await asyncio.sleep(self.seconds)
        if self.errors:
            raise self.errors.pop(0)
        found = [CheckResult(name="kl_budget", verdict="pass", n=8)]
        return report(version, digest, [load("default")], found)


class World:
    def __init__(self, path: Path) -> None:
        self.settings = Settings(data=path)
        self.log = SqliteLog(path / "log.sqlite")
        self.evaluator = Evaluator()
        self.stopping = False

    def guardrails(self) -> Guardrails:
        return Guardrails(self.settings, self.log, lambda: self.stopping, self.evaluator)

    def append(self, *events: Event) -> None:
        self.log.append(ROLLOUT, [message_of(event) for event in events])

    def submit(self, *versions: str) -> None:
        for version in versions:
            self.append(
                CandidateSubmitted(
                    source="test",
                    version=version,
                    digest=DIGEST,
                    parent="base",
                    algorithm="kto",
                    learned_from=1,
                    kl_upper=1,
                )
            )

    def replica(
        self, name: str, state: Literal["proved", "failed"] | None, why: str = "", version: str = "v1", **fields: Any
    ) -> None:
        said = [ReplicaVersion(version=version, digest=DIGEST, state=state, why=why)] if state else []
        self.append(ReplicaReported(source="test", replica=name, serving="base", versions=said, **fields))

    def reports(self) -> list[EvaluationReported]:
        events = [decode(record.message.value) for record in read_all(self.log, ROLLOUT)]
        return [event for event in events if isinstance(event, EvaluationReported)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.log.close()


def test_a_candidate_waits_until_a_live_replica_proved_it(world: World) -> None:
    guardrails = world.guardrails()
    world.submit("v1")
    assert not guardrails.step()
    world.replica("r1", None)
    assert not guardrails.step()
    assert world.evaluator.asked == []
    world.replica("r1", "proved")
    assert guardrails.step()
    assert [report.verdict for report in world.reports()] == ["pass"]
    assert not guardrails.step(), "a report is made once"
    assert world.evaluator.asked == ["v1"]


@pytest.mark.parametrize("fields", [{"leaving": True}, {"time": time.time() - 3600}], ids=["left", "silent"])
def test_the_word_of_a_replica_that_is_gone_does_not_count(world: World, fields: dict[str, Any]) -> None:
    world.submit("v1")
    world.replica("r1", "proved", **fields)
    assert not world.guardrails().step()


def test_when_every_live_replica_failed_it_the_report_says_why(world: World) -> None:
    guardrails = world.guardrails()
    world.submit("v1")
    world.replica("r1", "failed", "nearer to the base model")
    world.replica("r2", None)
    assert not guardrails.step(), "r2 may still prove it"
    world.replica("r2", "failed", "nearer to the base model")
    assert guardrails.step()
    (failed,) = world.reports()
    assert failed.verdict == "fail"
    assert [(check.name, check.verdict) for check in failed.checks] == [("served_equals_trained", "fail")]
    assert failed.checks[0].why == "no replica can serve it: nearer to the base model"
    assert world.evaluator.asked == []


def test_one_proof_outweighs_a_failed_replica(world: World) -> None:
    world.submit("v1")
    world.replica("r1", "failed", "out of memory")
    world.replica("r2", "proved")
    assert world.guardrails().step()
    assert world.reports()[0].verdict == "pass"


def test_a_proof_of_another_digest_is_no_proof(world: World) -> None:
    world.submit("v1")
    stranger = ReplicaVersion(version="v1", digest="sha256:2", state="proved")
    world.append(ReplicaReported(source="test", replica="r1", serving="base", versions=[stranger]))
    assert not world.guardrails().step()


def test_a_crash_after_the_append_does_not_append_twice(world: World) -> None:
    """A second daemon that has not seen the first one's report evaluates again; the log drops its copy."""
    world.submit("v1")
    world.replica("r1", "proved")
    blind = world.guardrails()
    blind._follower.poll()
    assert world.guardrails().step()
    blind._follower.poll = lambda: []  # type: ignore[method-assign]
    assert blind.step()
    assert world.evaluator.asked == ["v1", "v1"]
    assert len(world.reports()) == 1


def test_a_restart_reports_on_what_has_no_report_only(world: World) -> None:
    world.submit("v1", "v2")
    world.replica("r1", "proved")
    assert world.guardrails().step()
    world.replica("r1", "proved", version="v2")
    again = world.guardrails()
    assert again.step()
    assert not again.step()
    assert world.evaluator.asked == ["v1", "v2"]


def test_a_candidate_that_was_rejected_is_not_evaluated(world: World) -> None:
    world.submit("v1")
    world.append(CandidateRejected(source="test", version="v1", digest=DIGEST, actor="ann", reason="no"))
    world.replica("r1", "proved")
    assert not world.guardrails().step()
    assert world.evaluator.asked == []


def test_a_gateway_without_answers_is_asked_again_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    guardrails = world.guardrails()
    world.submit("v1")
    world.replica("r1", "proved")
    world.evaluator.errors = [SamplingError("503: draining")]
    assert not guardrails.step()
    assert not guardrails.step(), "not at once"
    assert (world.evaluator.asked, world.reports()) == (["v1"], [])
    guardrails._not_before = 0.0
    assert guardrails.step()
    assert len(world.reports()) == 1


def test_one_candidate_without_answers_does_not_hold_up_the_next(world: World) -> None:
    world.submit("v1", "v2")
    both = [ReplicaVersion(version=version, digest=DIGEST, state="proved") for version in ("v1", "v2")]
    world.append(ReplicaReported(source="test", replica="r1", serving="base", versions=both))
    world.evaluator.errors = [SamplingError("404: v1 was unloaded")]
    assert world.guardrails().step()
    assert [report.version for report in world.reports()] == ["v2"]


def test_a_version_that_fails_its_digest_is_refused(world: World) -> None:
    world.submit("v1")
    world.replica("r1", "proved")
    world.evaluator.errors = [AdapterError("adapter version v1 fails its digest")]
    assert world.guardrails().step()
    (failed,) = world.reports()
    assert (failed.verdict, failed.checks[0].why) == ("fail", "adapter version v1 fails its digest")


def test_a_stop_drops_the_evaluation_in_progress(world: World) -> None:
    world.submit("v1")
    world.replica("r1", "proved")
    world.evaluator.seconds = 60
    world.stopping = True
    start = time.monotonic()
    assert not world.guardrails().step()
    assert time.monotonic() - start < 2
    assert world.reports() == []


def test_the_program_leaves_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "evaluator.key").write_text("tw-key")
    code = (
        "import sys; from pathlib import Path; from guardrails.daemon import run; from thumbwheel.settings import *;"
        "run(Settings(data=Path(sys.argv[1]), guardrails=GuardrailSettings(metrics_port=0)))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        line = program.stderr.readline()
        assert "suites default" in line, line + program.stderr.read()
        time.sleep(0.3)
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0


def test_the_program_does_not_start_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THUMBWHEEL_EVALUATOR_KEY", raising=False)
    with pytest.raises(SettingsError, match="have no API key"):
        run(Settings(data=tmp_path))


def test_started_before_the_broker_it_waits_and_leaves_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "evaluator.key").write_text("tw-key")
    code = (
        "import sys; from pathlib import Path; from guardrails.daemon import run; from thumbwheel.settings import *;"
        "kafka = {'bootstrap': sys.argv[2], 'timeout_s': 0.5};"
        "run(Settings(data=Path(sys.argv[1]), guardrails=GuardrailSettings(metrics_port=0),"
        " log={'backend': 'kafka', 'kafka': kafka}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), f"127.0.0.1:{free_ports(1)[0]}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        lines = [program.stderr.readline() for _ in range(3)]
        assert all("[log.kafka] bootstrap" in line and "trying again" in line for line in lines[1:]), lines
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0


def test_a_report_that_cannot_be_read_yet_is_not_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.submit("v1")
    world.replica("r1", "proved")
    guardrails = world.guardrails()
    plain, shown = world.log.read, 2

    def late(topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        return plain(topic, offset, min(limit, max(0, shown - offset)), partition)

    monkeypatch.setattr(world.log, "read", late)
    assert guardrails.step()
    assert not guardrails.step()
    shown = 9
    assert not guardrails.step()
    assert world.evaluator.asked == ["v1"]


@pytest.mark.kafka
def test_on_kafka_a_candidate_gets_one_report_and_poison_is_kept_aside(tmp_path: Path, kafka_address: str) -> None:
    world = World(tmp_path)
    world.log.close()
    log = KafkaLog(kafka.on(kafka_address, tmp_path))
    world.log = log  # type: ignore[assignment]
    world.submit("v1")
    log.append(ROLLOUT, [Message("x", "v1", 1.0, b"no event")])
    world.replica("r1", "proved")
    guardrails = world.guardrails()
    assert guardrails.step()
    assert not guardrails.step()
    assert not world.guardrails().step(), "nor after a restart"
    assert world.evaluator.asked == ["v1"]
    assert [(letter.group, letter.original.id) for letter in letters(log, ROLLOUT)] == [("guardrails", "x")]
    assert log.committed("guardrails", ROLLOUT) == log.ends(ROLLOUT)[1]
    log.close()
