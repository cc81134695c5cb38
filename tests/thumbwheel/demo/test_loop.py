"""The loop under the demo, with the kinds of log that it can have. No engine starts: there is no model."""

import math
import socket
from pathlib import Path

import pytest
from prometheus_client import start_http_server

from learner import metrics
from tests.kafka import kafka, needs_release
from thumbwheel.demo import loop as demo_loop
from thumbwheel.demo.loop import LogName, Loop
from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import FEEDBACK, FeedbackSubmitted
from thumbwheel.log import message_of
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.topics import wanted
from thumbwheel.settings import Settings, load

BOOTSTRAP = "THUMBWHEEL_LOG__KAFKA__BOOTSTRAP"


def loop(data: Path, log: LogName) -> Loop:
    return Loop(data, data / "no-model", batch=8, updates=2, kl_samples=8, log=log)


def vote(number: int) -> FeedbackSubmitted:
    return FeedbackSubmitted(response_id=f"chatcmpl-{number}", rating="up", user="u", api_key="k", source="test")


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def test_without_a_kafka_the_demo_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    monkeypatch.delenv(BOOTSTRAP, raising=False)
    with pytest.raises(ThumbwheelError, match=rf"{BOOTSTRAP} is not set.*\$KAFKA_HOME"):
        loop(tmp_path, "kafka")
    assert not (tmp_path / "up.log").exists()


def test_the_demo_never_writes_to_topics_that_somebody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BOOTSTRAP, "127.0.0.1:1")
    monkeypatch.setenv("THUMBWHEEL_LOG__KAFKA__PREFIX", "production.")
    with pytest.raises(ThumbwheelError, match="unset THUMBWHEEL_LOG__KAFKA__PREFIX"):
        loop(tmp_path, "kafka")


def test_the_sqlite_log_counts_its_votes(tmp_path: Path) -> None:
    with loop(tmp_path, "sqlite") as running:
        assert running.settings.log.backend == "sqlite"
        running.log.append(FEEDBACK, [message_of(vote(number)) for number in range(5)])
        assert running.votes() == 5


@pytest.mark.slow
def test_it_is_known_when_the_greedy_settings_are_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop(tmp_path, "sqlite") as running:
        running.wait(lambda: "control" in running.starts(), "the controller", 60, lambda: None)
        before = running.starts()
        assert not running.renewed(before), "the others have no model and do not answer"
        monkeypatch.setattr(demo_loop, "RENEWED", ("control",))
        assert not running.renewed(before)
        running.be_greedy(5e-3)
        running.wait(lambda: running.renewed(before), "the new one", 60, lambda: None)
        assert running.starts()["control"] > before["control"]
        assert load(running.config).learner.kl_budget == math.inf


def test_it_is_known_what_the_learner_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop(tmp_path, "sqlite") as running:
        assert not running.lacks_votes()
        server, thread = start_http_server(0, "127.0.0.1")
        monkeypatch.setitem(running._values, "learner", server.server_port)
        try:
            for lacking in (1, 0):
                metrics.missing.labels("up").set(lacking)
                assert running.lacks_votes() == bool(lacking)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.mark.kafka
def test_on_a_given_cluster_it_counts_over_partitions_and_leaves_no_topic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kafka_address: str
) -> None:
    monkeypatch.setenv(BOOTSTRAP, kafka_address)

    def topics() -> set[str]:
        admin = Connection(Settings(data=tmp_path, log=kafka(kafka_address))).admin()
        try:
            return set(admin.list_topics())
        finally:
            admin.close()

    with loop(tmp_path, "kafka") as running:
        prefix = running.settings.log.kafka.prefix
        assert {prefix + topic.name for topic in wanted(running.settings)} <= topics()
        running.log.append(FEEDBACK, [message_of(vote(number)) for number in range(40)])
        used = [partition for partition in range(3) if running.log.ends(FEEDBACK, partition)[1]]
        assert len(used) > 1
        assert running.votes() == 40
    assert not {name for name in topics() if name.startswith(prefix)}
    assert answers(kafka_address)


@pytest.mark.kafka
def test_a_broker_of_its_own_is_gone_afterwards_and_its_data_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_release()
    monkeypatch.delenv(BOOTSTRAP, raising=False)
    with loop(tmp_path, "kafka") as running:
        address = running.settings.log.kafka.bootstrap
        assert answers(address)
        running.log.append(FEEDBACK, [message_of(vote(1))])
        running.be_greedy(5e-3)
        assert load(running.config).log == running.settings.log
    assert not answers(address)
    assert list((tmp_path / "kafka").rglob(f"{running.settings.log.kafka.prefix}{FEEDBACK}-*"))


@pytest.mark.kafka
def test_a_loop_that_cannot_start_leaves_no_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_release()
    monkeypatch.delenv(BOOTSTRAP, raising=False)
    monkeypatch.setenv("THUMBWHEEL_LOG__KAFKA__REPLICATION", "3")
    with pytest.raises(ThumbwheelError, match=r"replication is 3, but the cluster has 1 broker"):
        loop(tmp_path, "kafka")
    address = load(tmp_path / "thumbwheel.toml").log.kafka.bootstrap
    assert not answers(address)
