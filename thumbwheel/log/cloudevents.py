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
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z", re.ASCII)
_YEAR_10000 = 253_402_300_800


def to_headers(message: Message) -> list[tuple[str, bytes]]:
    """All headers of a message: those that it brings, and what they lack for a CloudEvent of its id and time.

    Of two headers of one name the later one counts, here and for other readers.
    """
    given = dict(message.headers)
    headers = [*message.headers, *(item for item in _FIXED if item[0] not in given)]
    if _text(given.get("ce_id")) != message.id:
        headers.append(("ce_id", message.id.encode(errors="replace")))
    if _seconds(_text(given.get("ce_time"))) != message.time:
        headers.append(("ce_time", timestamp(message.time).encode()))
    return headers


def from_record(
    key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]], time: float, place: str
) -> Message:
    """The message in a Kafka record, whoever wrote it. `time` and `place` stand in for a lacking time and id."""
    given = tuple((name, content or b"") for name, content in headers)
    attributes = dict(given)
    id = _text(attributes.get("ce_id")) or place
    seconds = _seconds(_text(attributes.get("ce_time")))
    moment = bounded(time) if seconds is None else seconds
    own = {("ce_id", id.encode()), ("ce_time", timestamp(moment).encode()), *_FIXED}
    return Message(
        id=id,
        key="" if key is None else key.decode(errors="surrogateescape"),
        time=moment,
        value=value or b"",
        headers=tuple(item for item in given if item not in own),
    )


def bounded(time: float) -> float:
    """Unix seconds, cut to what RFC 3339 can say: the years 1970 to 9999."""
    return min(max(time, 0.0), _YEAR_10000 - 0.001) if time == time else 0.0


def timestamp(time: float) -> str:
    """Unix seconds as RFC 3339, with as many digits as it takes for the float to survive the way there and back."""
    time = bounded(time)
    seconds, fraction = (repr(float(time)) if time == 0 or time >= 1e-4 else f"{time:.9f}").split(".")
    return f"{clock.strftime('%Y-%m-%dT%H:%M:%S', clock.gmtime(int(seconds)))}.{fraction}Z"


def _seconds(stamp: str) -> float | None:
    """The time that `timestamp` wrote; None where it is no such thing."""
    match = _TIME.fullmatch(stamp)
    if match is None:
        return None
    try:
        seconds = calendar.timegm(clock.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None
    return bounded(float(f"{seconds}{match[2] or ''}"))


def _text(content: bytes | None) -> str:
    return (content or b"").decode(errors="replace")
