"""The port of the event log: append, read from an offset or a time, follow as a group, ends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from thumbwheel.events import Event, encode

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """What is appended. Messages of one `key` keep their order; a second message of one `id` counts as a copy.

    `time` is Unix seconds. `headers` are what goes with it beside id and time (see `cloudevents.py`).
    """

    id: str
    key: str
    time: float
    value: bytes
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A message where it lies on the log."""

    topic: str
    partition: int
    offset: int
    message: Message


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a message lies; `duplicate` when one of that id is known to have lain there already, and stands unchanged.

    A log that cannot look ids up (Kafka) takes every copy; its readers drop them by the id.
    """

    offset: int
    duplicate: bool


Start = Mapping[tuple[str, int], int]
"""Topic and partition to the offset where a consumer's own store stands."""


class Consumer(Protocol):
    """A member of a group that follows topics. Persist what `poll` gave, then `commit`: a crash between the two gives
    the same records again, and their ids say so. Used by one thread."""

    def poll(self, limit: int = 500) -> list[Record]:
        """Up to `limit` records of one partition, in order; empty when there is nothing new yet. Never waits.

        Raises LogError where the log cannot be read; ask again later, nothing is skipped.
        """

    def commit(self, record: Record) -> None:
        """Everything of its partition up to this record has been dealt with. May take effect a moment later."""

    def close(self) -> None:
        """Hand in what was committed and leave."""


class Log(Protocol):
    """A durable, ordered log of topics. Safe to use from several threads and several processes."""

    @property
    def identity(self) -> str:
        """Says which log this is: offsets of one mean nothing in another."""

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        """Append in order; on return all are durable. Raises LogError, and then none of them was acknowledged."""

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        """Up to `limit` records at or after `offset`, in order; empty at the end. Does not wait for new ones."""

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has; a partition is an order of its own."""

    def ends(self, topic: str, partition: int = 0) -> tuple[int, int]:
        """The first offset that is there, and the offset that the next message will get."""

    def offset_at(self, topic: str, time: float, partition: int = 0) -> int:
        """The first offset whose message has this time (Unix seconds) or a later one; the end where none has."""

    def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        """Durably note that `group`, which has no consumer at work, has dealt with everything before `offset`."""

    def committed(self, group: str, topic: str, partition: int = 0) -> int:
        """What `group` committed last; 0 when it never did."""

    def consumer(self, group: str, topics: Sequence[str], start: Start | None = None) -> Consumer:
        """Join `group` and follow topics: each partition from `start`, from what the group committed where that says
        nothing, from the beginning where it never did."""

    def close(self) -> None:
        """Release files and connections."""


def read_all(log: Log, topic: str, start: int = 0, partition: int = 0) -> Iterator[Record]:
    """Every record of a partition from `start` to the end as it is now."""
    offset = start
    while batch := log.read(topic, offset, partition=partition):
        yield from batch
        offset = batch[-1].offset + 1


def message_of(event: Event) -> Message:
    """An event as a message: its id, key and time, its JSON as the value, its type and source as headers."""
    return Message(event.id, event.key, event.time, encode(event), event.headers)
