import json
import time
import uuid

import pytest
from pydantic import ValidationError

from thumbwheel.events import FeedbackSubmitted, ReplicaReported, decode, encode, new_id, schemas


def test_ids_are_uuid7_and_sort_by_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len({new_id() for _ in range(10_000)}) == 10_000
    parsed = uuid.UUID(ids[0])
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert abs((parsed.int >> 80) / 1000 - time.time()) < 5


def test_an_event_survives_the_log_unchanged() -> None:
    event = FeedbackSubmitted(
        source="gateway/r1", response_id="chatcmpl-1", rating="down", comment="größer ✓", api_key="app", user="u"
    )
    assert decode(encode(event)) == event
    assert event.key == "chatcmpl-1"


def test_fields_of_a_newer_minor_version_are_ignored() -> None:
    value = json.loads(encode(ReplicaReported(source="x", replica="r1", serving="base")))
    value |= {"schema_version": "1.7", "colour": "red"}
    event = decode(json.dumps(value).encode())
    assert isinstance(event, ReplicaReported)


def test_a_newer_major_version_is_refused() -> None:
    value = json.loads(encode(ReplicaReported(source="x", replica="r1", serving="base"))) | {"schema_version": "2.0"}
    with pytest.raises(ValueError, match=r"schema version 2\.0"):
        decode(json.dumps(value).encode())


@pytest.mark.parametrize("value", [b"", b"[]", b"{", b'{"type": "nothing.known"}', b'{"type": "feedback.submitted"}'])
def test_bytes_that_are_no_event_are_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode(value)


def test_events_cannot_be_changed() -> None:
    event = ReplicaReported(source="x", replica="r1", serving="base")
    with pytest.raises(ValidationError, match="frozen"):
        event.serving = "v1"  # type: ignore[misc]


def test_every_event_has_a_json_schema() -> None:
    assert len(schemas()) == 9
    for schema in schemas().values():
        assert {"id", "time", "source", "schema_version", "type"} <= set(schema["properties"])
