"""Behind TLS: whoever has the right word works as anybody does, and whoever has not is told which setting it is."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import kafka
from tests.thumbwheel.log.kafka.secured import PASSWORD, Secured
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, ROLLOUT
from thumbwheel.log import Log, Message
from thumbwheel.log.kafka import connection, topics
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.settings import Settings

pytestmark = pytest.mark.kafka

TIMEOUT_S = 1.2


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(connection.PASSWORD, PASSWORD)


@pytest.fixture
def door(secured: Secured, tmp_path: Path) -> Callable[..., Settings]:
    """Settings for one of the listeners; `more` changes some."""

    def settings(address: str = secured.secure, **more: Any) -> Settings:
        values = {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "username": "writer",
            "ca_file": secured.directory / "ca.pem",
            "timeout_s": TIMEOUT_S,
            "partitions": 1,
        }
        return Settings(data=tmp_path, log=kafka.kafka(address, **values | more))

    return settings


def refused(settings: Settings, act: Callable[[Log], object] = lambda log: log.identity) -> str:
    """What the error says; it comes within the timeout, and a little."""
    log = KafkaLog(settings)
    start = time.monotonic()
    with pytest.raises(LogError) as caught:
        act(log)
    assert time.monotonic() - start < TIMEOUT_S + 1.0
    log.close()
    return str(caught.value)


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-512", "certificate"])
def test_the_right_word_appends_reads_and_consumes(secured: Secured, door: Callable[..., Settings], way: str) -> None:
    if way == "certificate":
        own = {"certificate_file": secured.directory / "client.pem", "key_file": secured.directory / "client.key"}
        settings = door(secured.mutual, security_protocol="SSL", timeout_s=15.0, **own)
    else:
        settings = door(sasl_mechanism=way, timeout_s=15.0)
    assert len(topics.make(settings)) == 6
    log = KafkaLog(settings)
    sent = [Message(str(i), f"k{i % 3}", 1.5, bytes(10_000)) for i in range(50)]
    log.append(FEEDBACK, sent)
    assert [record.message for record in log.read(FEEDBACK, 0)] == sent
    consumer = log.consumer("learner", [FEEDBACK])
    found: list[Message] = []
    deadline = time.monotonic() + 20
    while len(found) < 50 and time.monotonic() < deadline:
        found += [record.message for record in consumer.poll()]
        time.sleep(0.02)
    assert found == sent
    consumer.close()
    log.close()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_a_wrong_password(door: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, mechanism: str) -> None:
    monkeypatch.setenv(connection.PASSWORD, "a wrong one")
    said = refused(door(sasl_mechanism=mechanism))
    assert "refuses user writer" in said
    assert "[log.kafka] username, password_file or $THUMBWHEEL_KAFKA_PASSWORD" in said
    assert "a wrong one" not in said


def test_a_mechanism_that_is_not_enabled(door: Callable[..., Settings]) -> None:
    assert "[log.kafka] sasl_mechanism" in refused(door(sasl_mechanism="SCRAM-SHA-256"))


def test_a_wrong_certificate_authority(secured: Secured, door: Callable[..., Settings]) -> None:
    said = refused(door(ca_file=secured.directory / "other.pem"))
    assert "[log.kafka] ca_file" in said
    assert "cannot be verified" in said


def test_a_name_that_is_not_in_the_certificate(secured: Secured, door: Callable[..., Settings]) -> None:
    said = refused(door(secured.secure.replace("localhost", "127.0.0.1")))
    assert "[log.kafka] bootstrap" in said
    assert "not for 127.0.0.1" in said


def test_no_certificate_where_one_is_asked_for(secured: Secured, door: Callable[..., Settings]) -> None:
    assert "[log.kafka] certificate_file" in refused(door(secured.mutual, security_protocol="SSL"))


@pytest.mark.parametrize(
    ("listener", "protocol"),
    [
        ("secure", "PLAINTEXT"),
        ("secure", "SSL"),
        ("plain", "SSL"),
        ("plain", "SASL_PLAINTEXT"),
    ],
)
def test_a_protocol_that_the_listener_does_not_speak(
    secured: Secured, door: Callable[..., Settings], listener: str, protocol: str
) -> None:
    said = refused(door(getattr(secured, listener), security_protocol=protocol))
    assert f'[log.kafka] security_protocol = "{protocol}"' in said


def test_a_user_without_rights(door: Callable[..., Settings]) -> None:
    theirs = door(timeout_s=15.0)
    topics.make(theirs)
    settings = door(username="stranger", sasl_mechanism="PLAIN", prefix=theirs.log.kafka.prefix)
    said = refused(settings, lambda log: log.append(ROLLOUT, [Message("a", "k", 1.0, b"{}")]))
    assert "[log.kafka] username" in said
    assert "user stranger may not" in said
    assert "hides it from this user" in refused(settings, lambda log: log.read(ROLLOUT, 0))
    assert "user stranger may not" in refused(settings, lambda log: log.committed("learner", ROLLOUT))
