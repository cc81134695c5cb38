"""A follower of the rollout: each event once, and what cannot be read once on the dead-letter topic."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests import kafka
from tests.thumbwheel.test_rollout import life, rejected, reported, submitted
from thumbwheel import reader
from thumbwheel.errors import LogError
from thumbwheel.events import ROLLOUT, AnyEvent, CandidateSubmitted, FeedbackSubmitted, ReplicaReported
from thumbwheel.log import Log, Message, SqliteLog, message_of
from thumbwheel.log.deadletter import dlq, letters
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.reader import RolloutFollower
from thumbwheel.rollout import fold

GROUP = "controller"
POISON = Message("x", "v1", 1.0, b"no event")


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    """Either log."""
    made: Log
    if request.param == "kafka":
        made = KafkaLog(kafka.on(request.getfixturevalue("kafka_address"), tmp_path))
    else:
        made = SqliteLog(tmp_path / "log.sqlite")
    yield made
    made.close()


def append(log: Log, *events: AnyEvent | Message) -> None:
    log.append(ROLLOUT, [event if isinstance(event, Message) else message_of(event) for event in events])


def copy(event: AnyEvent) -> Message:
    """The event once more in a message of its own, as when it was sent again."""
    message = message_of(event)
    return Message(f"{message.id}/again", message.key, message.time, message.value)


def raw(event: AnyEvent, **changes: Any) -> Message:
    message = message_of(event)
    return Message(message.id, message.key, message.time, orjson.dumps({**orjson.loads(message.value), **changes}))


def test_copies_of_an_event_are_folded_once(log: Log) -> None:
    events = life("v1", "d1")
    append(log, *events[:2], *map(copy, events[:2]), *events[2:])
    follower = RolloutFollower(log)
    assert follower.poll() == events
    assert follower.state == fold(events)
    append(log, copy(events[0]), copy(events[3]))
    assert follower.poll() == []
    assert follower.state == fold(events)
    assert follower.state.ignored == (), "a copy is not a promotion of what is promoted already"


def test_a_newer_minor_schema_is_read_and_a_newer_major_one_is_kept_aside(log: Log) -> None:
    append(
        log,
        raw(submitted(), schema_version="1.7", mood={"good": [1]}),
        raw(rejected(), schema_version="2.0"),
        reported("pass"),
    )
    follower = RolloutFollower(log, GROUP)
    assert [event.type for event in follower.poll()] == ["candidate.submitted", "evaluation.reported"]
    assert follower.state.candidates["v1"].status == "pending_approval"
    (letter,) = letters(log, ROLLOUT)
    assert (letter.offset, letter.group) == (1, GROUP)
    assert "schema version 2.0" in letter.why


def test_an_event_of_another_topic_is_none_of_the_rollouts(log: Log) -> None:
    stray = FeedbackSubmitted(source="t", response_id="r", rating="up", api_key="k", user="u")
    log.append(ROLLOUT, [message_of(stray)])
    assert RolloutFollower(log, GROUP).poll() == []
    assert [letter.original.id for letter in letters(log, ROLLOUT)] == [stray.id]


def test_a_restart_sends_no_dead_letter_again_and_reads_the_state_from_the_beginning(log: Log) -> None:
    append(log, submitted(), POISON, reported("pass"))
    first = RolloutFollower(log, GROUP)
    first.poll()
    assert log.committed(GROUP, ROLLOUT) == 3
    append(log, rejected())
    again = RolloutFollower(log, GROUP)
    again.poll()
    assert again.state.candidates["v1"].status == "rejected"
    assert log.ends(dlq(ROLLOUT))[1] == 1
    assert log.committed(GROUP, ROLLOUT) == 4


def test_what_came_after_the_last_commit_is_kept_aside_by_whoever_is_next(log: Log) -> None:
    append(log, submitted(), Message("early", "v1", 1.0, b"no event"))
    RolloutFollower(log, GROUP).poll()
    append(log, Message("late", "v1", 1.0, b"no event"))
    RolloutFollower(log, GROUP).poll()
    assert [letter.original.id for letter in letters(log, ROLLOUT)] == ["early", "late"]


def test_groups_keep_dead_letters_of_their_own(log: Log) -> None:
    append(log, POISON)
    for group in ("controller", "guardrails", "learner.rollout"):
        RolloutFollower(log, group).poll()
    assert [letter.group for letter in letters(log, ROLLOUT)] == ["controller", "guardrails", "learner.rollout"]


def test_without_a_group_it_leaves_no_trace_on_the_log(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    append(log, submitted(), POISON, reported("pass"))
    with caplog.at_level(logging.WARNING, "thumbwheel.reader"):
        assert len(RolloutFollower(log).poll()) == 2
    assert f"{ROLLOUT} offset 1 cannot be read" in caplog.text
    assert letters(log, ROLLOUT) == []


@pytest.mark.parametrize("call", ["append", "commit", "read"])
def test_a_log_that_fails_in_the_middle_of_a_poll_costs_no_event(
    log: Log, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    append(log, submitted(), POISON, reported("pass"))
    follower = RolloutFollower(log, GROUP)
    plain = getattr(log, call)

    def fails(*arguments: Any, **named: Any) -> Any:
        if call != "read" or arguments[1] > 0:  # what is after the first batch
            raise LogError("the cluster is away")
        return plain(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(log, call, fails)
        for _ in range(2):
            with pytest.raises(LogError):
                follower.poll()
    assert [event.type for event in follower.poll()] == ["candidate.submitted", "evaluation.reported"]
    assert len(letters(log, ROLLOUT)) == 1
    assert log.committed(GROUP, ROLLOUT) == 3


def test_the_position_is_committed_when_it_moved_and_not_else(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, submitted())
    follower = RolloutFollower(log, GROUP)
    plain, offsets = log.commit, []

    def commit(group: str, topic: str, offset: int, partition: int = 0) -> None:
        offsets.append(offset)
        plain(group, topic, offset, partition)

    monkeypatch.setattr(log, "commit", commit)
    for _ in range(3):
        follower.poll()
    append(log, reported("pass"))
    follower.poll()
    assert offsets == [1, 2]


def test_ids_of_reports_are_forgotten_in_time_and_those_of_decisions_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "REPORTS_KEPT", 3)
    log = SqliteLog(tmp_path / "log.sqlite")
    submission = CandidateSubmitted(
        source="learner", version="v1", digest="d", parent="base", algorithm="kto", learned_from=1, kl_upper=1.0
    )
    log.append(ROLLOUT, [message_of(submission)])
    follower = RolloutFollower(log)
    for number in range(10):
        log.append(ROLLOUT, [message_of(ReplicaReported(source="gateway/r1", replica="r1", serving=f"v{number}"))])
        follower.poll()
    copy = message_of(submission)
    log.append(ROLLOUT, [Message("another-place", copy.key, copy.time, copy.value)])
    assert follower.poll() == []
    assert len(follower._reports) == 3
    log.close()
