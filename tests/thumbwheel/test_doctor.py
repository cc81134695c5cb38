"""What the doctor says about the log, with real parts that are broken in one way each."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import kafka
from tests.thumbwheel.command import configure, run
from tests.thumbwheel.samples import put, vote
from thumbwheel.doctor import Finding, examine
from thumbwheel.log.outbox import Outbox
from thumbwheel.settings import Settings

pytestmark = pytest.mark.slow


def about(settings: Settings, what: str) -> list[Finding]:
    return [finding for finding in examine(settings) if finding.what.startswith(what)]


def test_a_log_that_opens_is_fine(tmp_path: Path) -> None:
    (finding,) = about(Settings(data=tmp_path), "log")
    assert finding.ok


def test_a_log_that_is_no_database_is_a_problem_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "log.sqlite").write_bytes(b"not a database at all, not by far" * 200)
    (finding,) = about(Settings(data=tmp_path), "log")
    assert not finding.ok
    assert "[log] path" in finding.words


@pytest.mark.kafka
def test_a_cluster_with_its_topics_is_fine(kafka_address: str, tmp_path: Path) -> None:
    settings = kafka.on(kafka_address, tmp_path)
    assert [finding.ok for finding in [*about(settings, "kafka"), *about(settings, "topic")]] == [True, True]
    assert about(settings, "log") == []


@pytest.mark.kafka
def test_every_topic_that_is_missing_is_a_problem_with_the_command_that_mends_it(
    kafka_address: str, tmp_path: Path
) -> None:
    found = about(Settings(data=tmp_path, log=kafka.kafka(kafka_address)), "topic")
    assert len(found) == 6
    assert all("thumbwheel log init" in finding.words and not finding.ok for finding in found)


@pytest.mark.kafka
def test_topics_that_are_not_as_the_settings_say_are_problems(kafka_address: str, tmp_path: Path) -> None:
    made = kafka.on(kafka_address, tmp_path)
    log = made.log.model_copy(update={"kafka": made.log.kafka.model_copy(update={"response_retention_days": 1e6})})
    found = about(made.model_copy(update={"log": log}), "topic")
    assert ["retention.ms" in finding.words and not finding.ok for finding in found] == [True]


@pytest.mark.kafka
def test_what_waits_in_the_outbox_is_said(kafka_address: str, tmp_path: Path) -> None:
    settings = kafka.on(kafka_address, tmp_path)
    (before,) = about(settings, "outbox")
    assert before.ok
    assert not (tmp_path / "outbox.sqlite").exists()
    outbox = Outbox(settings.path(settings.log.outbox), settings.log.outbox_max_bytes)
    put(outbox, vote("r1"), vote("r2"))
    outbox.close()
    (after,) = about(settings, "outbox")
    assert after.ok
    assert "2 events wait" in after.words
    assert "bytes" in after.words


def test_an_outbox_that_is_no_database_is_a_problem_also_while_the_cluster_is_away(tmp_path: Path) -> None:
    (tmp_path / "outbox.sqlite").write_bytes(b"not a database at all, not by far" * 200)
    done = run(configure(tmp_path, kafka.kafka("127.0.0.1:1", timeout_s=1.0)), "doctor")
    assert [line for line in done.stdout.splitlines() if line.startswith("PROBLEM outbox") and "[log] outbox" in line]
    assert [line for line in done.stdout.splitlines() if line.startswith("PROBLEM kafka")]


@pytest.fixture
def silent() -> Iterator[str]:
    """Somebody who takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_is_away_is_said_within_the_time_that_the_settings_give_it(tmp_path: Path, silent: str) -> None:
    for address in ("127.0.0.1:1", silent):
        began = time.monotonic()
        done = run(configure(tmp_path, kafka.kafka(address, timeout_s=2.0)), "doctor", "--json")
        assert time.monotonic() - began < 12
        assert done.returncode == 1
        (finding,) = (one for one in json.loads(done.stdout) if one["what"] == "kafka")
        assert not finding["ok"]
        assert "[log.kafka] bootstrap" in finding["words"]
        assert address in finding["words"]


@pytest.mark.parametrize(
    ("more", "setting"),
    [
        ({"address": ""}, "bootstrap"),
        ({"address": "localhost:kafka"}, "bootstrap"),
        ({"security_protocol": "SSL", "ca_file": "missing.pem"}, "ca_file"),
        ({"security_protocol": "SSL", "ca_file": "garbage.pem"}, "ca_file"),
        ({"security_protocol": "SSL", "certificate_file": "garbage.pem"}, "certificate_file"),
        ({"security_protocol": "SASL_PLAINTEXT"}, "username"),
        ({"security_protocol": "SASL_PLAINTEXT", "username": "ann"}, "password_file"),
        ({"security_protocol": "SASL_PLAINTEXT", "username": "ann", "password_file": "missing"}, "password_file"),
    ],
)
def test_settings_that_cannot_work_are_named(more: dict[str, Any], setting: str, tmp_path: Path) -> None:
    (tmp_path / "garbage.pem").write_text("no certificate")
    values = kafka.kafka(**{"address": "127.0.0.1:1", **more})
    (finding,) = about(Settings(data=tmp_path, log=values), "kafka")
    assert not finding.ok
    assert f"[log.kafka] {setting}" in finding.words


def test_the_settings_in_force_are_printed_with_what_the_environment_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, {"backend": "sqlite"})
    monkeypatch.setenv("THUMBWHEEL_LEARNER__BETA", "0.25")
    shown = json.loads(run(config, "doctor", "--settings").stdout)
    assert shown["learner"]["beta"] == 0.25
    assert shown["log"]["backend"] == "sqlite"
