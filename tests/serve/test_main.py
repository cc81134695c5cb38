"""The gateway's process: it answers at once, says what is missing, and leaves in order."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.main import run
from tests.adapters import append, decided, submitted, tiny_adapter
from tests.launch import GatewayProcess, wait_for
from tests.serve.engine_stub import EngineStub, stub_engine
from tests.serve.test_feedback import response_id
from thumbwheel.errors import SettingsError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT, ReplicaReported, decode
from thumbwheel.log import SqliteLog
from thumbwheel.log.mirror import WHOLE
from thumbwheel.log.port import read_all
from thumbwheel.settings import GatewaySettings, Settings
from thumbwheel.store import fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture
def stub() -> Iterator[EngineStub]:
    with stub_engine() as running:
        yield running


@pytest.fixture
def process(tmp_path: Path, stub: EngineStub) -> GatewayProcess:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return GatewayProcess(tmp_path, engine={"url": stub.url})


def test_it_is_alive_before_it_is_ready_and_says_what_is_missing(process: GatewayProcess, stub: EngineStub) -> None:
    stub.healthy = False
    adapter = tiny_adapter(process.store, "v1", fingerprint(process.settings.path(Path("model"))))
    append(process.log, submitted(adapter), *decided(adapter))
    with process:
        wait_for(lambda: process.get("/healthz")[0] == 200, 20, "alive")
        status, body = process.get("/readyz")
        assert status == 503
        assert "engine" in body
        stub.healthy = True
        process.until_ready()
        _, page = process.get("/metrics")
        assert f'thumbwheel_serving_version_info{{digest="{adapter.digest}",version="v1"}} 1.0' in page
        assert "thumbwheel_engine_up 1.0" in page
        assert 'thumbwheel_adapter_loads_total{result="proved"} 1.0' in page


def test_on_sigterm_it_finishes_what_it_answers_records_it_and_takes_leave(
    process: GatewayProcess, stub: EngineStub
) -> None:
    answers: list[int] = []

    def ask() -> None:
        body: dict[str, Any] = {"model": "policy", "prompt": "Hello", "max_tokens": 1}
        answers.append(process.post("/v1/completions", body)[0])

    with process:
        process.until_ready()
        stub.takes_s = 1.0
        before = len(stub.calls)
        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: len(stub.calls) > before, 10, "the request reached the engine")
        assert process.terminate() == 0
        asking.join()
        assert answers == [200]
        assert len(list(read_all(process.log, RESPONSES))) == 1
        last = [decode(record.message.value) for record in read_all(process.log, ROLLOUT)][-1]
        assert isinstance(last, ReplicaReported)
        assert last.leaving


def test_without_keys_it_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="thumbwheel keys add"):
        run(Settings(data=tmp_path))


def test_a_taken_port_is_told_by_the_setting(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen on 127.0.0.1:{port}"):
            run(Settings(data=tmp_path, gateway=GatewaySettings(port=port)))


def test_a_missing_base_model_ends_it_with_the_setting_to_look_at(tmp_path: Path, stub: EngineStub) -> None:
    process = GatewayProcess(tmp_path, engine={"url": stub.url})
    with process:
        assert process.process.wait(30) == 4
        assert "[engine] model" in process.output.read_text()


NOWHERE = {"backend": "kafka", "forwarder_metrics_port": 0, "kafka": {"bootstrap": "127.0.0.1:9", "timeout_s": 1.0}}


@pytest.fixture
def cut_off(tmp_path: Path, stub: EngineStub) -> GatewayProcess:
    """A gateway whose Kafka is away."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return GatewayProcess(tmp_path, engine={"url": stub.url}, log=NOWHERE)


def test_while_kafka_is_away_the_champion_of_then_is_served_and_votes_are_taken(cut_off: GatewayProcess) -> None:
    adapter = tiny_adapter(cut_off.store, "v1", fingerprint(cut_off.settings.path(Path("model"))))
    mirror = SqliteLog(cut_off.settings.path(cut_off.settings.log.mirror))
    append(mirror, submitted(adapter), *decided(adapter))
    mirror.commit(WHOLE, ROLLOUT, mirror.ends(ROLLOUT)[1])
    mirror.close()
    with cut_off:
        cut_off.until_ready()
        wait_for(lambda: 'version="v1"} 1.0' in cut_off.get("/metrics")[1], 10, "v1 is served")
        body = {"model": "policy", "prompt": "Hello", "max_tokens": 1}
        status, _, headers = cut_off.post("/v1/completions", body)
        assert (status, headers["x-thumbwheel-version"]) == (200, "v1")
        assert cut_off.post("/v1/feedback", {"response_id": response_id(), "rating": "up"})[0] == 202
        wait_for(lambda: "[log.kafka] bootstrap" in cut_off.output.read_text(), 15, "the forwarder says what is wrong")
        assert cut_off.terminate() == 0
    outbox = SqliteLog(cut_off.settings.path(cut_off.settings.log.outbox))
    assert (outbox.ends(RESPONSES), outbox.ends(FEEDBACK)) == ((0, 1), (0, 1))
    outbox.close()


def test_without_a_mirror_it_is_not_ready_before_kafka_was_read_and_says_so(cut_off: GatewayProcess) -> None:
    with cut_off:
        wait_for(lambda: "has not been read from Kafka" in cut_off.get("/readyz")[1], 20, "the reason")
        assert cut_off.get("/readyz")[0] == 503
        assert cut_off.post("/v1/completions", {"model": "policy", "prompt": "Hello"})[0] == 503
        assert cut_off.post("/v1/feedback", {"response_id": response_id(), "rating": "up"})[0] == 202


def test_settings_of_kafka_that_cannot_work_end_it_with_the_setting_to_look_at(
    tmp_path: Path, stub: EngineStub
) -> None:
    process = GatewayProcess(tmp_path, engine={"url": stub.url}, log={"backend": "kafka"})
    with process:
        assert process.process.wait(30) == 2
        assert "[log.kafka] bootstrap" in process.output.read_text()
