"""The forwarder: what the outbox holds reaches Kafka, whatever is killed, away or too large."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka.admin import ConfigResource, ConfigResourceType
from prometheus_client import REGISTRY

from tests import kafka
from tests.launch import wait_for
from thumbwheel.demo.broker import Cluster
from thumbwheel.errors import LogError, ThumbwheelError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT, ReplicaReported
from thumbwheel.log import Message, Record, message_of, open_log
from thumbwheel.log.deadletter import dlq
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.kafka.forwarder import Forwarder, Housekeeping, run
from thumbwheel.log.kafka.sender import Sender
from thumbwheel.log.outbox import Outbox
from thumbwheel.log.port import Log, read_all
from thumbwheel.settings import Settings

pytestmark = pytest.mark.kafka

FORWARD = [sys.executable, "-m", "thumbwheel.cli", "forward"]


def settings_on(address: str, data: Path, **more: Any) -> Settings:
    """Settings that a child process is given as they are."""
    made = kafka.on(address, data, **more)
    return made.model_copy(update={"log": made.log.model_copy(update={"forwarder_metrics_port": 0})})


@pytest.fixture
def settings(kafka_address: str, tmp_path: Path) -> Settings:
    return settings_on(kafka_address, tmp_path)


def outbox_of(settings: Settings) -> Outbox:
    return Outbox(settings.path(settings.log.outbox), settings.log.outbox_max_bytes)


@pytest.fixture
def outbox(settings: Settings) -> Iterator[Outbox]:
    made = outbox_of(settings)
    yield made
    made.close()


@pytest.fixture
def log(settings: Settings) -> Iterator[Log]:
    made = open_log(settings)
    yield made
    made.close()


@contextmanager
def forwarding(settings: Settings, outbox: Outbox) -> Iterator[Forwarder]:
    sender = Sender(Connection(settings))
    try:
        yield Forwarder(outbox, sender)
    finally:
        sender.close()


@contextmanager
def process(settings: Settings, argv: list[str] = FORWARD) -> Iterator["subprocess.Popen[bytes]"]:
    """A forwarder of its own; killed at the end if it is still there."""
    environment = {"THUMBWHEEL_DATA": str(settings.data), "THUMBWHEEL_LOG": settings.log.model_dump_json()}
    child = subprocess.Popen(argv, env={**os.environ, **environment})
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def messages(count: int, keys: int = 900, size: int = 100) -> list[Message]:
    """With several of a key, and an order to tell by the value."""
    headers = (("ce_type", b"test"), ("ce_source", b"gateway/r1"))
    return [
        Message(f"id-{i}", f"key-{i * i % keys}", 1.7e9 + i / 8, json.dumps({"n": i}).encode().ljust(size), headers)
        for i in range(count)
    ]


def arrived(log: Log, topic: str) -> list[Record]:
    """Of every partition, the first copy of each id."""
    seen: dict[str, Record] = {}
    for partition in range(log.partitions(topic)):
        for record in read_all(log, topic, partition=partition):
            seen.setdefault(record.message.id, record)
    return list(seen.values())


def all_there_in_order(log: Log, topic: str, sent: list[Message]) -> bool:
    """Whether each of them arrived as it was, and those of one key in the order in which they were sent."""
    found = [record.message for record in arrived(log, topic)]
    if {message.id for message in found} != {message.id for message in sent}:
        return False
    for key in {message.key for message in sent}:
        assert [m for m in found if m.key == key] == [m for m in sent if m.key == key]
    return True


def test_everything_arrives_as_it_was_and_in_order_and_leaves_the_outbox(
    settings: Settings, outbox: Outbox, log: Log
) -> None:
    sent = {topic: messages(count) for topic, count in ((ROLLOUT, 3), (FEEDBACK, 500), (RESPONSES, 4500))}
    for topic, some in sent.items():
        outbox.append(topic, some)
    with forwarding(settings, outbox) as forwarder:
        while forwarder.step():
            pass
    for topic, some in sent.items():
        assert all_there_in_order(log, topic, some)
        assert sum(log.ends(topic, p)[1] for p in range(log.partitions(topic))) == len(some), "there are copies"
        assert outbox.waiting(topic) == (0, 0.0)
    assert outbox.read(RESPONSES, 0) == []


DIES = """
import os, signal
from thumbwheel.cli import main
from thumbwheel.log.outbox import Outbox
sent = Outbox.sent
calls = []
def dying(self, topic, record):
    calls.append(topic)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    sent(self, topic, record)
Outbox.sent = dying
main()
"""


def test_a_kill_between_sent_and_noted_loses_nothing_and_keeps_the_order(
    settings: Settings, outbox: Outbox, log: Log
) -> None:
    votes, responses = messages(300), messages(4500)
    outbox.append(FEEDBACK, votes)
    outbox.append(RESPONSES, responses)
    for at in (1, 3):  # after the votes, and in the middle of the responses
        with process(settings, [sys.executable, "-c", DIES.format(at=at), "forward"]) as child:
            assert child.wait(30) == -signal.SIGKILL
    with forwarding(settings, outbox) as forwarder:
        while forwarder.step():
            pass
    assert all_there_in_order(log, FEEDBACK, votes)
    assert all_there_in_order(log, RESPONSES, responses)
    assert sum(log.ends(RESPONSES, p)[1] for p in range(3)) > len(responses), "nothing was sent twice: no kill hit"


def test_a_message_too_large_for_us_or_for_the_topic_is_shelved_and_the_rest_goes_on(
    settings: Settings, outbox: Outbox, log: Log
) -> None:
    connection = Connection(settings)
    admin = connection.admin()
    resource = ConfigResource(
        ConfigResourceType.TOPIC, connection.name(RESPONSES), configs={"max.message.bytes": "1000000"}
    )
    admin.alter_configs([resource])
    admin.close()
    sent = messages(30)
    large = {
        10: Message("large-10", "key-100", 1.7e9, bytes(MAX_BYTES + 1)),
        20: Message("large-20", "key-400", 1.7e9, random.Random(0).randbytes(1_500_000)),
    }
    mixed = [more for i, message in enumerate(sent) for more in ([large[i]] if i in large else []) + [message]]
    outbox.append(RESPONSES, mixed)
    with forwarding(settings, outbox) as forwarder:
        while forwarder.step():
            pass
    assert all_there_in_order(log, RESPONSES, sent)
    assert [record.message for record in outbox.read(dlq(RESPONSES), 0)] == [large[10], large[20]]
    assert outbox.dropped() == [(RESPONSES, "too_large", 2)]
    assert outbox.waiting(RESPONSES) == (0, 0.0)


def test_two_at_one_outbox_are_refused_and_sigterm_sends_what_waits(
    settings: Settings, outbox: Outbox, log: Log
) -> None:
    with process(settings) as child:
        outbox.append(ROLLOUT, messages(1))
        wait_for(lambda: outbox.waiting(ROLLOUT)[0] == 0, 20, "the first is sent")
        with pytest.raises(ThumbwheelError, match=r"another forwarder is at work on .*outbox\.sqlite \(\[log\] outbox"):
            run(settings)
        child.send_signal(signal.SIGSTOP)
        waiting = messages(5000, keys=5000)
        outbox.append(RESPONSES, waiting)
        last = message_of(ReplicaReported(source="test", replica="r1", serving="base", leaving=True))
        outbox.append(ROLLOUT, [last])
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGCONT)
        assert child.wait(20) == 0
    assert outbox.waiting(RESPONSES) == (0, 0.0)
    assert all_there_in_order(log, RESPONSES, waiting)
    assert last in [record.message for record in arrived(log, ROLLOUT)]
    mirror = settings.path(settings.log.mirror)
    assert mirror.is_file()


def test_while_the_broker_is_away_nothing_is_forgotten_and_the_outbox_is_held_to_its_limit(tmp_path: Path) -> None:
    kafka.needs_release()
    with Cluster(tmp_path / "kafka") as cluster:
        settings = settings_on(cluster.bootstrap, tmp_path, timeout_s=2.0)
        outbox, log = outbox_of(settings), open_log(settings)
        with forwarding(settings, outbox) as forwarder:
            votes, responses = messages(100), messages(1500, size=2000)
            outbox.append(FEEDBACK, votes[:10])
            assert forwarder.step()
            (broker,) = cluster.brokers
            broker.signal(signal.SIGKILL)
            outbox.append(FEEDBACK, votes[10:])
            outbox.append(RESPONSES, responses)
            outbox.limit = 3_000_000
            housekeeping = Housekeeping(outbox, keep_s=60)
            housekeeping.start()
            trying = Trying(forwarder)
            trying.start()
            wait_for(lambda: len(trying.errors) >= 2, 15, "sending fails")
            wait_for(lambda: outbox.bytes() <= outbox.limit, 15, "the outbox is held to its limit")
            wait_for(lambda: gauge("waiting_events", FEEDBACK) == 90, 5, "it says what waits")
            wait_for(lambda: (gauge("dropped_total", RESPONSES, reason="outbox_full") or 0) > 500, 5, "and was dropped")
            assert outbox.waiting(FEEDBACK)[0] == 90
            kept = [record.message for record in outbox.read(RESPONSES, 0, len(responses))]
            assert outbox.dropped() == [(RESPONSES, "outbox_full", len(responses) - len(kept))]
            assert not trying.done.is_set()
            assert all("[log.kafka]" in str(error) for error in trying.errors), trying.errors
            broker.start()
            cluster.until_ready()
            assert trying.done.wait(45)
            trying.join()
            housekeeping.end()
        assert all_there_in_order(log, FEEDBACK, votes)
        assert all_there_in_order(log, RESPONSES, kept)
        log.close()
        outbox.close()


def gauge(name: str, topic: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"thumbwheel_forwarder_{name}", {"topic": topic, **labels})


class Trying(threading.Thread):
    """Steps until there is nothing to do, through every LogError."""

    def __init__(self, forwarder: Forwarder) -> None:
        super().__init__()
        self._forwarder = forwarder
        self.errors: list[LogError] = []
        self.done = threading.Event()

    def run(self) -> None:
        while True:
            try:
                if not self._forwarder.step():
                    break
            except LogError as error:
                self.errors.append(error)
                time.sleep(0.1)
        self.done.set()
