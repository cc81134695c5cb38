"""Messages as CloudEvents 1.0 in Kafka's binary content mode: attributes as `ce_` headers, the event as the value.

Specification: "Kafka Protocol Binding for CloudEvents", version 1.0.2, section 3.2. What somebody else wrote is kept as
it is: headers that we would not have written ourselves stay in `Message.headers`, byte for byte.
"""

import calendar
import re
import time as clock
from collections.abc import Iterable

from thumbwheel.log.port import Headers, Message

CONTENT_TYPE = b"application/json"
_FIXED: Headers = (("ce_specversion", b"1.0"), ("content-type", CONTENT_TYPE))
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z")


def to_headers(message: Message) -> list[tuple[str, bytes]]:
    """All headers of a message: those that it brings, and what is missing for a CloudEvent."""
    there = {name for name, _ in message.headers}
    own = (("ce_id", message.id.encode()), ("ce_time", timestamp(message.time).encode()), *_FIXED)
    return [*message.headers, *(item for item in own if item[0] not in there)]


def from_record(
    key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]], time: float, place: str
) -> Message:
    """The message in a Kafka record, whoever wrote it. `time` and `place` stand in for a lacking time and id."""
    given = [(name, content or b"") for name, content in headers]
    attributes = dict(given)
    id = attributes.get("ce_id", b"").decode(errors="replace") or place
    stamp = attributes.get("ce_time", b"").decode(errors="replace")
    message = Message(
        id=id,
        key="" if key is None else key.decode(errors="surrogateescape"),
        time=_seconds(stamp, time),
        value=value or b"",
    )
    canonical = set(to_headers(message))
    kept = tuple(item for item in given if item not in canonical)
    return Message(message.id, message.key, message.time, message.value, kept)


def timestamp(time: float) -> str:
    """Unix seconds as RFC 3339, with as many digits as it takes for the float to survive the way there and back."""
    seconds, fraction = (repr(float(time)) if 1e-4 < time < 1e15 else f"{time:.9f}").split(".")
    return f"{clock.strftime('%Y-%m-%dT%H:%M:%S', clock.gmtime(int(seconds)))}.{fraction}Z"


def _seconds(stamp: str, default: float) -> float:
    match = _TIME.fullmatch(stamp)
    if match is None:
        return default
    try:
        seconds = calendar.timegm(clock.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return default
    return float(f"{seconds}{match[2] or ''}")
