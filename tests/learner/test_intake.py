"""What lies on the log is taken in once, whatever it is and wherever the learner dies."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from learner.buffer import Buffer
from learner.intake import GROUP, Intake
from tests import kafka
from tests.learner.conftest import VOCABULARY, respond, vote
from tests.learner.traffic import append, fill
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES, Event, encode
from thumbwheel.log import Log, Message, SqliteLog, message_of
from thumbwheel.log.deadletter import dlq, letters
from thumbwheel.log.kafka.log import KafkaLog

pytestmark = pytest.mark.slow

Made = Callable[[str], Buffer]
TABLES = ("votes", "responses", "answers", "held_out", "pairs")


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


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Open the buffer for a log of this identity; the one before is closed, as a dead process would leave it."""
    opened: list[Buffer] = []

    def made(identity: str) -> Buffer:
        for buffer in opened:
            buffer.close()
        opened.append(Buffer(tmp_path / "buffer.sqlite", VOCABULARY, lambda prompt: prompt == [9], identity))
        return opened[-1]

    yield made
    for buffer in opened:
        buffer.close()


def take_in(log: Log, buffer: Buffer, patience: float = 30.0) -> None:
    """A learner's life: it starts, takes in everything that is there, and leaves."""
    intake = Intake(log, buffer)
    end = time.monotonic() + patience
    try:
        while not whole(log, buffer):
            intake.poll()
            assert time.monotonic() < end, buffer.offsets()
            time.sleep(0.01)
    finally:
        intake.close()


def whole(log: Log, buffer: Buffer) -> bool:
    """Whether the buffer stands at the end of every partition."""
    stands = buffer.offsets()
    return all(
        stands.get((topic, partition), 0) == log.ends(topic, partition)[1]
        for topic in (RESPONSES, FEEDBACK)
        for partition in range(log.partitions(topic))
    )


def contents(buffer: Buffer) -> dict[str, list[Any]]:
    return {table: sorted(map(repr, buffer._db.execute(f"SELECT * FROM {table}"))) for table in TABLES}


def raw(event: Event, **changes: Any) -> Message:
    """An event as a program of another release, or a stranger, would put it there."""
    message = message_of(event)
    value = orjson.dumps({**orjson.loads(encode(event)), **changes})
    return Message(message.id, message.key, message.time, value, message.headers)


def committed(log: Log, topic: str) -> int:
    return sum(log.committed(GROUP, topic, partition) for partition in range(log.partitions(topic)))


class Fails:
    """A log of which one call fails a number of times; the rest is the log's own."""

    def __init__(self, log: Log, times: int) -> None:
        self._log = log
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, topic: str, messages: Any) -> Any:
        if topic.endswith(".dlq") and self.times:
            self.times -= 1
            raise LogError("the cluster is away")
        return self._log.append(topic, messages)


class Deaf:
    """A log whose consumers' commits are lost, as when the process dies before each."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def consumer(self, *arguments: Any) -> Any:
        consumer = self._log.consumer(*arguments)
        consumer.commit = lambda record: None  # type: ignore[method-assign]
        return consumer


def test_it_imports_without_torch() -> None:
    code = "import sys, learner.intake; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_log_is_taken_in_and_its_group_stands_where_the_buffer_does(log: Log, made: Made) -> None:
    fill(log, 700)
    buffer = made(log.identity)
    take_in(log, buffer)
    assert buffer.counts() == {"learned": 0, "ready": 700, "set_aside": 0, "waiting": 0}
    assert (committed(log, RESPONSES), committed(log, FEEDBACK)) == (700, 700)


POISON = {
    "no event": b"no event",
    "empty": b"",
    "another topic's": encode(respond("x")),
    "no column holds it": encode(vote("fx", "x", choice_index=2**70)),
    "newer": encode(vote("fy", "x").model_copy(update={"schema_version": "2.0"})),
}


def test_poison_in_the_middle_of_a_batch_is_kept_aside_and_the_rest_is_taken_in(log: Log, made: Made) -> None:
    votes = [message_of(vote(f"f{i}", "a", user=f"u{i}")) for i in range(6)]
    poison = [Message(name, "a", 1.0, value) for name, value in POISON.items()]
    append(log, respond("a"))
    log.append(FEEDBACK, [*votes[:3], *poison, *votes[3:]])
    labels = {"group": GROUP, "topic": FEEDBACK}
    before = REGISTRY.get_sample_value("thumbwheel_consumer_dead_letters_total", labels) or 0
    buffer = made(log.identity)
    take_in(log, buffer)
    assert buffer.counts()["ready"] == 6
    found = letters(log, FEEDBACK)
    assert [(letter.original.id, letter.original.value) for letter in found] == list(POISON.items())
    assert {(letter.group, letter.topic) for letter in found} == {(GROUP, FEEDBACK)}
    assert "schema version 2.0" in found[-1].why
    assert "does not belong" in found[2].why
    assert REGISTRY.get_sample_value("thumbwheel_consumer_dead_letters_total", labels) == before + len(POISON)
    assert committed(log, FEEDBACK) == 11


def test_a_batch_of_nothing_but_poison_is_passed(log: Log, made: Made) -> None:
    log.append(RESPONSES, [Message("x", "a", 1.0, b"no event")])
    buffer = made(log.identity)
    take_in(log, buffer)
    assert buffer.blank
    assert committed(log, RESPONSES) == 1


def test_a_response_that_admission_chokes_on_is_kept_aside(log: Log, made: Made, tmp_path: Path) -> None:
    def chokes(prompt: list[int]) -> bool:
        return bool(1 / (prompt[0] - 7))

    append(log, respond("a"), respond("b", [7]), respond("c"))
    buffer = Buffer(tmp_path / "b.sqlite", VOCABULARY, chokes, log.identity)
    take_in(log, buffer)
    assert [letter.why for letter in letters(log, RESPONSES)] == ["ZeroDivisionError: division by zero"]
    assert {row[0] for row in buffer._db.execute("SELECT * FROM responses")} == {"a", "c"}
    buffer.close()


def test_a_newer_minor_schema_is_read_and_a_newer_major_one_is_kept_aside(log: Log, made: Made) -> None:
    newer = {"mood": "good", "trace": {"id": [1, 2]}}
    log.append(RESPONSES, [raw(respond("a"), schema_version="1.7", **newer)])
    log.append(
        FEEDBACK, [raw(vote("f1", "a"), schema_version="1.7", **newer), raw(vote("f2", "a"), schema_version="2.0")]
    )
    buffer = made(log.identity)
    take_in(log, buffer)
    assert [example.feedback_id for example in buffer.ready(True, 1e9, 9)] == ["f1"]
    assert buffer.reason("f2") is None
    assert [letter.original.id for letter in letters(log, FEEDBACK)] == ["f2"]


def test_a_kill_between_persist_and_commit_loses_nothing_and_counts_nothing_twice(log: Log, made: Made) -> None:
    fill(log, 60)
    take_in(Deaf(log), made(log.identity))
    assert committed(log, FEEDBACK) == 0
    fill(log, 60, start=60)
    buffer = made(log.identity)
    take_in(log, buffer)
    assert buffer.counts()["ready"] == 120
    assert committed(log, FEEDBACK) == 120


def test_a_kill_between_persist_and_commit_brings_no_pair_again_that_was_learned(log: Log, made: Made) -> None:
    for i in range(4):
        choice = respond("x").choices[0].model_copy(update={"token_ids": [4 + i, 5, 1]})
        append(log, respond(f"r{i}", choices=[choice]), vote(f"f{i}", f"r{i}", "up" if i % 2 else "down"))
    dying = made(log.identity)
    take_in(Deaf(log), dying)
    (pair, _) = dying.pairs(1e9, 9)
    dying.learned(pair.feedback_ids, "v1")
    before = contents(dying)
    dying._db.execute("DELETE FROM offsets")  # all of it comes again
    buffer = made(log.identity)
    take_in(log, buffer)
    assert contents(buffer) == before
    assert buffer.count_pairs(1e9) == 1
    assert not set(pair.feedback_ids) & set(buffer.pairs(1e9, 9)[0].feedback_ids)


def test_a_kill_between_the_dead_letter_and_the_rest_loses_nothing(
    log: Log, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(log, respond("a"), vote("f1", "a"))
    log.append(FEEDBACK, [Message("x", "a", 1.0, b"no event")])
    dying = made(log.identity)
    persist = dying.consume

    def dies(entries: Any, last: Any) -> None:
        if last.topic == FEEDBACK:
            raise KeyboardInterrupt
        persist(entries, last)

    monkeypatch.setattr(dying, "consume", dies)
    with pytest.raises(KeyboardInterrupt):
        take_in(log, dying)
    assert len(letters(log, FEEDBACK)) == 1
    buffer = made(log.identity)
    take_in(log, buffer)
    assert len(letters(log, FEEDBACK)) == 1
    assert buffer.counts()["ready"] == 1


def test_a_batch_that_comes_again_changes_nothing(log: Log, made: Made) -> None:
    fill(log, 60)
    buffer = made(log.identity)
    take_in(log, buffer)
    buffer.learned(["f3", "f6"], "v1")
    before = contents(buffer)
    buffer._db.execute("DELETE FROM offsets")
    take_in(log, buffer)
    assert contents(buffer) == before


def test_a_log_that_does_not_take_a_dead_letter_is_waited_for_and_the_batch_is_not_lost(log: Log, made: Made) -> None:
    append(log, respond("a"))
    poison = [Message(f"x{i}", "a", 1.0, b"no event") for i in range(2)]
    log.append(FEEDBACK, [poison[0], message_of(vote("f1", "a")), poison[1], message_of(vote("f2", "a", user="u2"))])
    buffer = made(log.identity)
    failing = Fails(log, times=3)
    intake = Intake(failing, buffer)
    failures = 0
    end = time.monotonic() + 30
    while not whole(log, buffer):
        assert time.monotonic() < end
        try:
            intake.poll()
        except LogError:
            failures += 1
            assert buffer.counts()["ready"] == 0, "nothing of the batch may land before its dead letters"
        time.sleep(0.01)
    intake.close()
    assert failures == 3
    assert buffer.counts()["ready"] == 2
    assert [letter.original.id for letter in letters(log, FEEDBACK)] == ["x0", "x1"]
    assert committed(log, FEEDBACK) == 4


def test_a_buffer_that_cannot_be_written_for_the_moment_is_tried_again(
    log: Log, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(log, respond("a"), vote("f1", "a"))
    buffer = made(log.identity)
    intake = Intake(log, buffer)
    persist, failures = buffer.consume, [LogError("the disk is full")] * 2

    def consume(entries: Any, last: Any) -> None:
        if failures:
            raise failures.pop()
        persist(entries, last)

    monkeypatch.setattr(buffer, "consume", consume)
    end = time.monotonic() + 30
    raised = 0
    while not whole(log, buffer):
        assert time.monotonic() < end
        try:
            intake.poll()
        except LogError:
            raised += 1
        time.sleep(0.01)
    intake.close()
    assert raised == 2
    assert buffer.counts()["ready"] == 1


def test_a_lost_buffer_is_filled_again_though_its_group_had_read_it_all(log: Log, made: Made, tmp_path: Path) -> None:
    fill(log, 30)
    take_in(log, made(log.identity))
    assert committed(log, FEEDBACK) == 30
    other = Buffer(tmp_path / "other.sqlite", VOCABULARY, lambda prompt: False, log.identity)
    take_in(log, other)
    assert other.counts()["ready"] == 30
    other.close()


def test_one_poll_has_an_end_however_long_the_log_is(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    fill(log, 1200)
    monkeypatch.setattr("learner.intake.AT_ONCE", 600)
    buffer = made(log.identity)
    intake = Intake(log, buffer)
    assert intake.poll()
    assert buffer.offsets() == {(RESPONSES, 0): 1000}
    while intake.poll():
        pass
    assert whole(log, buffer)
    intake.close()
    log.close()


def moved(old: Log, new: Log, made: Made) -> Buffer:
    """Learn on one log, then go on on another that holds the same events, and some more."""
    fill(old, 40)
    buffer = made(old.identity)
    take_in(old, buffer)
    buffer.learned(["f0", "f7"], "v1")
    before = contents(buffer)
    new.append(FEEDBACK, [message_of(vote("g1", "r0", "down", time=1e6)), message_of(vote("g2", "r7", user="u2"))])
    for topic in (FEEDBACK, RESPONSES):  # the other way round
        new.append(topic, [record.message for record in old.read(topic, 0)])
    buffer = made(new.identity)
    assert buffer.offsets() == {}
    take_in(new, buffer)
    after = contents(buffer)
    assert set(before["votes"]) <= set(after["votes"])
    assert {table: after[table] for table in TABLES[1:]} == {table: before[table] for table in TABLES[1:]}
    return buffer


def test_on_another_log_what_was_learned_stays_learned_and_nothing_counts_twice(tmp_path: Path, made: Made) -> None:
    old, new = SqliteLog(tmp_path / "a.sqlite"), SqliteLog(tmp_path / "b.sqlite")
    buffer = moved(old, new, made)
    assert buffer.counts() == {"learned": 2, "ready": 39, "set_aside": 1, "waiting": 0}
    assert (buffer.reason("g1") or ("", ""))[0] == "set_aside"
    back = made(old.identity)
    assert back.offsets() == {(RESPONSES, 0): 40, (FEEDBACK, 0): 40}, "the old log is not forgotten"
    old.close()
    new.close()


@pytest.mark.kafka
def test_from_one_machine_to_kafka_nothing_counts_twice(tmp_path: Path, kafka_address: str, made: Made) -> None:
    old, new = SqliteLog(tmp_path / "a.sqlite"), KafkaLog(kafka.on(kafka_address, tmp_path))
    buffer = moved(old, new, made)
    assert buffer.counts() == {"learned": 2, "ready": 39, "set_aside": 1, "waiting": 0}
    old.close()
    new.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a", "f1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
NUMBERS = st.integers(-(2**80), 2**80) | st.sampled_from([float("inf"), float("nan"), 1e308, -1])
FIELDS = {"time": NUMBERS, "choice_index": NUMBERS, "prompt_token_ids": st.lists(st.lists(NUMBERS, max_size=2))}
MUTATIONS = st.dictionaries(
    st.sampled_from(["id", "response_id", "user", "rating", "retracted", "choices", "schema_version", "type"]), JSON
)


@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mutations=st.lists(MUTATIONS, max_size=5),
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    junk=st.lists(st.binary(max_size=20), max_size=3),
)
def test_whatever_lies_on_the_log_is_got_past(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[dict[str, Any]], fields: dict[str, Any], junk: list[bytes]
) -> None:
    place = tmp_path_factory.mktemp("log")
    log = SqliteLog(place / "log.sqlite")
    plain = [respond("a"), vote("f1", "a")]
    values = [
        json.dumps({**event.model_dump(), **changes}).encode()
        for event in plain
        for changes in ({}, fields, *mutations, *({**fields, **mutation} for mutation in mutations))
    ]
    for topic in (RESPONSES, FEEDBACK):
        log.append(topic, [Message(str(i), "a", 1.0, value) for i, value in enumerate([*values, *junk])])
    log.append(FEEDBACK, [message_of(vote("last", "b"))])
    buffer = Buffer(place / "buffer.sqlite", VOCABULARY, lambda prompt: prompt == [9], log.identity)
    take_in(log, buffer)
    assert buffer.reason("last") == ("waiting", None)
    assert log.ends(dlq(FEEDBACK))[1] == len(letters(log, FEEDBACK))
    buffer.close()
    log.close()
