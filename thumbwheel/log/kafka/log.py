"""`Log` on Apache Kafka: what programs on several machines meet on."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from thumbwheel.errors import LogError
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.kafka.consumer import KafkaGroupConsumer, record_of
from thumbwheel.log.kafka.sender import Sender
from thumbwheel.log.port import Appended, Message, Record, Start
from thumbwheel.settings import Settings

T = TypeVar("T")


class KafkaLog:
    """Connects when it is first used. One thread at a time is at work in it; the others wait."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where `[log.kafka]` cannot work."""
        self._connection = Connection(settings)
        self._lock = threading.RLock()
        self._sender = Sender(self._connection)
        self._admin: KafkaAdminClient | None = None
        self._reader: KafkaConsumer | None = None
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
        with self._lock, self._connection.errors("read from"):
            reader, place = self._at(topic, partition)
            if (reader.highwater(place) or 0) <= offset:  # the end as the last fetch saw it: it only grows
                first, end = self._ends(reader, place)
                if end <= max(offset, first):
                    return []
                offset = max(offset, first)
            if reader.position(place) != offset:
                reader.seek(place, offset)
            found = reader.poll(timeout_ms=self._connection.timeout_ms, max_records=limit)
            records = found.get(place, [])
            if not records:
                raise LogError(
                    f"cannot read from Kafka: no record of {topic} within {self._connection.settings.timeout_s:g} s"
                )
            return [record_of(topic, record) for record in records]

    def partitions(self, topic: str) -> int:
        with self._lock, self._connection.errors("read from"):
            found = self._ready().partitions_for_topic(self._connection.name(topic))
            if not found:
                raise LogError(
                    f"Kafka has no topic {self._connection.name(topic)} ([log.kafka] prefix): "
                    "make the topics with `thumbwheel log init`"
                )
            return len(found)

    def ends(self, topic: str, partition: int = 0) -> tuple[int, int]:
        with self._lock, self._connection.errors("read from"):
            return self._ends(*self._at(topic, partition))

    def offset_at(self, topic: str, time: float, partition: int = 0) -> int:
        with self._lock, self._connection.errors("read from"):
            reader, place = self._at(topic, partition)
            found = reader.offsets_for_times({place: int(time * 1000)})[place]
            return self._ends(reader, place)[1] if found is None else int(found.offset)

    def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        place = TopicPartition(self._connection.name(topic), partition)
        offsets = {place: OffsetAndMetadata(offset, "", -1)}
        answer = self._ask("commit to", lambda admin: admin.alter_group_offsets(self._connection.name(group), offsets))
        if (error := answer.get(place)) is not None and error.errno:
            raise self._connection.explain("commit to", error())

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
            if self._admin is not None:
                self._admin.close()
            if self._reader is not None:
                self._reader.close(autocommit=False)
            self._admin = self._reader = None

    def _ask(self, doing: str, question: Callable[[KafkaAdminClient], T]) -> T:
        with self._lock:
            if self._admin is None:
                self._admin = self._connection.admin()
            deadline = time.monotonic() + self._connection.settings.timeout_s
            with self._connection.errors(doing):
                while True:
                    try:
                        return question(self._admin)
                    except KafkaError as error:  # a group's coordinator takes a moment to be there
                        if not error.retriable or time.monotonic() > deadline:
                            raise
                    time.sleep(0.1)

    def _ready(self) -> KafkaConsumer:
        if self._reader is None:
            self._reader = KafkaConsumer(
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

    def _at(self, topic: str, partition: int) -> tuple[KafkaConsumer, TopicPartition]:
        """The reader, at work on one partition alone; what it has fetched of others is kept."""
        reader = self._ready()
        place = TopicPartition(self._connection.name(topic), partition)
        assigned = reader.assignment()
        if place not in assigned:
            if partition >= self.partitions(topic):
                raise LogError(f"{topic} has partitions 0 to {self.partitions(topic) - 1}, not {partition}")
            reader.assign([*assigned, place])
            reader.seek_to_beginning(place)
        reader.pause(*(other for other in reader.assignment() if other != place))
        reader.resume(place)
        return reader, place

    def _ends(self, reader: KafkaConsumer, place: TopicPartition) -> tuple[int, int]:
        return int(reader.beginning_offsets([place])[place]), int(reader.end_offsets([place])[place])
