"""The program around the loop: cheap to import, one at a time, gone within seconds of SIGTERM."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from learner.daemon import check
from tests import kafka
from tests.learner.traffic import fill
from tests.learner.worker import started
from thumbwheel.demo.broker import free_ports
from thumbwheel.errors import SettingsError
from thumbwheel.log import SqliteLog
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.settings import LearnerSettings, LogSettings, Settings
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.slow


def test_importing_the_daemon_imports_nothing_heavy() -> None:
    code = "import sys, learner.daemon; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_that_the_engine_does_not_serve_is_refused(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="rank is 64, but the engine serves adapters up to rank 16"):
        check(settings.model_copy(update={"learner": LearnerSettings(rank=64)}))


def test_sigterm_ends_it_and_a_second_learner_on_the_same_data_is_refused(settings: Settings) -> None:
    log = SqliteLog(settings.path(settings.log.path))
    fill(log, 120)
    log.close()
    store = AdapterStore(settings.path(settings.store.path))
    with started(settings) as process:
        while store.versions() != ["v1"]:
            assert process.poll() is None
            time.sleep(0.05)
        with started(settings) as second:
            _, errors = second.communicate(timeout=60)
            assert second.returncode != 0
            assert "another learner is running" in errors
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors
        assert "update 2 of 2 from base by kto: loss" in errors
        assert "submitted v1" in errors


def relay(port: int, address: str) -> socket.socket:
    """Listen on a port and hand every connection on; closing what it returns ends that."""
    listener = socket.create_server(("127.0.0.1", port))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with source, sink:
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            host, _, target = address.split(",")[0].partition(":")
            server = socket.create_connection((host, int(target)))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


@pytest.mark.kafka
def test_started_before_the_broker_it_waits_and_then_learns(
    settings: Settings, kafka_address: str, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    known = kafka.on(kafka_address, tmp_path, timeout_s=2.0)
    values = known.log.kafka.model_copy(update={"bootstrap": f"127.0.0.1:{port}"})
    late = settings.model_copy(update={"log": LogSettings(backend="kafka", kafka=values)})
    log = KafkaLog(known)
    fill(log, 120)
    store = AdapterStore(settings.path(settings.store.path))
    with started(late) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        while "trying again" not in said:
            assert process.poll() is None, said
            said = process.stderr.readline()
        assert f'[log.kafka] bootstrap = "127.0.0.1:{port}"' in said
        assert not (settings.data / "learner" / "buffer.sqlite").exists()
        with closing(relay(port, kafka_address)):
            end = time.monotonic() + 60
            while store.versions() != ["v1"]:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "submitted v1" in errors
    log.close()


@pytest.mark.kafka
def test_told_to_stop_while_the_broker_is_away_it_leaves(settings: Settings) -> None:
    values = kafka.kafka(f"127.0.0.1:{free_ports(1)[0]}", timeout_s=0.5)
    with started(settings.model_copy(update={"log": LogSettings(**values)})) as process:
        assert process.stderr is not None
        while "trying again" not in process.stderr.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0
