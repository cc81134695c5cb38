import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.controller import Controller, Decision, decide
from tests import kafka
from tests.deploy.lives import approved, champion, digest, rejected, replica, reported, rolled_back, submitted
from thumbwheel.demo.broker import free_ports
from thumbwheel.events import (
    BASE,
    ROLLOUT,
    AdapterPromoted,
    AnyEvent,
    CandidateApproved,
    CandidateRejected,
    ReplicaReported,
    ReplicaVersion,
)
from thumbwheel.log import Record, SqliteLog, message_of
from thumbwheel.log.deadletter import letters
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.port import Appended, Message
from thumbwheel.reader import RolloutFollower
from thumbwheel.rollout import fold
from thumbwheel.settings import DeploySettings

MANUAL = DeploySettings(approval="manual", replica_silence_s=60.0)
AUTO = DeploySettings(approval="auto", replica_silence_s=60.0)
NOW = 110.0


def decided(events: list[AnyEvent], settings: DeploySettings = MANUAL, now: float = NOW) -> list[Decision]:
    return decide(fold(events), settings, now)


def one(events: list[AnyEvent], settings: DeploySettings = MANUAL) -> Decision:
    found = decided(events, settings)
    assert len(found) == 1
    return found[0]


PASSED: list[AnyEvent] = [submitted("v1"), reported("v1", kl="pass", sense="pass")]
FAILED: list[AnyEvent] = [submitted("v1"), reported("v1", kl="fail", sense="pass", refusals="inconclusive")]
UNSURE: list[AnyEvent] = [submitted("v1"), reported("v1", kl="pass", refusals="inconclusive")]


@pytest.mark.parametrize("events", [[submitted("v1")], PASSED, FAILED, UNSURE])
def test_under_manual_approval_nothing_is_decided_by_itself(events: list[AnyEvent]) -> None:
    assert decided([*events, replica("r1", "v1")]) == []


def test_the_policy_approves_what_passed_in_its_own_name() -> None:
    event = one(PASSED, AUTO)
    assert isinstance(event, CandidateApproved)
    assert (event.actor, event.reason, event.digest) == ("policy:auto", "all 2 checks of default passed", digest("v1"))
    assert not event.forced
    assert fold([event], fold(PASSED)).candidates["v1"].status == "approved"


def test_the_policy_rejects_what_failed_and_names_the_checks_that_did() -> None:
    event = one(FAILED, AUTO)
    assert isinstance(event, CandidateRejected)
    assert (event.actor, event.reason) == ("policy:auto", "failed checks: kl (kl is fail)")


@pytest.mark.parametrize("events", [[submitted("v1")], UNSURE])
def test_the_policy_leaves_what_is_unsure_to_a_person(events: list[AnyEvent]) -> None:
    assert decided([*events, replica("r1", "v1")], AUTO) == []


READY: list[AnyEvent] = [*PASSED, approved("v1")]


def test_an_approved_version_is_promoted_once_every_live_replica_has_proved_it() -> None:
    event = one([*READY, replica("r1", "v1"), replica("r2", "v1")])
    assert isinstance(event, AdapterPromoted)
    assert (event.version, event.digest, event.previous, event.time) == ("v1", digest("v1"), BASE, NOW)


SILENT = replica("r2", time=NOW - 61)
LEFT = replica("r2", leaving=True)
OTHER_WEIGHTS = ReplicaReported(
    source="gateway/r2",
    replica="r2",
    serving=BASE,
    time=100.0,
    versions=[ReplicaVersion(version="v1", digest="sha256:other", state="proved")],
)


@pytest.mark.parametrize("second", [replica("r2"), replica("r2", "v0"), OTHER_WEIGHTS])
def test_one_live_replica_without_it_holds_the_promotion_back(second: ReplicaReported) -> None:
    assert decided([*READY, replica("r1", "v1"), second]) == []


@pytest.mark.parametrize("second", [SILENT, LEFT])
def test_a_replica_that_is_gone_holds_nothing_back(second: ReplicaReported) -> None:
    assert isinstance(one([*READY, replica("r1", "v1"), second]), AdapterPromoted)


@pytest.mark.parametrize("gone", [[], [replica("r1", "v1", time=NOW - 61)], [replica("r1", "v1", leaving=True)]])
def test_nothing_is_promoted_where_no_replica_lives(gone: list[AnyEvent]) -> None:
    assert decided([*READY, *gone]) == []


@pytest.mark.parametrize("settings", [MANUAL, AUTO])
@pytest.mark.parametrize("events", [[submitted("v1")], PASSED, READY])
def test_a_version_that_a_live_replica_could_not_prove_is_rejected(
    events: list[AnyEvent], settings: DeploySettings
) -> None:
    event = one([*events, replica("r1", "v1"), replica("r2", failed="v1")], settings)
    assert isinstance(event, CandidateRejected)
    assert (event.actor, event.reason) == (
        "controller",
        "replica r2 could not prove it: served log-probs are the base model's",
    )


def test_the_failure_of_a_replica_that_is_gone_is_no_reason() -> None:
    gone = replica("r2", failed="v1", leaving=True)
    assert isinstance(one([*READY, replica("r1", "v1"), gone]), AdapterPromoted)


def test_of_two_that_are_ready_the_newer_is_promoted_and_the_older_superseded() -> None:
    events = [*READY, submitted("v2"), reported("v2", kl="pass"), approved("v2"), replica("r1", "v1", "v2")]
    newer, older = decided(events)
    assert isinstance(newer, AdapterPromoted)
    assert newer.version == "v2"
    assert isinstance(older, CandidateRejected)
    assert (older.version, older.reason) == ("v1", "superseded: v2, submitted after it, is the champion")


def test_a_candidate_that_is_newer_than_the_champion_is_left_alone() -> None:
    assert decided([*champion("v1"), submitted("v2", "v1"), replica("r1", "v1", "v2", serving="v1")]) == []


def test_the_offspring_of_what_was_rolled_back_goes_with_it_to_the_last_generation() -> None:
    events = [
        *champion("v1"),
        *champion("v2", "v1"),
        submitted("v3", "v2"),
        submitted("v4", "v3"),
        rolled_back("v2", "v1"),
        submitted("v5", "v1"),
    ]
    assert {(event.version, type(event)) for event in decided(events)} == {
        ("v3", CandidateRejected),
        ("v4", CandidateRejected),
    }
    assert one([*events[:-1], rejected("v3")]).version == "v4"


def test_parents_in_a_circle_end() -> None:
    assert decided([submitted("v1", "v2"), submitted("v2", "v1")]) == []


@pytest.mark.parametrize("events", [PASSED, FAILED, [*READY, replica("r1", "v1")]])
def test_two_controllers_that_see_the_same_make_the_same_event_whenever_they_look(events: list[AnyEvent]) -> None:
    here, there = (decide(fold(events), AUTO, now) for now in (NOW, NOW + 5))
    assert [event.id for event in here] == [event.id for event in there]


def test_a_decision_that_one_report_overtook_can_be_taken_again_after_the_next() -> None:
    late = one(PASSED, AUTO)
    events = [*PASSED, reported("v1", kl="inconclusive"), late, reported("v1", kl="pass")]
    again = one(events, AUTO)
    assert again.id != late.id
    assert fold([again], fold(events)).candidates["v1"].status == "approved"


@pytest.mark.parametrize("settings", [MANUAL, AUTO])
def test_every_decision_is_one_that_the_fold_takes(settings: DeploySettings) -> None:
    events: list[AnyEvent] = [*champion("v1"), rolled_back("v1", BASE)]
    for number, life in enumerate((PASSED, FAILED, UNSURE, READY), 2):
        events += [
            event.model_copy(
                update={"version": f"v{number}", "digest": digest(f"v{number}"), "id": f"{number} {event.id}"}
            )
            for event in life
        ]
    events.append(replica("r1", "v2", "v3", "v4", "v5"))
    state = fold(events)
    while decisions := decide(state, settings, NOW):
        state = fold(decisions, state)
        assert state.ignored == ()
    assert state.champion == "v5"


def test_a_step_appends_what_it_decides_once_however_many_controllers_there_are(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    log.append(ROLLOUT, [message_of(event) for event in (*PASSED, replica("r1", "v1", time=1e12))])
    controllers = [Controller(log, AUTO) for _ in range(3)]
    for _ in range(3):  # each looks three times, and the others have acted in between
        for controller in controllers:
            controller.step()
    follower = RolloutFollower(log)
    follower.poll()
    assert follower.state.champion == "v1"
    assert [type(event) for event in follower.state.candidates["v1"].history[2:]] == [
        CandidateApproved,
        AdapterPromoted,
    ]
    assert log.ends(ROLLOUT) == (0, 5)
    log.close()


@pytest.mark.kafka
def test_on_kafka_controllers_side_by_side_decide_as_one(tmp_path: Path, kafka_address: str) -> None:
    log = KafkaLog(kafka.on(kafka_address, tmp_path))
    log.append(ROLLOUT, [message_of(event) for event in (*PASSED, replica("r1", "v1", time=1e12))])
    controllers = [Controller(log, AUTO) for _ in range(3)]
    for controller in controllers:
        controller._follower.poll()  # all see the same, and decide before they see each other
    for _ in range(4):
        for controller in controllers:
            controller.step()
    follower = RolloutFollower(log)
    follower.poll()
    assert follower.state.champion == "v1"
    assert [type(event) for event in follower.state.candidates["v1"].history[2:]] == [
        CandidateApproved,
        AdapterPromoted,
    ]
    assert follower.state.ignored == ()
    assert log.committed("controller", ROLLOUT) == log.ends(ROLLOUT)[1]
    log.close()


class Late(SqliteLog):
    """As Kafka may be: it takes every copy, and what was appended is read when `shown` says so."""

    shown = 3

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        return super().read(topic, offset, min(limit, max(0, self.shown - offset)), partition)

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        return [Appended(where.offset, duplicate=False) for where in super().append(topic, messages)]


def test_a_decision_that_cannot_be_read_yet_is_neither_taken_nor_told_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = Late(tmp_path / "log.sqlite")
    log.append(ROLLOUT, [message_of(event) for event in (*PASSED, replica("r1", "v1", time=1e12))])
    controller = Controller(log, AUTO)
    with caplog.at_level(logging.INFO, "deploy.controller"):
        assert controller.step()
        assert not controller.step()
        assert not controller.step()
        log.shown = 4
        assert controller.step()
        assert not controller.step()
    assert [record.getMessage().split()[1] for record in caplog.records] == ["approved", "promoted;"]
    assert log.ends(ROLLOUT) == (0, 5)
    log.close()


def test_what_nobody_can_read_is_kept_aside_and_the_rest_decided(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    log.append(ROLLOUT, [Message("x", "v1", 1.0, b"no event"), *(message_of(event) for event in PASSED)])
    assert Controller(log, AUTO).step()
    assert [letter.group for letter in letters(log, ROLLOUT)] == ["controller"]
    log.close()


@pytest.mark.slow
def test_started_before_the_broker_it_waits_and_leaves_when_told_to(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    config = tmp_path / "thumbwheel.toml"
    config.write_text(
        f'data = "{tmp_path}"\n[deploy]\nmetrics_port = 0\npoll_s = 0.1\n[log]\nbackend = "kafka"\n'
        f'[log.kafka]\nbootstrap = "{address}"\ntimeout_s = 0.5\n'
    )
    code = "from deploy.controller import run; from thumbwheel.settings import load; run(load())"
    environment = {"THUMBWHEEL_CONFIG": str(config)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        assert f"the log is Kafka at {address}" in program.stderr.readline()
        for _ in range(2):
            line = program.stderr.readline()
            assert "[log.kafka] bootstrap" in line, line
            assert "trying again" in line
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0
