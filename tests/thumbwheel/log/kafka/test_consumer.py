"""A member keeps what it has while its owner thinks, hands on what it leaves, and loses nothing in between."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from tests import kafka
from thumbwheel.demo.broker import Cluster
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, ROLLOUT
from thumbwheel.log import Message, Record, Start
from thumbwheel.log.kafka import consumer as module
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.consumer import BATCH, HELD_BATCHES, KafkaGroupConsumer, lag
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.settings import Settings

pytestmark = pytest.mark.kafka

GROUP = "learner"


class Watched(KafkaGroupConsumer):
    """Notes what it got and gave up."""

    def __init__(self, settings: Settings, topic: str = FEEDBACK, start: Start | None = None) -> None:
        self.history: list[tuple[str, set[int]]] = []
        super().__init__(Connection(settings), GROUP, [topic], start)

    def _assigned(self, consumer: KafkaConsumer, places: Sequence[TopicPartition]) -> None:
        super()._assigned(consumer, places)
        self.history.append(("got", {place.partition for place in places}))

    def _revoked(self, places: Sequence[TopicPartition], leaving: bool) -> None:
        super()._revoked(places, leaving)
        self.history.append(("left" if leaving else "gave up", {place.partition for place in places}))

    @property
    def partitions(self) -> set[int]:
        return {place.partition for place in self._ours}


@pytest.fixture
def settings(mortal: Cluster, tmp_path: Path) -> Settings:
    # Beside a busy engine a member with a session of 4 s was twice out of its group, and did not know it yet.
    return kafka.on(mortal.bootstrap, tmp_path, session_timeout_s=10.0, timeout_s=5.0)


@pytest.fixture
def log(settings: Settings) -> Iterator[KafkaLog]:
    made = KafkaLog(settings)
    yield made
    made.close()


def member(settings: Settings, name: str, **changes: Any) -> Settings:
    """The same settings for another process."""
    values = settings.log.kafka.model_copy(update={"member": name, **changes})
    return Settings(data=settings.data, log=settings.log.model_copy(update={"kafka": values}))


def message(id: str, key: str = "k") -> Message:
    return Message(id, key, 1.5, id.encode())


def ids(records: Sequence[Record]) -> list[str]:
    return [record.message.id for record in records]


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def taken(count: int, *consumers: KafkaGroupConsumer) -> list[Record]:
    """What comes until `count` records are there, and whatever comes with the last."""
    found: list[Record] = []

    def enough() -> bool:
        for consumer in consumers:
            found.extend(consumer.poll())
        return len(found) >= count

    until(enough)
    return found + [record for consumer in consumers for record in consumer.poll()]


def members(settings: Settings) -> dict[str, str]:
    """The group's members: the name of each, and the id that it got when it came."""
    admin = Connection(settings).admin()
    name = Connection(settings).name(GROUP)
    described = admin.describe_groups([name])[name]
    admin.close()
    return {one["group_instance_id"]: one["member_id"] for one in described["members"]}


def test_an_owner_that_thinks_too_long_keeps_its_partitions(
    settings: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_POLL_INTERVAL_MS", 2000)
    consumer = Watched(settings)
    log.append(FEEDBACK, [message(str(i), f"k{i}") for i in range(20)])
    before = taken(20, consumer)
    who = members(settings)
    time.sleep(4.0)
    log.append(FEEDBACK, [message(str(i), f"k{i}") for i in range(20, 40)])
    after = taken(20, consumer)
    assert sorted(map(int, ids(before + after))) == list(range(40))
    assert consumer.history == [("got", {0, 1, 2})]
    assert members(settings) == who
    consumer.close()


def test_an_owner_that_never_polls_leaves_a_bounded_number_in_memory(settings: Settings, log: KafkaLog) -> None:
    count = (HELD_BATCHES + 3) * BATCH
    for start in range(0, count, 100):
        log.append(FEEDBACK, [message(str(i), f"k{i % 100}") for i in range(start, start + 100)])
    consumer = Watched(settings)
    gauges = [lag.labels(GROUP, FEEDBACK, partition) for partition in range(3)]
    until(lambda: sum(len(records) for _, records in consumer._held) > (HELD_BATCHES - 1) * BATCH)
    for _ in range(20):
        assert sum(len(records) for _, records in consumer._held) <= HELD_BATCHES * BATCH
        time.sleep(0.05)
    found = taken(count, consumer)
    assert sorted(map(int, ids(found))) == list(range(count))
    for partition in range(3):
        offsets = [record.offset for record in found if record.partition == partition]
        assert offsets == list(range(len(offsets)))
    assert [gauge._value.get() for gauge in gauges] == [0, 0, 0]
    consumer.close()


def test_a_restart_within_the_session_moves_nothing(settings: Settings, log: KafkaLog) -> None:
    first, other = Watched(settings), Watched(member(settings, "m2"))
    until(lambda: first.partitions and other.partitions and len(first.partitions | other.partitions) == 3)
    until(lambda: not first.partitions & other.partitions)
    mine, theirs, history = first.partitions, other.partitions, list(other.history)
    first.close()
    again = Watched(settings)
    start = time.monotonic()
    until(lambda: again.partitions)
    assert time.monotonic() - start < 1.5
    time.sleep(0.5)
    assert again.partitions == mine
    assert other.partitions == theirs
    assert other.history == history
    log.append(FEEDBACK, [message(str(i), f"k{i}") for i in range(20)])
    assert len(taken(20, again, other)) == 20
    again.close()
    other.close()


def dealt_with(log: KafkaLog, partition: int) -> bool:
    return log.committed(GROUP, FEEDBACK, partition) == log.ends(FEEDBACK, partition)[1]


CHILD = """
import json, sys, time
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.settings import Settings

consumer = KafkaLog(Settings.model_validate_json(sys.argv[1])).consumer("learner", ["llm.feedback.submitted.v1"])
while True:
    for record in consumer.poll():
        consumer.commit(record)
        print(json.dumps([record.partition, record.offset, record.message.id]), flush=True)
    time.sleep(0.01)
"""


def test_what_a_killed_member_had_goes_to_the_other_and_nothing_is_lost_or_given_again(
    settings: Settings, log: KafkaLog
) -> None:
    settings = member(settings, "m1", session_timeout_s=8.0)
    start = {(FEEDBACK, partition): 0 for partition in range(3)}
    consumer = Watched(settings, start=start)
    until(lambda: consumer.partitions == {0, 1, 2})
    values = member(settings, "m2").model_dump_json()
    child = subprocess.Popen([sys.executable, "-c", CHILD, values], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        until(lambda: len(consumer.partitions) < 3)
        kept = set(consumer.partitions)
        moved = {0, 1, 2} - kept
        assert consumer.history == [("got", {0, 1, 2}), ("gave up", moved)]  # what stays was never given up
        log.append(FEEDBACK, [message(str(i), f"k{i}") for i in range(100)])
        expected = sum(log.ends(FEEDBACK, partition)[1] for partition in moved)
        theirs = [json.loads(child.stdout.readline()) for _ in range(expected)]
        mine = taken(100 - expected, consumer)
        assert sorted([int(id) for _, _, id in theirs] + [int(id) for id in ids(mine)]) == list(range(100))
        assert {partition for partition, _, _ in theirs} == moved
        for place in moved:
            until(partial(dealt_with, log, place))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    killed = time.monotonic()
    log.append(FEEDBACK, [message(str(i), f"k{i}") for i in range(100, 200)])
    found = taken(100, consumer)
    assert 1.0 < time.monotonic() - killed < 16.0
    assert sorted(map(int, ids(found))) == list(range(100, 200))  # and none of those that the other had dealt with
    assert consumer.partitions == {0, 1, 2}
    assert consumer.history[2:] == [("got", moved)]
    consumer.close()


def test_the_older_of_two_members_of_one_name_is_told_so_and_stays_away(settings: Settings, log: KafkaLog) -> None:
    older = Watched(settings)
    until(lambda: older.partitions)
    newer = Watched(settings)
    until(lambda: newer.partitions)
    with pytest.raises(LogError, match=r"\[log.kafka\] member.*another process has taken over as member m1"):
        until(lambda: older.poll())
    time.sleep(1.0)
    with pytest.raises(LogError, match="another process"):
        older.poll()
    log.append(FEEDBACK, [message(str(i), f"k{i}") for i in range(20)])
    assert len(taken(20, newer)) == 20
    assert newer.history == [("got", {0, 1, 2})]
    older.close()
    newer.close()


def test_the_group_stands_where_the_store_of_its_member_does(settings: Settings, log: KafkaLog) -> None:
    log.append(ROLLOUT, [message(str(i)) for i in range(10)])
    log.commit(GROUP, ROLLOUT, 9)
    consumer = Watched(settings, ROLLOUT, {(ROLLOUT, 0): 4})
    assert ids(taken(6, consumer)) == ["4", "5", "6", "7", "8", "9"]
    until(lambda: log.committed(GROUP, ROLLOUT) == 4)
    consumer.close()


def test_a_broker_that_dies_in_the_middle_is_told_of_and_nothing_is_lost(mortal: Cluster, tmp_path: Path) -> None:
    settings = kafka.on(mortal.bootstrap, tmp_path, session_timeout_s=2.0, timeout_s=1.5)
    log = KafkaLog(settings)
    consumer = Watched(settings, ROLLOUT)
    log.append(ROLLOUT, [message(str(i)) for i in range(50)])
    before = taken(50, consumer)
    broker = mortal.brokers[0]
    broker.signal(signal.SIGKILL)
    consumer.commit(before[-1])  # while nobody is there to take it
    with pytest.raises(LogError, match=r"\[log.kafka\] bootstrap"):
        until(lambda: consumer.poll(), 3 * settings.log.kafka.timeout_s)
    broker.start()
    mortal.until_ready()
    log.append(ROLLOUT, [message(str(i)) for i in range(50, 100)])
    found: list[Record] = []
    deadline = time.monotonic() + 30
    while len(found) < 50 and time.monotonic() < deadline:
        with contextlib.suppress(LogError):
            found += consumer.poll()
        time.sleep(0.05)
    assert ids(found) == [str(i) for i in range(50, 100)]
    consumer.commit(found[-1])
    consumer.close()
    assert log.committed(GROUP, ROLLOUT) == 100
    log.close()
