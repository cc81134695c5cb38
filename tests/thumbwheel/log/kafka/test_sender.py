"""What was acknowledged is there and each key keeps its order, whatever becomes of the broker in the middle."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from tests import kafka
from thumbwheel.demo.broker import Cluster
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, ROLLOUT
from thumbwheel.log import Message
from thumbwheel.log.kafka import sender as module
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.kafka.sender import Item, Sender, Undeliverable, _waves
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings

pytestmark = pytest.mark.kafka


@pytest.fixture
def settings(kafka_address: str, tmp_path: Path) -> Settings:
    return kafka.on(kafka_address, tmp_path)


@pytest.fixture
def sender(settings: Settings) -> Iterator[Sender]:
    made = Sender(Connection(settings))
    yield made
    made.close()


def message(id: str, key: str = "k", value: bytes = b"{}", time: float = 1.5) -> Message:
    return Message(id, key, time, value)


def everything(settings: Settings, topic: str = FEEDBACK) -> list[Message]:
    log = KafkaLog(settings)
    found = [one.message for at in range(log.partitions(topic)) for one in read_all(log, topic, 0, at)]
    log.close()
    return found


def limit(settings: Settings, topic: str, **configs: str) -> None:
    admin = Connection(settings).admin()
    values = {name.replace("_", "."): value for name, value in configs.items()}
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, Connection(settings).name(topic), values)])
    admin.close()
    time.sleep(0.3)


def test_a_wave_holds_each_key_once_and_no_more_bytes_than_may_be_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_FLIGHT_BYTES", 100)
    items = [(FEEDBACK if i % 2 else ROLLOUT, message(str(i), f"k{i % 5}", bytes(i % 70))) for i in range(200)]
    waves = list(_waves(items))
    assert [item for wave in waves for item in wave] == items
    for wave in waves:
        assert len({(topic, one.key) for topic, one in wave}) == len(wave)
        assert len(wave) == 1 or sum(len(one.value) for _, one in wave) <= 100
    assert list(_waves([])) == []
    assert len(list(_waves([(ROLLOUT, message("big", value=bytes(1000)))]))) == 1


def test_the_producer_is_idempotent_and_waits_for_every_replica(sender: Sender) -> None:
    assert sender.send([(ROLLOUT, message("a"))]) == [0]
    producer = sender._producer
    assert producer is not None
    assert producer.config["enable_idempotence"] is True
    assert producer.config["acks"] == -1
    assert producer.config["retries"] == float("inf")
    assert producer._transaction_manager.has_producer_id()


def test_never_are_two_of_a_key_on_their_way(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    sender.send([(ROLLOUT, message("first"))])
    producer = sender._producer
    assert producer is not None
    on_their_way: dict[bytes, int] = {}
    worst = 0
    send = producer.send

    def watched(topic: str, key: bytes, **rest: object) -> object:
        nonlocal worst
        on_their_way[key] = on_their_way.get(key, 0) + 1
        worst = max(worst, on_their_way[key])
        future = send(topic, key=key, **rest)
        future.add_both(lambda _: on_their_way.__setitem__(key, on_their_way[key] - 1))
        return future

    monkeypatch.setattr(producer, "send", watched)
    sender.send([(FEEDBACK, message(str(i), f"k{i % 4}")) for i in range(60)])
    assert worst == 1


def test_a_message_that_is_too_large_is_named_and_the_rest_can_be_sent(settings: Settings, sender: Sender) -> None:
    limit(settings, FEEDBACK, max_message_bytes="20000")
    # Of one partition, they travel together: the batch is too large also without the one that never fits.
    items: list[Item] = [(FEEDBACK, message(str(i), f"k{i}", bytes(3000))) for i in range(60)]
    items[33] = (FEEDBACK, message("too large", "k33", bytes(30_000)))
    with pytest.raises(Undeliverable, match=r"larger than the cluster takes") as caught:
        sender.send(items)
    assert caught.value.item == items[33]
    rest = [item for item in items if item != caught.value.item]
    sender.send(rest)
    assert {one.id for one in everything(settings)} == {one.id for _, one in rest}


def test_a_message_larger_than_any_is_refused_before_it_is_sent(settings: Settings, sender: Sender) -> None:
    items: list[Item] = [(ROLLOUT, message("a")), (ROLLOUT, message("huge", "other", bytes(17 * 1024 * 1024)))]
    with pytest.raises(Undeliverable) as caught:
        sender.send(items)
    assert caught.value.item == items[1]
    assert sender.send(items[:1]) == [1]
    assert [one.id for one in everything(settings, ROLLOUT)] == ["a", "a"]


def test_a_message_from_the_future_is_named_where_the_topic_takes_none(settings: Settings, sender: Sender) -> None:
    limit(settings, ROLLOUT, message_timestamp_after_max_ms="60000")
    ahead = message("ahead", "k1", time=time.time() + 86_400)
    items: list[Item] = [(ROLLOUT, message("a", "k0")), (ROLLOUT, ahead), (ROLLOUT, message("b", "k2"))]
    with pytest.raises(Undeliverable) as caught:
        sender.send(items)
    assert caught.value.item == items[1]
    assert len(sender.send([items[0], items[2]])) == 2


def test_a_producer_that_is_dropped_in_the_middle_sends_nothing_more(settings: Settings, sender: Sender) -> None:
    sender.send([(ROLLOUT, message("first"))])
    threads = threading.active_count()
    producer = sender._producer
    assert producer is not None
    producer._accumulator.config["linger_ms"] = 60_000
    future = producer.send(Connection(settings).name(ROLLOUT), key=b"k", value=b"late")
    assert not future.is_done
    sender.close()
    assert future.failed()
    assert threading.active_count() < threads
    assert sender.send([(ROLLOUT, message("second"))]) == [1]
    assert [one.id for one in everything(settings, ROLLOUT)] == ["first", "second"]


class Writer(threading.Thread):
    """Sends numbered messages of ten keys, a batch again and again until it is acknowledged."""

    def __init__(self, settings: Settings, count: int) -> None:
        super().__init__(daemon=True)
        self.settings = settings
        self.acknowledged: list[str] = []
        self.failures: list[tuple[float, str]] = []
        self.sender = Sender(Connection(settings))
        self._count = count

    def run(self) -> None:
        while (number := len(self.acknowledged)) < self._count:
            batch: list[Item] = [
                (FEEDBACK, message(str(i), f"k{i % 10}", str(i).encode())) for i in range(number, number + 20)
            ]
            start = time.monotonic()
            try:
                self.sender.send(batch)
            except LogError as error:
                self.failures.append((time.monotonic() - start, str(error)))
            else:
                self.acknowledged += [one.id for _, one in batch]
        self.sender.close()


def test_a_broker_that_is_killed_in_the_middle_costs_no_order_and_nothing_acknowledged(
    mortal: Cluster, tmp_path: Path
) -> None:
    patient = Writer(kafka.on(mortal.bootstrap, tmp_path, timeout_s=30.0), 800)
    hasty = Writer(kafka.on(mortal.bootstrap, tmp_path, timeout_s=1.0), 800)
    for writer in (patient, hasty):
        writer.start()
    while min(len(writer.acknowledged) for writer in (patient, hasty)) < 300:
        time.sleep(0.01)
    broker = mortal.brokers[0]
    broker.signal(signal.SIGKILL)
    while len(hasty.failures) < 3:
        time.sleep(0.05)
    before = len(patient.acknowledged), len(hasty.acknowledged)
    broker.start()
    mortal.until_ready()
    up = time.monotonic()
    for writer, count in zip((patient, hasty), before, strict=True):
        while len(writer.acknowledged) == count and time.monotonic() - up < 30:
            time.sleep(0.01)
        assert time.monotonic() - up < 10  # with the library's own settings it takes 25 s
        writer.join(60)
        assert not writer.is_alive()
        found = everything(writer.settings)
        assert {one.id for one in found} == set(writer.acknowledged) == {str(i) for i in range(800)}
        for key in range(10):
            first = list(dict.fromkeys(int(one.value) for one in found if one.key == f"k{key}"))
            assert first == sorted(first)
    assert patient.failures == []  # one producer lived through it
    for took, words in hasty.failures:
        assert took < 2 * hasty.settings.log.kafka.timeout_s + 1.5
        assert "[log.kafka] bootstrap" in words
