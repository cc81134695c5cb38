"""Moving house: all that is on one log, copied to another.

Ids, keys, times, headers and the order per key stay. After each batch that is durable in the target the source's group
`copy.<identity of the target>` says so: a copy that was ended in any way goes on there, and a second one takes only
what is new. A batch whose note was lost comes twice; a SQLite target drops it by the ids, readers of Kafka do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thumbwheel.errors import LogError, SettingsError
from thumbwheel.events import TOPICS
from thumbwheel.log.deadletter import dlq
from thumbwheel.log.port import Log
from thumbwheel.log.sqlite import SqliteLog
from thumbwheel.settings import Settings

BATCH = 200
ALL = (*TOPICS, *(dlq(topic) for topic in TOPICS))

Tick = Callable[[str, int, int], None]
"""Told after each batch: the topic, how many of its records are done, how many there are to do."""


@dataclass(frozen=True)
class Copied:
    """What became of a topic: records that were read, and how many of them the target had already."""

    topic: str
    read: int
    duplicates: int


def place(settings: Settings, name: str) -> Log:
    """The log at `sqlite` ([log] path) or `kafka` ([log.kafka]), whichever of them is the backend."""
    if name == "kafka":
        from thumbwheel.log.kafka.log import KafkaLog

        return KafkaLog(settings)
    return SqliteLog(settings.path(settings.log.path))


def source(settings: Settings, name: str) -> Log:
    """As `place`, but a SQLite file has to be there. Raises LogError where it is not."""
    path = settings.path(settings.log.path)
    if name == "sqlite" and not path.is_file():
        raise LogError(f"there is no event log {path} ([log] path) to copy from")
    return place(settings, name)


def copy(source: Log, target: Log, tick: Tick = lambda topic, done, total: None) -> Iterator[Copied]:
    """Copy everything that is on `source` now; yields each topic when it is through.

    Raises SettingsError where both are one log, LogError where one cannot be read or written; run it again then.
    """
    if source.identity == target.identity:
        raise SettingsError(f"source and target are the same log, {source.identity}: nothing to copy")
    fresh = {topic: _is_empty(target, topic) for topic in ALL}  # also finds a topic that is missing, before any is sent
    group = f"copy.{target.identity}"
    for topic in ALL:
        yield _topic(source, target, topic, group, fresh[topic], tick)


def _topic(source: Log, target: Log, topic: str, group: str, fresh: bool, tick: Tick) -> Copied:
    todo: list[tuple[int, int, int]] = []
    for partition in range(source.partitions(topic)):
        first, end = source.ends(topic, partition)
        # A target that is empty has lost what was copied: its topics were made anew.
        done = 0 if fresh else source.committed(group, topic, partition)
        todo.append((partition, max(first, done), end))
    total = sum(max(0, end - start) for _, start, end in todo)
    read = duplicates = 0
    for partition, start, end in todo:
        offset = start
        while offset < end and (batch := source.read(topic, offset, BATCH, partition)):
            appended = target.append(topic, [record.message for record in batch])
            offset = batch[-1].offset + 1
            source.commit(group, topic, offset, partition)
            read += len(batch)
            duplicates += sum(one.duplicate for one in appended)
            tick(topic, read, total)
    return Copied(topic, read, duplicates)


def _is_empty(log: Log, topic: str) -> bool:
    return all(log.ends(topic, partition)[1] == 0 for partition in range(log.partitions(topic)))
