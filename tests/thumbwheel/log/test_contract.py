"""What every log keeps, whatever it is made of."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import kafka
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT
from thumbwheel.log import Consumer, Log, Message, Record, open_log
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings

ACCENTS = "Ünïcødé 寿司 🍣"


def message(id: str, key: str = "k", value: bytes = b"{}", time: float = 1.5) -> Message:
    return Message(id, key, time, value)


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A log of each kind, with nothing on it."""
    if request.param == "sqlite":
        return Settings(data=tmp_path)
    return kafka.on(request.getfixturevalue("kafka_address"), tmp_path)


@pytest.fixture
def log(settings: Settings) -> Iterator[Log]:
    made = open_log(settings)
    yield made
    made.close()


def everything(log: Log, topic: str = FEEDBACK) -> list[Record]:
    """All of a topic, partition by partition."""
    return [record for partition in range(log.partitions(topic)) for record in read_all(log, topic, 0, partition)]


def ids(records: Sequence[Record]) -> list[str]:
    return [record.message.id for record in records]


def taken(consumer: Consumer, count: int, limit: int = 500, timeout_s: float = 20.0) -> list[Record]:
    """Polls until `count` records came, and a little longer, to see that no more do."""
    found: list[Record] = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        batch = consumer.poll(limit)
        assert len(batch) <= limit
        found += batch
        if len(found) >= count and not batch:
            return found
        if not batch:
            time.sleep(0.05)
    raise AssertionError(f"{len(found)} of {count} records came within {timeout_s} s")


def test_an_empty_topic_has_equal_ends_and_nothing_to_read(log: Log) -> None:
    for partition in range(log.partitions(FEEDBACK)):
        assert log.ends(FEEDBACK, partition) == (0, 0)
        assert log.read(FEEDBACK, 0, partition=partition) == []
        assert log.offset_at(FEEDBACK, 0.0, partition) == 0


def test_records_come_back_whole_and_each_key_in_order(log: Log) -> None:
    sent = [message(f"{ACCENTS}-{i}", f"{ACCENTS}-{i % 7}", f"wert {i} ✓".encode(), 1.7e9 + i / 7) for i in range(700)]
    appended = log.append(FEEDBACK, sent[:400]) + log.append(FEEDBACK, sent[400:])
    records = everything(log)
    assert sorted((record.message for record in records), key=lambda one: one.time) == sent
    for key in {one.key for one in sent}:
        mine = [record for record in records if record.message.key == key]
        assert [record.message for record in mine] == [one for one in sent if one.key == key]
        assert len({record.partition for record in mine}) == 1
    for partition in range(log.partitions(FEEDBACK)):
        offsets = [record.offset for record in records if record.partition == partition]
        assert offsets == list(range(len(offsets)))
        assert log.ends(FEEDBACK, partition) == (0, len(offsets))
    where = {record.message.id: record.offset for record in records}
    assert [where[one.id] for one in sent] == [place.offset for place in appended]
    assert not any(place.duplicate for place in appended)


@pytest.mark.parametrize(
    "odd",
    [
        Message("empty", "k", 1.5, b""),
        Message("no key", "", 1.5, b"{}"),
        Message("key of other bytes", b"\xff\xfe\x00k".decode(errors="surrogateescape"), 1.5, b"{}"),
        Message("zeros", "a\0b", 1.5, bytes(range(256))),
        Message("time", "k", 1753000000.1234567, b"{}"),
        Message("at the beginning", "k", 0.0, b"{}"),
        Message(
            "headers", "k", 1.5, b"{}", (("ce_type", b"a.b"), ("x", bytes(range(256))), ("x", b""), (ACCENTS, b"1"))
        ),
    ],
    ids=lambda one: one.id,
)
def test_odd_messages_come_back_byte_for_byte(log: Log, odd: Message) -> None:
    log.append(FEEDBACK, [odd])
    assert [record.message for record in everything(log)] == [odd]


@pytest.mark.parametrize("megabytes", [1, 8])
def test_megabytes_come_back_whole(log: Log, megabytes: int) -> None:
    value = bytes(range(256)) * 4096 * megabytes
    log.append(FEEDBACK, [message("small"), message("big", value=value), message("after")])
    assert [record.message.value for record in everything(log)] == [b"{}", value, b"{}"]
    consumer = log.consumer("learner", [FEEDBACK])
    assert [len(record.message.value) for record in taken(consumer, 3)] == [2, len(value), 2]
    consumer.close()


def test_nothing_is_appended_by_appending_nothing(log: Log) -> None:
    assert log.append(FEEDBACK, []) == []
    assert everything(log) == []


def test_a_reader_that_keeps_ids_sees_one_of_two_copies(log: Log) -> None:
    log.append(FEEDBACK, [message("a", value=b"1"), message("b")])
    log.append(FEEDBACK, [message("a", value=b"1"), message("c")])
    assert list(dict.fromkeys(ids(everything(log)))) == ["a", "b", "c"]


def test_one_id_may_stand_on_two_topics(log: Log) -> None:
    log.append(FEEDBACK, [message("a")])
    assert not log.append(ROLLOUT, [message("a")])[0].duplicate
    assert ids(everything(log, ROLLOUT)) == ["a"]


def test_equal_keys_lie_in_equal_partitions_of_responses_and_feedback(log: Log) -> None:
    keys = [f"resp_{i}" for i in range(40)]
    for topic in (RESPONSES, FEEDBACK):
        log.append(topic, [message(f"{topic}{key}", key) for key in keys])
    places = [{one.message.key: one.partition for one in everything(log, topic)} for topic in (RESPONSES, FEEDBACK)]
    assert places[0] == places[1]
    assert set(places[0].values()) == set(range(log.partitions(RESPONSES)))


def test_a_limit_bounds_what_one_read_returns(log: Log) -> None:
    log.append(ROLLOUT, [message(str(i)) for i in range(10)])
    assert [record.offset for record in log.read(ROLLOUT, 4, limit=3)] == [4, 5, 6]
    assert [record.offset for record in log.read(ROLLOUT, 9, limit=3)] == [9]
    assert log.read(ROLLOUT, 10, limit=3) == []
    assert log.read(ROLLOUT, 99) == []
    assert [record.offset for record in log.read(ROLLOUT, 2, limit=1)] == [2]


def test_what_comes_after_a_read_is_there_for_the_next(log: Log) -> None:
    for i in range(5):
        log.append(ROLLOUT, [message(str(i))])
        assert ids(log.read(ROLLOUT, i)) == [str(i)]
        assert log.read(ROLLOUT, i + 1) == []


def test_reading_begins_at_a_time(log: Log) -> None:
    log.append(ROLLOUT, [message(str(i), time=1000.0 + i * 0.5) for i in range(8)])
    assert log.offset_at(ROLLOUT, 0.0) == 0
    assert log.offset_at(ROLLOUT, 1000.0) == 0
    assert log.offset_at(ROLLOUT, 1001.25) == 3
    assert log.offset_at(ROLLOUT, 1001.5) == 3
    assert log.offset_at(ROLLOUT, 1003.6) == 8


@pytest.mark.parametrize("wrong", [-1, 3, 99])
def test_a_partition_that_is_not_there_is_an_error(log: Log, wrong: int) -> None:
    with pytest.raises(LogError, match=str(wrong)):
        log.read(FEEDBACK, 0, partition=wrong)
    with pytest.raises(LogError, match=str(wrong)):
        log.ends(FEEDBACK, wrong)
    with pytest.raises(LogError, match=str(wrong)):
        log.offset_at(FEEDBACK, 1.0, wrong)


def test_a_group_reads_on_where_it_committed(log: Log) -> None:
    log.append(ROLLOUT, [message(str(i)) for i in range(5)])
    assert log.committed("learner", ROLLOUT) == 0
    log.commit("learner", ROLLOUT, 3)
    assert log.committed("learner", ROLLOUT) == 3
    assert log.committed("other", ROLLOUT) == 0
    assert log.committed("learner", FEEDBACK) == 0
    assert ids(log.read(ROLLOUT, log.committed("learner", ROLLOUT))) == ["3", "4"]
    log.commit("learner", ROLLOUT, 1)
    assert log.committed("learner", ROLLOUT) == 1


def test_a_consumer_that_was_there_first_gets_what_comes(log: Log) -> None:
    consumer = log.consumer("learner", [RESPONSES, FEEDBACK])
    assert consumer.poll() == []
    for i in range(3):
        log.append(RESPONSES, [message(f"r{i}", f"k{i}")])
        log.append(FEEDBACK, [message(f"f{i}", f"k{i}")])
    records = taken(consumer, 6)
    assert sorted((record.topic, record.message.id) for record in records) == sorted(
        [(RESPONSES, f"r{i}") for i in range(3)] + [(FEEDBACK, f"f{i}") for i in range(3)]
    )
    consumer.close()


def test_a_consumer_goes_on_behind_what_its_group_committed(log: Log) -> None:
    log.append(ROLLOUT, [message(str(i)) for i in range(10)])
    first = log.consumer("learner", [ROLLOUT])
    records = taken(first, 10, limit=4)
    assert ids(records) == [str(i) for i in range(10)]
    first.commit(records[6])
    first.close()
    assert log.committed("learner", ROLLOUT) == 7
    second = log.consumer("learner", [ROLLOUT])
    assert ids(taken(second, 3)) == ["7", "8", "9"]
    second.close()
    other = log.consumer("guardrails", [ROLLOUT])
    assert ids(taken(other, 10)) == [str(i) for i in range(10)]
    other.close()


def test_the_store_of_a_consumer_knows_better_than_its_group(log: Log) -> None:
    log.append(ROLLOUT, [message(str(i)) for i in range(10)])
    log.commit("learner", ROLLOUT, 8)
    consumer = log.consumer("learner", [ROLLOUT], {(ROLLOUT, 0): 5})
    assert ids(taken(consumer, 5)) == ["5", "6", "7", "8", "9"]
    consumer.close()


def test_what_was_not_committed_comes_again(log: Log) -> None:
    log.append(ROLLOUT, [message(str(i)) for i in range(3)])
    for _ in range(2):
        consumer = log.consumer("learner", [ROLLOUT])
        assert ids(taken(consumer, 3)) == ["0", "1", "2"]
        consumer.close()


def _append_many(settings: Settings, name: str) -> None:
    log = open_log(settings)
    for i in range(50):
        log.append(FEEDBACK, [message(f"{name}-{i}", key=name, value=str(i).encode())])
    log.close()


@pytest.mark.slow
def test_several_processes_append_at_once_without_loss_and_in_order_per_key(settings: Settings, log: Log) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(settings, f"w{i}")) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    records = everything(log)
    assert len(records) == 150
    for name in ("w0", "w1", "w2"):
        assert [int(record.message.value) for record in records if record.message.key == name] == list(range(50))


def test_what_was_appended_is_there_after_the_log_is_opened_again(settings: Settings) -> None:
    first = open_log(settings)
    first.append(FEEDBACK, [message("a")])
    identity = first.identity
    first.close()
    second = open_log(settings)
    assert ids(everything(second)) == ["a"]
    assert second.identity == identity
    second.close()


def test_two_logs_have_two_identities(log: Log, settings: Settings, tmp_path: Path) -> None:
    kind = settings.log.model_copy(
        update={"path": Path("other.sqlite"), "kafka": settings.log.kafka.model_copy(update={"prefix": "other."})}
    )
    other = open_log(Settings(data=tmp_path, log=kind))
    assert other.identity != log.identity
    other.close()
