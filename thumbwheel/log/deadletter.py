"""Dead letters: records that a consumer cannot read, kept whole on `<topic>.dlq` with why and where.

A letter holds the original bytes, key, time and headers; headers of its own, `dlq_…`, say the rest. What became of it
is a fold over the same topic: a note that names a letter says that it was sent again.
"""

import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Counter

from thumbwheel.events import new_id
from thumbwheel.log.port import Log, Message, Record, read_all

logger = logging.getLogger(__name__)

sent = Counter("thumbwheel_consumer_dead_letters", "Records that a consumer could not read", ["group", "topic"])

_LETTERS = uuid.UUID("0d2c8a9c-3f52-5e0f-8f8e-1f4f6a1f0c77")
"""The namespace of letters' ids: one letter for a record and a group, however often it is met."""
_OWN = "dlq_"
_SUFFIX = ".dlq"


def dlq(topic: str) -> str:
    """Where the dead letters of a topic go."""
    return f"{topic}{_SUFFIX}"


def is_dlq(topic: str) -> bool:
    """Whether it is the topic of another one's dead letters."""
    return topic.endswith(_SUFFIX)


def source(topic: str) -> str:
    """The topic whose dead letters lie on `topic`."""
    return topic.removesuffix(_SUFFIX)


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter as it is read back. `original` is the record's message as it lay on `topic`."""

    id: str
    topic: str
    partition: int
    offset: int
    group: str
    why: str
    original: Message
    replayed: bool = False


def letter(log: Log, record: Record, group: str, error: Exception) -> Message:
    """What goes onto `dlq(record.topic)` when `group` cannot read a record."""
    message = record.message
    place = f"{record.topic}/{record.partition}/{record.offset}"
    own = {
        "dlq_id": str(uuid.uuid5(_LETTERS, f"{log.identity}/{place}/{group}")),
        "dlq_original_id": message.id,
        "dlq_topic": record.topic,
        "dlq_partition": str(record.partition),
        "dlq_offset": str(record.offset),
        "dlq_group": group,
        "dlq_error": f"{type(error).__name__}: {error}"[:1000],
    }
    headers = (*message.headers, *((name, value.encode(errors="replace")) for name, value in own.items()))
    return Message(own["dlq_id"], message.key, message.time, message.value, headers)


def send(log: Log, record: Record, group: str, error: Exception) -> None:
    """Put a record that cannot be read onto the dead-letter topic. Raises LogError where it could not be kept."""
    log.append(dlq(record.topic), [letter(log, record, group, error)])
    sent.labels(group, record.topic).inc()
    place = f"{record.topic} partition {record.partition} offset {record.offset}"
    words = " ".join(str(error).split())[:300]
    logger.warning("%s went to %s, for group %s cannot read it: %s", place, dlq(record.topic), group, words)


def letters(log: Log, topic: str) -> list[Letter]:
    """The dead letters of a topic, oldest first within a partition, each once. What somebody else put there and is none
    is logged and left out."""
    found: dict[str, Letter] = {}
    replayed: set[str] = set()
    for record in _read(log, dlq(topic)):
        headers = {name: value.decode(errors="replace") for name, value in record.message.headers}
        if note := headers.get("dlq_replayed"):
            replayed.add(note)
        elif headers.get("dlq_id") not in found:
            try:
                found[headers["dlq_id"]] = _letter(record, headers)
            except (KeyError, ValueError) as error:
                place = f"{record.topic} partition {record.partition} offset {record.offset}"
                logger.warning("%s is no dead letter: its headers lack or spoil %s", place, error)
    return [
        Letter(one.id, one.topic, one.partition, one.offset, one.group, one.why, one.original, one.id in replayed)
        for one in found.values()
    ]


def replay(log: Log, chosen: Letter) -> None:
    """Send the original again, bytes, key, time and headers, then note that it was sent. Readers know it by the id in
    the event itself: what was counted already is not counted again. A letter that was replayed already is sent once
    more."""
    original = chosen.original
    id = f"{original.id}/{chosen.id}"
    if chosen.replayed:
        id += f"/{new_id()}"  # a log that drops copies by the id would take it for the first replay
    log.append(chosen.topic, [Message(id, original.key, original.time, original.value, original.headers)])
    note_id = str(uuid.uuid5(_LETTERS, f"replayed {chosen.id}"))
    note = Message(note_id, original.key, original.time, b"", (("dlq_replayed", chosen.id.encode()),))
    log.append(dlq(chosen.topic), [note])


def _letter(record: Record, headers: dict[str, str]) -> Letter:
    message = record.message
    kept = tuple(item for item in message.headers if not item[0].startswith(_OWN))
    return Letter(
        id=headers["dlq_id"],
        topic=headers["dlq_topic"],
        partition=int(headers["dlq_partition"]),
        offset=int(headers["dlq_offset"]),
        group=headers["dlq_group"],
        why=headers["dlq_error"],
        original=Message(headers["dlq_original_id"], message.key, message.time, message.value, kept),
    )


def _read(log: Log, topic: str) -> Iterator[Record]:
    for partition in range(log.partitions(topic)):
        yield from read_all(log, topic, partition=partition)
