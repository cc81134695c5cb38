"""The port of the event log: append, read from an offset, commit a group's offset, ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from thumbwheel.events import Event, encode


@dataclass(frozen=True, slots=True)
class Message:
    """What is appended. Messages of one `key` keep their order; a second message of one `id` is dropped."""

    id: str
    key: str
    time: float
    value: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """A message where it lies on the log."""

    topic: str
    partition: int
    offset: int
    message: Message


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a message lies; `duplicate` when one of that id lay there already, which then stands unchanged."""

    offset: int
    duplicate: bool


class Log(Protocol):
    """A durable, ordered log of topics. Safe to use from several threads and several processes."""

    def append(self, topic: str, messages: Sequence[Message]) -> list[Appended]:
        """Append in order; on return all are durable. Raises LogError, and then none of them was acknowledged."""

    def read(self, topic: str, offset: int, limit: int = 500, partition: int = 0) -> list[Record]:
        """Up to `limit` records at or after `offset`, in order; empty at the end. Never waits."""

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has; a partition is an order of its own."""

    def ends(self, topic: str, partition: int = 0) -> tuple[int, int]:
        """The first offset that is there, and the offset that the next message will get."""

    def commit(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        """Durably note that `group` has dealt with everything before `offset`."""

    def committed(self, group: str, topic: str, partition: int = 0) -> int:
        """What `group` committed last; 0 when it never did."""

    def close(self) -> None:
        """Release files and connections."""


def message_of(event: Event) -> Message:
    """An event as a message: its id, key and time, and its JSON as the value."""
    return Message(event.id, event.key, event.time, encode(event))
