"""Whatever keeps us from the cluster is said in time, with the setting and the cause, and leaves nothing behind."""

import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka import errors

from tests import kafka
from thumbwheel.demo.broker import free_ports
from thumbwheel.errors import LogError, SettingsError
from thumbwheel.events import FEEDBACK
from thumbwheel.log import Log, Message
from thumbwheel.log.kafka import connection
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.settings import Settings

pytestmark = pytest.mark.slow

TIMEOUT_S = 0.8
Act = Callable[[Log], object]
ONE = [Message("a", "k", 1.0, b"{}")]


def at(address: str, **more: Any) -> Settings:
    return Settings(log=kafka.kafka(address, timeout_s=TIMEOUT_S, **more))


def refused(settings: Settings, act: Act = lambda log: log.identity, within: float = 1.5) -> str:
    """What the error says; it comes within the timeout, and a little."""
    log = KafkaLog(settings)
    start = time.monotonic()
    with pytest.raises(LogError) as caught:
        act(log)
    assert time.monotonic() - start < TIMEOUT_S + within
    log.close()
    return str(caught.value)


def followed(settings: Settings) -> str:
    """What a consumer's poll raises."""
    consumer = KafkaLog(settings).consumer("learner", [FEEDBACK])
    try:
        for _ in range(100):
            assert consumer.poll() == []
            time.sleep(0.1)
    except LogError as error:
        return str(error)
    finally:
        consumer.close()
    raise AssertionError("the consumer said nothing")


@pytest.fixture
def silent() -> Any:
    """An address where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"bootstrap": ""}, "bootstrap is empty"),
        ({"bootstrap": "broker"}, 'bootstrap is "broker"'),
        ({"bootstrap": "a:1,b:x"}, 'bootstrap is "a:1,b:x"'),
        ({"prefix": "a/b"}, 'prefix is "a/b"'),
        ({"member": "ein Name"}, 'member is "ein Name"'),
        ({"security_protocol": "SASL_SSL"}, "username is empty"),
        ({"security_protocol": "SASL_PLAINTEXT", "username": "u"}, "there is no password"),
        ({"security_protocol": "SASL_PLAINTEXT", "username": "u", "password_file": "none"}, "password_file none"),
        ({"security_protocol": "SSL", "ca_file": "none.pem"}, "ca_file none.pem"),
        ({"security_protocol": "SSL", "certificate_file": "none.pem"}, "certificate_file or key_file"),
    ],
)
def test_settings_that_cannot_work_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], named: str
) -> None:
    monkeypatch.delenv(connection.PASSWORD, raising=False)
    with pytest.raises(SettingsError) as caught:
        Connection(Settings(log={"backend": "kafka", "kafka": {"bootstrap": "127.0.0.1:9092", **values}}))
    assert named in str(caught.value)
    assert "[log.kafka]" in str(caught.value)


def test_a_password_comes_from_a_file_or_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("from the file\n")
    sasl = {"security_protocol": "SASL_PLAINTEXT", "username": "u", "password_file": "password"}
    settings = Settings(data=tmp_path, log=kafka.kafka("127.0.0.1:9092", **sasl))
    monkeypatch.delenv(connection.PASSWORD, raising=False)
    assert Connection(settings).options["sasl_plain_password"] == "from the file"
    monkeypatch.setenv(connection.PASSWORD, "from the environment")
    assert Connection(settings).options["sasl_plain_password"] == "from the environment"


def test_nobody_listens() -> None:
    (port,) = free_ports(1)
    acts: list[Act] = [
        lambda log: log.identity,
        lambda log: log.append(FEEDBACK, ONE),
        lambda log: log.read(FEEDBACK, 0),
    ]
    for act in acts:
        said = refused(at(f"127.0.0.1:{port}"), act)
        assert f'[log.kafka] bootstrap = "127.0.0.1:{port}"' in said
        assert "ECONNREFUSED" in said
    assert "ECONNREFUSED" in followed(at(f"127.0.0.1:{port}"))


def test_a_host_that_does_not_exist() -> None:
    said = refused(at("no-such-host.invalid:9092"), within=10.0)
    assert "there is no host no-such-host.invalid:9092" in said
    assert "[log.kafka] bootstrap" in said


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_a_host_that_says_nothing(silent: str, protocol: str) -> None:
    acts: list[Act] = [lambda log: log.identity, lambda log: log.append(FEEDBACK, ONE)]
    for act in acts:
        said = refused(at(silent, security_protocol=protocol), act)
        assert f'[log.kafka] bootstrap = "{silent}", timeout_s = {TIMEOUT_S:g}' in said
        assert "did not answer in time" in said


def test_what_answers_is_no_broker() -> None:
    def greet(listener: socket.socket) -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            connected.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connected.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=greet, args=(listener,), daemon=True).start()
        said = refused(at(f"127.0.0.1:{listener.getsockname()[1]}"))
        listener.shutdown(socket.SHUT_RDWR)
    assert "[log.kafka] security_protocol" in said
    assert "is no broker" in said


def test_the_reasons_of_an_earlier_failure_are_not_given_for_a_later_one(silent: str) -> None:
    assert "there is no host" in refused(at("no-such-host.invalid:9092"), within=10.0)
    (port,) = free_ports(1)
    assert "ECONNREFUSED" in refused(at(f"127.0.0.1:{port}"))
    said = refused(at(silent))
    assert "did not answer" in said
    assert "ECONNREFUSED" not in said
    assert "no-such-host" not in said


def test_failures_leave_no_threads_and_no_sockets(silent: str) -> None:
    (port,) = free_ports(1)
    addresses = [f"127.0.0.1:{port}", silent]
    acts: list[Act] = [lambda log: log.identity, lambda log: log.append(FEEDBACK, ONE)]
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for address in addresses:
        for protocol in ("PLAINTEXT", "SSL"):
            settings = Settings(log=kafka.kafka(address, timeout_s=0.3, security_protocol=protocol))
            log = KafkaLog(settings)
            for act in acts:
                with pytest.raises(LogError):
                    act(log)
            log.close()
            assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.kafka
@pytest.mark.parametrize(
    "act",
    [
        lambda log: log.append(FEEDBACK, ONE),
        lambda log: log.read(FEEDBACK, 0),
        lambda log: log.ends(FEEDBACK),
        lambda log: log.offset_at(FEEDBACK, 1.0),
        lambda log: log.partitions(FEEDBACK),
        lambda log: log.commit("learner", FEEDBACK, 1),
    ],
    ids=["append", "read", "ends", "offset_at", "partitions", "commit"],
)
def test_a_topic_that_is_missing(kafka_address: str, act: Act) -> None:
    said = refused(at(kafka_address), act)
    assert "topic" in said
    assert "`thumbwheel log init`" in said
    assert "[log.kafka] prefix" in said


@pytest.mark.kafka
def test_a_consumer_of_a_topic_that_is_missing(kafka_address: str) -> None:
    said = followed(at(kafka_address))
    assert "topic is missing" in said
    assert "`thumbwheel log init`" in said


@pytest.mark.parametrize(
    ("error", "logged", "words", "setting"),
    [
        (errors.NotEnoughReplicasError(), "", "too few replicas", "min_insync_replicas"),
        (
            errors.KafkaTimeoutError("Expiring 1 record(s)"),
            "Got error produce response on topic-partition t-0, retrying (inf attempts left): NotEnoughReplicasError",
            "too few replicas",
            "min_insync_replicas",
        ),
        (errors.FencedInstanceIdError(), "", "another process has taken over as member m1", "member"),
        (errors.GroupAuthorizationFailedError("g"), "", "user anonymous may not", "username"),
        (errors.KafkaTimeoutError("no word of why"), "", "no word of why", "bootstrap"),
        (errors.CorruptRecordError("crc"), "Handshake failed: [SSL] bad", "crc", "bootstrap"),
    ],
)
def test_errors_in_words(error: errors.KafkaError, logged: str, words: str, setting: str) -> None:
    start = time.time()
    logging.getLogger("kafka.test").warning(logged)
    said = str(Connection(at("127.0.0.1:9092")).explain("send to", error, start))
    assert said.startswith(f"cannot send to Kafka ([log.kafka] {setting}")
    assert words in said
