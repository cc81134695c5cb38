"""A member of a consumer group whose owner may think for as long as it likes.

A thread of its own polls Kafka all the time: a training step that outlasts `max.poll.interval.ms` costs no partition.
While the owner is busy the thread keeps a bounded number of records and pauses. Membership is static (KIP-345) and
rebalancing cooperative (KIP-429): a restart, or another member's, moves no partition that need not move.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import FencedInstanceIdError, KafkaError
from kafka.structs import MemberState, OffsetAndMetadata
from prometheus_client import Gauge

from thumbwheel.errors import LogError
from thumbwheel.log.cloudevents import from_record
from thumbwheel.log.kafka.client import make
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.port import Record, Start

logger = logging.getLogger(__name__)

BATCH = 500
HELD_BATCHES = 4
"""How many batches are kept for an owner that is busy."""
MAX_POLL_INTERVAL_MS = 300_000
"""How long our own thread may be stuck before the group gives its partitions to another member."""
TURN_MS = 100
COMMIT_MS = 2000
CLOSE_MS = 2000
MAX_WAIT_S = 5.0
"""Between two tries to join."""
RECOVERED_S = 60.0
"""A membership that lasted this long ended for a new reason: the next try comes soon."""

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
        self._lock = threading.Lock()
        # Where the owner's store stands. What another member has had in between goes on where the group committed.
        self._next = {
            TopicPartition(connection.name(topic), at): offset for (topic, at), offset in (start or {}).items()
        }
        self._ours: set[TopicPartition] = set()
        self._held: deque[tuple[TopicPartition, list[Record]]] = deque()
        self._uncommitted: dict[TopicPartition, int] = {}
        self._commit_after = 0.0
        self._ends: dict[TopicPartition, int] = {}
        self._error: LogError | None = None
        self._over = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"consumer-{group}", daemon=True)
        self._thread.start()

    def poll(self, limit: int = BATCH) -> list[Record]:
        with self._lock:
            if self._error is not None:
                error = self._error
                if not self._over:
                    self._error = None
                raise error
            if not self._held:
                return []
            place, records = self._held.popleft()
            if len(records) > limit:
                self._held.appendleft((place, records[limit:]))
            self._measure(place, records[:limit][-1].offset + 1)
            return records[:limit]

    def commit(self, record: Record) -> None:
        place = TopicPartition(self._connection.name(record.topic), record.partition)
        with self._lock:
            if place in self._ours:
                self._next[place] = self._uncommitted[place] = record.offset + 1

    def close(self) -> None:
        self._closing.set()
        self._thread.join(self._connection.settings.timeout_s + (2 * COMMIT_MS + CLOSE_MS) / 1000)

    # --- the thread ---

    def _run(self) -> None:
        wait = 0.5
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                with self._connection.errors("follow"):
                    self._follow()
            except Exception as error:  # the owner gets to know of what nobody foresaw, too
                if not isinstance(error, LogError):
                    logger.exception("group %s", self._group)
                with self._lock:
                    self._error = error if isinstance(error, LogError) else LogError(f"cannot follow Kafka: {error!r}")
                    self._held.clear()  # they come again, from where the owner's store stands
                    self._over = isinstance(error.__cause__, FencedInstanceIdError)
                if self._over:
                    return  # whoever came last stays: it would push this one out in turn
            wait = 0.5 if time.monotonic() - began > RECOVERED_S else min(MAX_WAIT_S, wait * 2)
            self._closing.wait(wait)

    def _follow(self) -> None:
        """Be a member until the end, or an error."""
        consumer = self._make()
        listener = _Listener(self, consumer)
        try:
            self._look(consumer)
            consumer.subscribe(list(self._topics), listener=listener)
            looked = stable = time.monotonic()
            while not self._closing.is_set():
                now = time.monotonic()
                if consumer.group_metadata().state is MemberState.STABLE:
                    stable = now
                    self._commit(consumer)
                if self._turn(consumer):
                    looked = now
                elif now - looked > self._connection.settings.timeout_s:
                    self._look(consumer)
                    looked = now
                    if now - stable > self._connection.settings.session_timeout_s + self._connection.settings.timeout_s:
                        raise LogError(
                            f"cannot follow Kafka: group {self._connection.name(self._group)} takes no member"
                        )
            self._hand_in(consumer)
        finally:
            listener.leave()
            with contextlib.suppress(KafkaError):
                consumer.close(autocommit=False, timeout_ms=CLOSE_MS)

    def _make(self) -> KafkaConsumer:
        settings = self._connection.settings
        return make(
            KafkaConsumer,
            **self._connection.options,
            group_id=self._connection.name(self._group),
            group_instance_id=self._connection.member,
            partition_assignment_strategy=[CooperativeStickyAssignor()],
            enable_auto_commit=False,
            metrics_enabled=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            max_poll_records=BATCH,
            max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
            max_partition_fetch_bytes=MAX_BYTES,
            session_timeout_ms=int(settings.session_timeout_s * 1000),
            heartbeat_interval_ms=int(settings.session_timeout_s * 1000 / 15),
        )

    def _look(self, consumer: KafkaConsumer) -> None:
        """Ask how long the log is. Without anything to fetch the library says nothing of a cluster that is away."""
        places = consumer.assignment() or {TopicPartition(name, 0) for name in self._topics}
        ends = consumer.end_offsets(list(places), timeout_ms=self._connection.timeout_ms)
        with self._lock:
            waiting = {place: records[0].offset for place, records in reversed(self._held)}
        for place in consumer.assignment():
            self._ends[place] = ends[place]
            following = waiting.get(place, consumer.position(place, timeout_ms=self._connection.timeout_ms))
            if following is not None:
                self._measure(place, following)

    def _turn(self, consumer: KafkaConsumer) -> bool:
        """One poll; whether it brought anything. Made also when nothing may be fetched: it keeps the membership."""
        with self._lock:
            full = sum(len(records) for _, records in self._held) > (HELD_BATCHES - 1) * BATCH
        if full:
            consumer.pause(*consumer.assignment())
        elif paused := consumer.paused():
            consumer.resume(*paused)
        found = consumer.poll(timeout_ms=TURN_MS)
        if _fenced(consumer):
            raise FencedInstanceIdError("its heartbeat was refused")
        batches = [
            (place, [record_of(self._topics[place.topic], record) for record in records])
            for place, records in found.items()
        ]
        with self._lock:
            for place, records in batches:
                self._held.append((place, records))
                self._ends[place] = max(consumer.highwater(place) or 0, records[-1].offset + 1)
        return bool(batches)

    def _commit(self, consumer: KafkaConsumer) -> None:
        """Hand in what the owner has dealt with. What fails is tried again a little later."""
        with self._lock:
            self._uncommitted = {place: offset for place, offset in self._uncommitted.items() if place in self._ours}
            given = dict(self._uncommitted)
        if not given or time.monotonic() < self._commit_after:
            return
        try:
            offsets = {place: OffsetAndMetadata(offset, "", -1) for place, offset in given.items()}
            consumer.commit(offsets, timeout_ms=COMMIT_MS)
        except FencedInstanceIdError:
            raise
        except KafkaError as error:  # whoever gets these records again drops them by their ids
            logger.warning("offsets of group %s are not committed yet: %s", self._group, error)
            self._commit_after = time.monotonic() + MAX_WAIT_S
            return
        with self._lock:
            for place, offset in given.items():
                if self._uncommitted.get(place) == offset:
                    del self._uncommitted[place]

    def _hand_in(self, consumer: KafkaConsumer) -> None:
        """Commit for the last time; where the group is between two orders, once it is not."""
        deadline = time.monotonic() + COMMIT_MS / 1000
        while True:
            self._commit_after = 0.0
            self._commit(consumer)
            if not self._uncommitted or time.monotonic() > deadline:
                return
            consumer.poll(timeout_ms=TURN_MS)

    def _measure(self, place: TopicPartition, following: int) -> None:
        """Set the lag of a partition, of which `following` is handed out next."""
        if (end := self._ends.get(place)) is not None:
            lag.labels(self._group, self._topics[place.topic], place.partition).set(max(0, end - following))

    def _assigned(self, consumer: KafkaConsumer, places: Sequence[TopicPartition]) -> None:
        with self._lock:
            self._drop(places)
            self._ours.update(places)
            for place in places:
                if (own := self._next.get(place)) is not None:
                    consumer.seek(place, own)
                    self._uncommitted[place] = own  # the group stands where the store does
        logger.info("group %s: got %s", self._group, _words(places))

    def _revoked(self, places: Sequence[TopicPartition], leaving: bool) -> None:
        with self._lock:
            self._drop(places)
            self._ours.difference_update(places)
            for place in places:
                self._ends.pop(place, None)
                if not leaving:
                    self._next.pop(place, None)
                with contextlib.suppress(KeyError):
                    lag.remove(self._group, self._topics[place.topic], place.partition)
        logger.info("group %s: gave up %s", self._group, _words(places))

    def _drop(self, places: Sequence[TopicPartition]) -> None:
        self._held = deque(entry for entry in self._held if entry[0] not in places)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Called on the library's own thread, while ours waits in `poll` or `close`."""

    def __init__(self, owner: KafkaGroupConsumer, consumer: KafkaConsumer) -> None:
        self._owner = owner
        self._consumer = consumer
        self._leaving = False

    def leave(self) -> None:
        """What is given up from here on is given up to be taken again."""
        self._leaving = True

    def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        if assigned:
            self._owner._assigned(self._consumer, assigned)

    def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        if revoked:
            self._owner._revoked(revoked, self._leaving)


def _fenced(consumer: KafkaConsumer) -> bool:
    """Whether another member of our name came. The library then stops its heartbeat, and says so to its log alone."""
    coordinator = consumer._coordinator
    return coordinator.stable() and not coordinator.rejoin_needed and not coordinator._heartbeat_enabled


def _words(places: Sequence[TopicPartition]) -> str:
    return ", ".join(sorted(f"{place.topic}/{place.partition}" for place in places))
