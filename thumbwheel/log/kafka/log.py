"""`Log` on Apache Kafka: what programs on several machines meet on."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.structs import OffsetAndMetadata

from thumbwheel.errors import LogError
from thumbwheel.log.cloudevents import bounded
from thumbwheel.log.kafka.client import make
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.kafka.consumer import KafkaGroupConsumer, record_of
from thumbwheel.log.kafka.sender import Sender
from thumbwheel.log.port import Appended, Message, Record, Start
from thumbwheel.settings import Settings

T = TypeVar("T")

PARTITIONS_S = 60.0
"""How long a topic's number of partitions is believed."""


class KafkaLog:
    """Connects when it is first used. One thread at a time is at work in it; the others wait."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where `[log.kafka]` cannot work."""
        self._connection = Connection(settings)
        self._lock = threading.RLock()
        self._sender = Sender(self._connection)
        self._admin: KafkaAdminClient | None = None
        self._reader: KafkaConsumer | None = None
        self._partitions: dict[str, tuple[int, float]] = {}
        self._identity = ""

    @property
    def identity(self) -> str:
        if not self._identity:
            described = self._ask("reach", lambda admin: admin.describe_cluster())
            self._identity = f"kafka:{described['cluster_id']}:{self._connection.settings.prefix}"
        return self._identity

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        with self._lock:
            offsets = self._sender.send([(topic, message) for message in messages])
        return [Appended(offset, duplicate=False) for offset in offsets]

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        place = self._place(topic, partition)
        with self._using("read from"):
            reader = self._only(place)
            if (reader.highwater(place) or 0) <= offset:  # the end as the last fetch saw it: it only grows
                if self._end(place) <= offset:
                    return []
                offset = max(offset, self._first(place))
            if reader.position(place, timeout_ms=self._connection.timeout_ms) != offset:
                reader.seek(place, offset)
            found = reader.poll(timeout_ms=self._connection.timeout_ms, max_records=limit).get(place, [])
            if not found and reader.position(place, timeout_ms=self._connection.timeout_ms) < self._end(place):
                raise LogError(
                    f"cannot read from Kafka: no record of {topic} within {self._connection.settings.timeout_s:g} s"
                )
            return [record_of(topic, record) for record in found]

    def partitions(self, topic: str) -> int:
        name = self._connection.name(topic)
        count, until = self._partitions.get(topic, (0, 0.0))
        if time.monotonic() > until:
            described = self._ask("read from", lambda admin: admin.describe_topics([name]))
            count = len(described[0]["partitions"])
            if count == 0:
                raise LogError(
                    f"Kafka has no topic {name} ([log.kafka] prefix), or hides it from this user: "
                    "make the topics with `thumbwheel log init`"
                )
            self._partitions[topic] = (count, time.monotonic() + PARTITIONS_S)
        return count

    def ends(self, topic: str, partition: int = 0) -> tuple[int, int]:
        place = self._place(topic, partition)
        with self._using("read from"):
            return self._first(place), self._end(place)

    def offset_at(self, topic: str, time: float, partition: int = 0) -> int:
        place = self._place(topic, partition)
        with self._using("read from"):
            found = self._ready().offsets_for_times({place: int(bounded(time) * 1000)})[place]
            return self._end(place) if found is None else int(found.offset)

    def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        place = TopicPartition(self._connection.name(topic), partition)
        offsets = {place: OffsetAndMetadata(offset, "", -1)}

        def alter(admin: KafkaAdminClient) -> None:
            error = admin.alter_group_offsets(self._connection.name(group), offsets)[place]
            if error.errno:
                raise error()

        self._ask("commit to", alter)

    def committed(self, group: str, topic: str, partition: int = 0) -> int:
        place = TopicPartition(self._connection.name(topic), partition)
        name = self._connection.name(group)
        found = self._ask("read from", lambda admin: admin.list_group_offsets({name: [place]}))[name].get(place)
        return max(0, found.offset) if found else 0

    def consumer(self, group: str, topics: Sequence[str], start: Start | None = None) -> KafkaGroupConsumer:
        return KafkaGroupConsumer(self._connection, group, topics, start)

    def close(self) -> None:
        with self._lock:
            self._sender.close()
            self._drop()

    @contextmanager
    def _using(self, doing: str) -> Iterator[None]:
        """One thread at a time; what failed is made anew for the next."""
        with self._lock:
            try:
                with self._connection.errors(doing):
                    yield
            except LogError:
                self._drop()
                raise

    def _drop(self) -> None:
        admin, reader, self._admin, self._reader = self._admin, self._reader, None, None
        if admin is not None:
            admin.close()
        if reader is not None:
            reader.close(autocommit=False)

    def _ask(self, doing: str, question: Callable[[KafkaAdminClient], T]) -> T:
        deadline = time.monotonic() + self._connection.settings.timeout_s
        while True:
            try:
                with self._using(doing):
                    if self._admin is None:
                        self._admin = self._connection.admin()
                    return question(self._admin)
            except LogError as error:  # a group's coordinator takes a moment to be there
                if not getattr(error.__cause__, "retriable", False) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _ready(self) -> KafkaConsumer:
        if self._reader is None:
            self._reader = make(
                KafkaConsumer,
                **self._connection.options,
                group_id=None,
                metrics_enabled=False,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                allow_auto_create_topics=False,
                max_partition_fetch_bytes=MAX_BYTES,
                fetch_max_wait_ms=20,  # it is asked only for what is there; a fetch that waits holds up the next one
            )
        return self._reader

    def _place(self, topic: str, partition: int) -> TopicPartition:
        count = self.partitions(topic)
        if not 0 <= partition < count:
            raise LogError(f"{topic} has partitions 0 to {count - 1}, not {partition}")
        return TopicPartition(self._connection.name(topic), partition)

    def _only(self, place: TopicPartition) -> KafkaConsumer:
        """The reader, at work on one partition alone; what it has fetched of others is kept."""
        reader = self._ready()
        if place not in reader.assignment():
            reader.assign([*reader.assignment(), place])
            reader.seek(place, 0)
        reader.pause(*(other for other in reader.assignment() if other != place))
        reader.resume(place)
        return reader

    def _first(self, place: TopicPartition) -> int:
        return int(self._ready().beginning_offsets([place])[place])

    def _end(self, place: TopicPartition) -> int:
        return int(self._ready().end_offsets([place])[place])
