"""A member of a consumer group whose owner may think for as long as it likes.

A thread of its own polls Kafka all the time: a training step that outlasts `max.poll.interval.ms` costs no partition.
While the owner is busy the thread keeps a bounded number of records and pauses. Membership is static (KIP-345) and
rebalancing cooperative (KIP-429): a restart, or another member's, moves no partition that need not move.
"""

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata
from prometheus_client import Gauge

from thumbwheel.errors import LogError
from thumbwheel.log.cloudevents import from_record
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.port import Record, Start

logger = logging.getLogger(__name__)

BATCH = 500
HELD_BATCHES = 4
"""How many batches are kept for an owner that is busy."""

lag = Gauge(
    "thumbwheel_consumer_lag", "Records on the log that were not handed out yet", ["group", "topic", "partition"]
)


def record_of(topic: str, record: Any) -> Record:
    """A record of kafka-python as one of ours; `topic` is the name without the prefix."""
    place = f"{topic}/{record.partition}/{record.offset}"
    message = from_record(record.key, record.value, record.headers, record.timestamp / 1000, place)
    return Record(topic, record.partition, record.offset, message)


class KafkaGroupConsumer:
    """`Consumer` on Kafka."""

    def __init__(self, connection: Connection, group: str, topics: Sequence[str], start: Start | None) -> None:
        self._connection = connection
        self._group = group
        self._topics = {connection.name(topic): topic for topic in topics}
        self._next = {
            (connection.name(topic), partition): offset for (topic, partition), offset in (start or {}).items()
        }
        self._lock = threading.Lock()
        self._held: deque[tuple[TopicPartition, list[Record]]] = deque()
        self._commits: queue.SimpleQueue[tuple[TopicPartition, int]] = queue.SimpleQueue()
        self._error: LogError | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"consumer-{group}", daemon=True)
        self._thread.start()

    def poll(self, limit: int = BATCH) -> list[Record]:
        with self._lock:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if not self._held:
                return []
            place, records = self._held.popleft()
            if len(records) > limit:
                self._held.appendleft((place, records[limit:]))
            return records[:limit]

    def commit(self, record: Record) -> None:
        place = TopicPartition(self._connection.name(record.topic), record.partition)
        self._next[place] = record.offset + 1
        self._commits.put((place, record.offset + 1))

    def close(self) -> None:
        self._closing.set()
        self._thread.join(self._connection.settings.timeout_s)

    # --- the thread ---

    def _run(self) -> None:
        wait = 0.5
        while not self._closing.is_set():
            consumer = None
            try:
                with self._connection.errors("follow"):
                    consumer = self._join()
                    wait = 0.5
                    while not self._closing.is_set():
                        self._turn(consumer)
                    self._commit(consumer)
            except LogError as error:
                with self._lock:
                    self._error = error
                    self._held.clear()  # they come again, from where the owner's store stands
                self._closing.wait(wait)
                wait = min(10.0, wait * 2)
            finally:
                if consumer is not None:
                    try:
                        consumer.close(autocommit=False, timeout_ms=2000)
                    except KafkaError as error:
                        logger.debug("closing: %s", error)

    def _join(self) -> KafkaConsumer:
        settings = self._connection.settings
        consumer = KafkaConsumer(
            **self._connection.options,
            group_id=self._connection.name(self._group),
            group_instance_id=self._connection.member,
            partition_assignment_strategy=[CooperativeStickyAssignor()],
            enable_auto_commit=False,
            metrics_enabled=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            max_poll_records=BATCH,
            max_partition_fetch_bytes=MAX_BYTES,
            session_timeout_ms=int(settings.session_timeout_s * 1000),
            heartbeat_interval_ms=int(settings.session_timeout_s * 1000 / 15),
        )
        consumer.subscribe(list(self._topics), listener=_Listener(self, consumer))
        return consumer

    def _turn(self, consumer: KafkaConsumer) -> None:
        """One poll. It is made also when nothing may be fetched: it is what keeps the membership."""
        self._commit(consumer)
        with self._lock:
            full = len(self._held) >= HELD_BATCHES
        if full:
            consumer.pause(*consumer.assignment())
        elif paused := consumer.paused():
            consumer.resume(*paused)
        found = consumer.poll(timeout_ms=100)
        with self._lock:
            for place, records in found.items():
                topic = self._topics[place.topic]
                self._held.append((place, [record_of(topic, record) for record in records]))
                if (end := consumer.highwater(place)) is not None:
                    lag.labels(self._group, topic, place.partition).set(end - records[-1].offset - 1)

    def _commit(self, consumer: KafkaConsumer) -> None:
        offsets: dict[TopicPartition, OffsetAndMetadata] = {}
        while not self._commits.empty():
            place, offset = self._commits.get()
            offsets[place] = OffsetAndMetadata(offset, "", -1)
        ours = consumer.assignment()
        offsets = {place: offset for place, offset in offsets.items() if place in ours}
        if offsets:
            try:
                consumer.commit(offsets, timeout_ms=self._connection.timeout_ms)
            except KafkaError as error:  # the store knows; whoever gets these records again drops them by their ids
                logger.warning("offsets of group %s were not committed: %s", self._group, error)

    def _assigned(self, consumer: KafkaConsumer, places: Sequence[TopicPartition]) -> None:
        self._drop(places)
        for place in places:
            if (own := self._next.get(place)) is not None:
                consumer.seek(place, own)
        logger.info("group %s: got %s", self._group, _words(places))

    def _revoked(self, places: Sequence[TopicPartition]) -> None:
        self._drop(places)
        for place in places:
            with contextlib.suppress(KeyError):
                lag.remove(self._group, self._topics[place.topic], place.partition)
        logger.info("group %s: gave up %s", self._group, _words(places))

    def _drop(self, places: Sequence[TopicPartition]) -> None:
        with self._lock:
            self._held = deque(entry for entry in self._held if entry[0] not in places)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, owner: KafkaGroupConsumer, consumer: KafkaConsumer) -> None:
        self._owner = owner
        self._consumer = consumer

    def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        if assigned:
            self._owner._assigned(self._consumer, assigned)

    def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        if revoked:
            self._owner._revoked(revoked)


def _words(places: Sequence[TopicPartition]) -> str:
    return ", ".join(sorted(f"{place.topic}/{place.partition}" for place in places))
