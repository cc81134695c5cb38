"""Dead letters on both logs."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import kafka
from tests.thumbwheel.samples import put, vote
from thumbwheel.events import FEEDBACK, ROLLOUT, decode
from thumbwheel.log import Log, Message, Record, open_log
from thumbwheel.log.deadletter import dlq, letters, replay, send
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings

POISON = Message(
    "p1", "r9", 12.5, b'\x00\xff{"type": \xc3', (("ce_type", b"odd"), ("dlq", b"not ours"), ("b", b"\xff"))
)


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    if request.param == "kafka":
        settings = kafka.on(request.getfixturevalue("kafka_address"), tmp_path)
    else:
        settings = Settings(data=tmp_path)
    made = open_log(settings)
    yield made
    made.close()


def everything(log: Log, topic: str) -> list[Record]:
    return [one for partition in range(log.partitions(topic)) for one in read_all(log, topic, 0, partition)]


def poison(log: Log, message: Message = POISON) -> Record:
    """The record of a message that is put onto the log."""
    log.append(FEEDBACK, [message])
    return next(record for record in everything(log, FEEDBACK) if record.message.id == message.id)


def test_a_letter_keeps_the_record_byte_for_byte_with_why_and_where(log: Log) -> None:
    put(log, vote("other"))
    record = poison(log)
    send(log, record, "learner", ValueError("no JSON ✗"))
    (letter,) = letters(log, FEEDBACK)
    assert letter.original == POISON
    assert (letter.topic, letter.partition, letter.offset) == (FEEDBACK, record.partition, record.offset)
    assert (letter.group, letter.why, letter.replayed) == ("learner", "ValueError: no JSON ✗", False)
    assert letters(log, ROLLOUT) == []


def test_a_record_that_is_met_twice_makes_one_letter_and_another_group_makes_another(log: Log) -> None:
    record = poison(log)
    for group in ("learner", "learner", "guardrails"):
        send(log, record, group, ValueError("no"))
    assert [letter.group for letter in letters(log, FEEDBACK)] == ["learner", "guardrails"]


def test_a_long_reason_is_cut(log: Log) -> None:
    send(log, poison(log), "learner", ValueError("x" * 1_000_000))
    assert len(letters(log, FEEDBACK)[0].why) == 1000


def test_a_replay_sends_the_original_and_notes_it(log: Log) -> None:
    send(log, poison(log), "learner", ValueError("no"))
    (letter,) = letters(log, FEEDBACK)
    replay(log, letter)
    sent = [one.message for one in everything(log, FEEDBACK) if one.message.id != POISON.id]
    assert [(one.key, one.time, one.value, one.headers) for one in sent] == [
        (POISON.key, POISON.time, POISON.value, POISON.headers)
    ]
    (after,) = letters(log, FEEDBACK)
    assert after.replayed
    assert after.original == POISON


def test_a_second_replay_is_sent_too(log: Log) -> None:
    """A log that drops copies by the id must not take it for the first."""
    send(log, poison(log), "learner", ValueError("no"))
    for count in (2, 3):
        replay(log, letters(log, FEEDBACK)[0])
        assert len(everything(log, FEEDBACK)) == count
    assert len(letters(log, FEEDBACK)) == 1


def test_a_replayed_record_that_still_cannot_be_read_is_a_letter_of_its_own(log: Log) -> None:
    send(log, poison(log), "learner", ValueError("no"))
    replay(log, letters(log, FEEDBACK)[0])
    again = next(one for one in everything(log, FEEDBACK) if one.message.id != POISON.id)
    send(log, again, "learner", ValueError("still no"))
    assert [letter.replayed for letter in letters(log, FEEDBACK)] == [True, False]


def test_a_replayed_event_carries_its_own_id_so_that_it_is_not_counted_twice(log: Log) -> None:
    event = vote()
    put(log, event)
    record = everything(log, FEEDBACK)[0]
    send(log, record, "learner", ValueError("no"))
    replay(log, letters(log, FEEDBACK)[0])
    assert {decode(one.message.value).id for one in everything(log, FEEDBACK)} == {event.id}


def test_what_is_no_letter_is_left_out_and_said(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    send(log, poison(log), "learner", ValueError("no"))
    whole = everything(log, dlq(FEEDBACK))[0].message
    spoiled = tuple((name, b"many" if name == "dlq_offset" else content) for name, content in whole.headers)
    other = tuple((name, b"x" if name == "dlq_id" else content) for name, content in spoiled)
    strange = [Message("s1", "k", 1.0, b"by hand"), Message("s2", "k", 1.0, whole.value, other)]
    log.append(dlq(FEEDBACK), strange)
    with caplog.at_level(logging.WARNING):
        assert [letter.group for letter in letters(log, FEEDBACK)] == ["learner"]
    assert [f"offset {offset} is no dead letter" in caplog.text for offset in (1, 2)] == [True, True]


def follow(log: Log, until: int) -> list[str]:
    """The keys of what a member of the group is given, up to so many; what it cannot read becomes a letter."""
    consumer = log.consumer("learner", [FEEDBACK])
    given: list[str] = []
    deadline = time.monotonic() + 30
    while len(given) < until and time.monotonic() < deadline:
        for record in consumer.poll():
            given.append(record.message.key)
            try:
                decode(record.message.value)
            except ValueError as error:
                send(log, record, "learner", error)
            consumer.commit(record)
        time.sleep(0.02)
    consumer.close()
    return given


def test_a_consumer_goes_on_behind_a_record_that_it_cannot_read(log: Log) -> None:
    poison(log)
    put(log, vote(POISON.key))  # of the same key, so behind it
    assert follow(log, until=2) == [POISON.key, POISON.key]
    put(log, vote("later"))
    assert follow(log, until=1) == ["later"]
    assert [letter.original for letter in letters(log, FEEDBACK)] == [POISON]
