"""Looking at the log: a reader that belongs to no group, and records in words or as JSON for whoever looks."""

import base64
import heapq
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from thumbwheel.events import (
    AdapterPromoted,
    AdapterRolledBack,
    AnyEvent,
    CandidateApproved,
    CandidateRejected,
    CandidateSubmitted,
    EvaluationReported,
    FeedbackSubmitted,
    ReplicaReported,
    ResponseGenerated,
)
from thumbwheel.log.port import Log, Message, Record
from thumbwheel.reader import event_of

_BATCH = 200
_START_OF_TEXT = 60
_JOINERS = "\u200c\u200d"
"""Not printable by themselves; Persian and emojis are spelled with them."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class Tail:
    """Where a reader stands on some topics. It reads by `Log.read` alone, so nobody else's place moves."""

    def __init__(self, log: Log, topics: Sequence[str], start: Callable[[str, int], int]) -> None:
        """`start` gives the first offset of a topic's partition. Raises LogError where a topic cannot be read."""
        self._log = log
        self._topics = topics
        self._next = {
            (topic, partition): start(topic, partition)
            for topic in topics
            for partition in range(log.partitions(topic))
        }

    def fresh(self) -> Iterator[Record]:
        """What is on the log and was not given yet, in the order of its times; within a partition as it lies there.

        Raises LogError where the log cannot be read; asked again, it goes on behind the last record that it gave.
        """
        places = [
            (topic, partition) for topic in self._topics for partition in range(self._log.partitions(topic))
        ]  # a topic may have got more partitions
        for record in heapq.merge(*(self._from(*place) for place in places), key=lambda record: record.message.time):
            self._next[record.topic, record.partition] = record.offset + 1
            yield record

    def _from(self, topic: str, partition: int) -> Iterator[Record]:
        offset = self._next.get((topic, partition), 0)
        while batch := self._log.read(topic, offset, _BATCH, partition):
            yield from batch
            offset = batch[-1].offset + 1


@dataclass(frozen=True)
class Seen:
    """A record, and the event in it. Where it holds none that can be read, `why` says so."""

    record: Record
    event: AnyEvent | None
    why: str = ""

    @property
    def type(self) -> str:
        return "" if self.event is None else self.event.type

    @property
    def version(self) -> str:
        """The adapter version that it is about, where it is about one."""
        if isinstance(self.event, ReplicaReported):
            return self.event.serving
        return getattr(self.event, "version", "")

    @property
    def user(self) -> str:
        return getattr(self.event, "user", None) or ""


def look(record: Record) -> Seen:
    """Open a record as every program does; it never fails."""
    try:
        return Seen(record, event_of(record))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return Seen(record, None, f"{where}: {first['msg']}" if where else first["msg"])
    except (ValueError, RecursionError) as error:
        return Seen(record, None, str(error))


@dataclass(frozen=True)
class Filter:
    """Which records somebody wants to see; what is empty takes all."""

    key: str = ""
    type: str = ""
    version: str = ""
    user: str = ""
    """The hash that events carry, or how it starts."""
    grep: str = ""
    """A text that one of the event's values contains, in upper or lower case."""

    def takes(self, seen: Seen) -> bool:
        message = seen.record.message
        return (
            (not self.key or message.key == self.key)
            and (not self.type or seen.type == self.type)
            and (not self.version or seen.version == self.version)
            and (not self.user or seen.user.startswith(self.user))
            and (not self.grep or any(self.grep.casefold() in text.casefold() for text in _texts(message)))
        )


def _texts(message: Message) -> Iterator[str]:
    """Every text in a value that is JSON, else the value as text, and what the headers say."""
    try:
        pending = [json.loads(message.value)]
    except (ValueError, RecursionError):
        pending = [message.value.decode(errors="replace")]
    pending += [content.decode(errors="replace") for _, content in message.headers]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            pending += part.values()
        elif isinstance(part, list):
            pending += part
        elif isinstance(part, str):
            yield part


def moment(text: str, now: float) -> float:
    """`10m`, `2h`, `3d`, `45s` before `now`, or an ISO time (local where it names no zone), as Unix seconds.

    Raises ValueError where it is neither.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip()):
        return now - float(match[1]) * _UNITS[match[2]]
    try:
        return datetime.fromisoformat(text.strip()).astimezone().timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{text!r} is no time: it takes 45s, 10m, 2h, 3d, or an ISO time such as 2026-05-01T14:30"
        ) from None


def local(time: float) -> str:
    """Unix seconds as local time with its offset, ISO 8601."""
    try:
        return datetime.fromtimestamp(time).astimezone().isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{time:g} s"


def plain(text: str) -> str:
    """One line that a terminal shows and does not obey: spaces for line breaks, escapes for control characters."""
    return "".join(
        character
        if character.isprintable() or character in _JOINERS
        else " "
        if character.isspace()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def line(seen: Seen) -> str:
    """A record in one line: time, type, key, version and the words that matter."""
    message = seen.record.message
    if seen.event is None:
        place = f"{seen.record.topic} partition {seen.record.partition} offset {seen.record.offset}"
        words = f"{place}, {len(message.value)} bytes: {_short(seen.why, 160)}"
        return _columns(local(message.time), f"{'UNREADABLE':<20}", message.key, "-", words)
    return _columns(local(message.time), f"{seen.type:<20}", message.key, seen.version or "-", _words(seen.event))


def letter_line(record: Record) -> str:
    """A record of a dead-letter topic in one line."""
    headers = {name: content.decode(errors="replace") for name, content in record.message.headers}
    if note := headers.get("dlq_replayed"):
        words = f"replayed {note}"
    else:
        words = f"{headers.get('dlq_id', 'no letter')}  {headers.get('dlq_group', '')}  {headers.get('dlq_error', '')}"
    return _columns(local(record.message.time), f"{'dead letter':<20}", record.message.key, words)


def _columns(*columns: str) -> str:
    return "  ".join(map(plain, columns)).rstrip()


def as_json(seen: Seen) -> dict[str, Any]:
    """Where a record lies, then its event with every field that it came with. What is no event: its parts."""
    record = seen.record
    place: dict[str, Any] = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
    if seen.event is not None:
        return {**place, **json.loads(record.message.value)}
    return place | parts(record.message) | ({"unreadable": seen.why} if seen.why else {})


def parts(message: Message) -> dict[str, Any]:
    """A message whose value may be anything; bytes that are no UTF-8 as base64."""
    try:
        value = {"value": message.value.decode()}
    except UnicodeDecodeError:
        value = {"value_base64": base64.b64encode(message.value).decode()}
    headers = {name: content.decode(errors="replace") for name, content in message.headers}
    return {"id": message.id, "key": message.key, "time": message.time, "headers": headers, **value}


def _words(event: AnyEvent) -> str:
    match event:
        case ResponseGenerated():
            tokens = sum(len(choice.token_ids) for choice in event.choices)
            text = event.error or (event.choices[0].text if event.choices else "")
            return f"{event.outcome}  {tokens} tokens  {_quoted(text)}"
        case FeedbackSubmitted():
            vote = "retracted" if event.retracted else event.rating or "no rating"
            said = [", ".join(event.reasons), _quoted(event.comment or "")]
            return "  ".join([vote, *filter(None, said), f"by {event.user[:12]}"])
        case CandidateSubmitted():
            drift = f"KL at most {event.kl_upper:.2f}"
            return f"submitted: {event.algorithm} on {event.learned_from} votes, from {event.parent}, {drift}"
        case EvaluationReported():
            short = ", ".join(f"{check.name} {check.verdict}" for check in event.checks if check.verdict != "pass")
            return f"evaluated: {event.verdict}, {len(event.checks)} checks" + (f"; {short}" if short else "")
        case CandidateApproved():
            return f"approved{' by force' if event.forced else ''} by {event.actor}: {_short(event.reason)}"
        case CandidateRejected():
            return f"rejected by {event.actor}: {_short(event.reason)}"
        case AdapterPromoted():
            return f"promoted by {event.actor}, before: {event.previous}"
        case AdapterRolledBack():
            return f"rolled back from {event.rolled_back} by {event.actor}: {_short(event.reason)}"
        case ReplicaReported():
            held = [f"{version.version} {version.state}" for version in event.versions]
            return ", ".join([f"{event.replica} {'leaves' if event.leaving else f'serves {event.serving}'}", *held])


def _short(text: str, limit: int = _START_OF_TEXT) -> str:
    start = " ".join(text[: 4 * limit].split())
    return start if len(start) <= limit else f"{start[: limit - 1]}…"


def _quoted(text: str) -> str:
    return f'"{_short(text)}"' if text else ""
