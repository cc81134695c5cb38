"""Messages as CloudEvents: nothing is lost on the way, whoever wrote it, and strangers can read what we write."""

import json
import os
import subprocess
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary, to_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import Consumer, Producer, TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from tests import kafka
from thumbwheel.events import FEEDBACK, FeedbackSubmitted
from thumbwheel.log import Message, message_of, open_log
from thumbwheel.log.cloudevents import from_record, timestamp, to_headers

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TIMES = st.just(0.0) | st.floats(1e-4, 253_402_300_799, allow_subnormal=False)
NAMES = TEXT | st.sampled_from(["ce_id", "ce_time", "ce_type", "ce_source", "ce_specversion", "content-type"])
MESSAGES = st.builds(
    Message,
    id=TEXT.filter(bool),
    key=TEXT | st.binary().map(lambda key: key.decode(errors="surrogateescape")),
    time=TIMES,
    value=st.binary(),
    headers=st.lists(st.tuples(NAMES, st.binary() | st.just(b"1.0")), unique_by=lambda item: item[0]).map(tuple),
)


def there_and_back(message: Message) -> Message:
    """As it is after Kafka had it, which keeps times to the millisecond."""
    key = message.key.encode(errors="surrogateescape")
    return from_record(key, message.value, to_headers(message), int(message.time * 1000) / 1000, "t/0/0")


@given(MESSAGES)
def test_any_message_survives(message: Message) -> None:
    back = there_and_back(message)
    assert (back.id, back.key, back.time, back.value) == (message.id, message.key, message.time, message.value)
    assert set(to_headers(back)) == set(to_headers(message))
    own = {"ce_id", "ce_time", "ce_specversion", "content-type"}
    assert [item for item in back.headers if item[0] not in own] == [
        item for item in message.headers if item[0] not in own
    ]


@given(MESSAGES.filter(lambda message: not message.headers))
def test_a_message_without_headers_has_none_afterwards(message: Message) -> None:
    assert there_and_back(message) == message


@given(
    st.none() | st.binary(),
    st.none() | st.binary(),
    st.lists(st.tuples(NAMES, st.none() | st.binary()), unique_by=lambda item: item[0]),
    st.integers(-(2**63), 2**63 - 1).map(lambda millis: millis / 1000),
)
def test_whatever_lies_on_a_topic_is_a_message_and_stays_the_same_when_it_is_written_again(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]], time: float
) -> None:
    message = from_record(key, value, headers, time, "t/0/7")
    assert message.id
    written = to_headers(message)
    for item in headers:
        assert (item[0], item[1] or b"") in written
    back = there_and_back(message)
    assert (back.id, back.key, back.time, back.value) == (message.id, message.key, message.time, message.value)


def test_a_strangers_record_gets_its_place_as_its_id() -> None:
    message = from_record(None, None, [], 1.25, "t/0/7")
    assert message == Message("t/0/7", "", 1.25, b"")


@pytest.mark.parametrize(
    "stamp", [b"", b"yesterday", b"2026-13-01T00:00:00Z", b"2026-01-01T00:00:00+02:00", b"\xff", b"9999999999"]
)
def test_a_time_that_cannot_be_read_is_the_records_and_its_words_stay(stamp: bytes) -> None:
    message = from_record(b"k", b"{}", [("ce_time", stamp)], 1.25, "t/0/7")
    assert message.time == 1.25
    assert ("ce_time", stamp) in message.headers


@pytest.mark.parametrize("stamp", ["2026-05-01T14:30:00Z", "2026-05-01T14:30:00.25Z", "2026-05-01T14:30:00.250000Z"])
def test_times_of_other_writers_are_read_and_left_as_they_are(stamp: str) -> None:
    message = from_record(b"k", b"{}", [("ce_time", stamp.encode())], 1.25, "t/0/7")
    assert message.time == datetime.fromisoformat(stamp).timestamp()
    assert [content for name, content in to_headers(message) if name == "ce_time"] == [stamp.encode()]


@given(TIMES)
def test_times_are_written_as_rfc_3339_has_them(seconds: float) -> None:
    stamp = timestamp(seconds)
    assert stamp.endswith("Z")
    read = datetime.fromisoformat(stamp[:19] + "+00:00")
    assert read == datetime.fromtimestamp(int(seconds), UTC)


# --- strangers ---


def vote() -> FeedbackSubmitted:
    return FeedbackSubmitted(
        source="gateway/r1",
        response_id=f"resp_{uuid.uuid4().hex}",
        rating="up",
        comment="schön ✓",
        api_key="k",
        user="u",
    )


@pytest.fixture
def written(kafka_address: str, tmp_path: Path) -> tuple[str, list[FeedbackSubmitted]]:
    """The topic's name on the cluster, and what KafkaLog wrote there."""
    settings = kafka.on(kafka_address, tmp_path, partitions=1)
    log = open_log(settings)
    events = [vote() for _ in range(3)]
    log.append(FEEDBACK, [message_of(event) for event in events])
    log.close()
    return settings.log.kafka.prefix + FEEDBACK, events


def by_librdkafka(address: str, topic: str, count: int) -> list[Any]:
    consumer = Consumer({"bootstrap.servers": address, "group.id": "stranger", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[Any] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        if (record := consumer.poll(0.5)) is not None:
            assert record.error() is None
            found.append(record)
    consumer.close()
    return found


@pytest.mark.kafka
def test_librdkafka_and_the_sdk_of_cloudevents_read_what_we_write(
    kafka_address: str, written: tuple[str, list[FeedbackSubmitted]]
) -> None:
    topic, events = written
    records = by_librdkafka(kafka_address, topic, len(events))
    assert len(records) == len(events)
    for record, event in zip(records, events, strict=True):
        headers = dict(record.headers())
        read = from_binary(KafkaMessage(headers, record.key(), record.value()), JSONFormat(), CloudEvent)
        assert read.get_id() == event.id
        assert read.get_type() == "feedback.submitted"
        assert read.get_source() == "gateway/r1"
        assert read.get_specversion() == "1.0"
        stamp = read.get_time()
        assert stamp is not None
        assert abs(stamp.timestamp() - event.time) < 1e-5
        assert read.get_extension("partitionkey") == event.response_id
        assert FeedbackSubmitted.model_validate(read.get_data()) == event
        assert record.timestamp()[1] == int(event.time * 1000)


@pytest.mark.kafka
def test_what_the_sdk_of_cloudevents_writes_is_read_here(kafka_address: str, tmp_path: Path) -> None:
    settings = kafka.on(kafka_address, tmp_path)
    event = vote()
    attributes = {
        "id": event.id,
        "type": "feedback.submitted",
        "source": "somebody/else",
        "specversion": "1.0",
        "datacontenttype": "application/json",
        "time": datetime.fromtimestamp(event.time, UTC),
        "partitionkey": event.response_id,
    }
    sent = to_binary(CloudEvent(attributes, json.loads(event.model_dump_json())), JSONFormat())
    producer = Producer({"bootstrap.servers": kafka_address})
    producer.produce(
        settings.log.kafka.prefix + FEEDBACK,
        key=sent.key,
        value=sent.value,
        headers=list(sent.headers.items()),
        partition=0,
    )
    assert producer.flush(20) == 0
    log = open_log(settings)
    (record,) = log.read(FEEDBACK, 0)
    log.close()
    message = record.message
    assert (message.id, message.key) == (event.id, event.response_id)
    assert FeedbackSubmitted.model_validate_json(message.value) == event
    assert dict(message.headers)["ce_source"] == b"somebody/else"


@pytest.mark.kafka
def test_the_consumer_that_comes_with_kafka_reads_what_we_write(
    kafka_address: str, written: tuple[str, list[FeedbackSubmitted]]
) -> None:
    topic, events = written
    kafka.needs_release()
    command = [
        f"{os.environ['KAFKA_HOME']}/bin/kafka-console-consumer.sh",
        "--bootstrap-server",
        kafka_address,
        "--topic",
        topic,
    ]
    options = ["--partition", "0", "--offset", "earliest", "--max-messages", str(len(events)), "--timeout-ms", "20000"]
    formats = ["--formatter-property", "print.key=true", "--formatter-property", "print.headers=true"]
    done = subprocess.run([*command, *options, *formats], capture_output=True, text=True, check=True)
    for line, event in zip(done.stdout.splitlines(), events, strict=True):
        headers, key, value = line.split("\t")
        assert f"ce_id:{event.id}" in headers.split(",")
        assert "ce_type:feedback.submitted" in headers.split(",")
        assert key == event.response_id
        assert FeedbackSubmitted.model_validate_json(value) == event
