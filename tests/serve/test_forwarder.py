"""The forwarder's process: it lives as long as the gateway does, and a little longer."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.forwarder import ForwarderProcess, restarts
from tests import kafka
from tests.adapters import append, decided, submitted, tiny_adapter
from tests.launch import GatewayProcess, wait_for
from tests.serve.engine_stub import EngineStub, stub_engine
from tests.serve.test_feedback import response_id
from tests.serve.test_process import alive
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT, ReplicaReported, decode
from thumbwheel.log import Log, open_log
from thumbwheel.log.port import read_all
from thumbwheel.store import fingerprint

STAND_IN = """#!/bin/sh
echo "$$ $@" >> {record}
exec sleep 300
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for the interpreter notes its process id and arguments, a line each time that it is started."""
    program = tmp_path / "python"
    record = tmp_path / "record"
    program.write_text(STAND_IN.format(record=record))
    program.chmod(0o755)
    monkeypatch.setattr("serve.forwarder.sys.executable", str(program))
    monkeypatch.setattr("serve.forwarder.POLL_S", 0.02)
    monkeypatch.setattr("serve.forwarder.AGAIN_S", 0.05)
    return record


def started(record: Path) -> list[str]:
    return record.read_text().splitlines() if record.exists() else []


async def until_started(record: Path, times: int) -> int:
    """The process id of the last one."""
    for _ in range(500):
        if len(started(record)) >= times:
            return int(started(record)[-1].split()[0])
        await asyncio.sleep(0.01)
    raise AssertionError(f"it was not started {times} times: {started(record)}")


@pytest.mark.parametrize("config", [Path("/etc/thumb wheel.toml"), None])
async def test_it_gets_the_gateways_settings_and_is_ended_with_it(record: Path, config: Path | None) -> None:
    running = asyncio.create_task(ForwarderProcess(config).run())
    pid = await until_started(record, 1)
    options = f"--config {config} " if config else ""
    assert started(record) == [f"{pid} -m thumbwheel.cli {options}forward"]
    running.cancel()
    await asyncio.wait([running])
    assert not alive(pid)
    assert len(started(record)) == 1


async def test_it_is_started_again_when_it_dies_and_counted(record: Path) -> None:
    before = restarts._value.get()
    running = asyncio.create_task(ForwarderProcess(None).run())
    for times in (1, 2, 3):
        os.kill(await until_started(record, times), signal.SIGKILL)
    last = await until_started(record, 4)
    assert restarts._value.get() == before + 3
    running.cancel()
    await asyncio.wait([running])
    assert not alive(last)


@contextmanager
def gateway_on(address: str, data: Path, stub: EngineStub) -> Iterator[tuple[GatewayProcess, Log]]:
    """A gateway with a log of its own on Kafka; not started."""
    (data / "model").mkdir()
    (data / "model" / "config.json").write_text("{}")
    settings = kafka.on(address, data)
    sections = settings.log.model_dump(mode="json") | {"forwarder_metrics_port": 0}
    log = open_log(settings)
    gateway = GatewayProcess(data, engine={"url": stub.url}, log=sections)
    try:
        with gateway:
            yield gateway, log
    finally:
        log.close()


def forwarders(data: Path) -> list[int]:
    """The process ids of the forwarders that work in a data directory (proc(5))."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"forward" in words and f"THUMBWHEEL_DATA={data}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def reports(log: Log) -> list[ReplicaReported]:
    events = [decode(record.message.value) for record in read_all(log, ROLLOUT)]
    return [event for event in events if isinstance(event, ReplicaReported)]


def count(log: Log, topic: str) -> int:
    """Messages on it, each once."""
    return len(
        {record.message.id for p in range(log.partitions(topic)) for record in read_all(log, topic, partition=p)}
    )


def vote(gateway: GatewayProcess) -> None:
    status, answer, _ = gateway.post("/v1/feedback", {"response_id": response_id(), "rating": "up"})
    assert status == 202, answer


@pytest.fixture
def stub() -> Iterator[EngineStub]:
    with stub_engine() as running:
        yield running


@pytest.mark.kafka
def test_with_kafka_exchanges_votes_and_the_leave_get_there_and_promotions_get_here(
    kafka_address: str, tmp_path: Path, stub: EngineStub
) -> None:
    with gateway_on(kafka_address, tmp_path, stub) as (gateway, log):
        gateway.until_ready()
        adapter = tiny_adapter(gateway.store, "v1", fingerprint(tmp_path / "model"))
        append(log, submitted(adapter), *decided(adapter))

        def served_by() -> str:
            body = {"model": "policy", "prompt": "Hello", "max_tokens": 1}
            status, _, headers = gateway.post("/v1/completions", body)
            assert status == 200
            return {name.lower(): value for name, value in headers.items()}["x-thumbwheel-version"]

        wait_for(lambda: served_by() == "v1", 15, "the promotion is served")
        vote(gateway)
        assert len(forwarders(tmp_path)) == 1
        assert gateway.terminate() == 0
        assert forwarders(tmp_path) == []
        assert reports(log)[-1].leaving
        assert any(report.serving == "v1" for report in reports(log))
        assert count(log, FEEDBACK) == 1
        assert count(log, RESPONSES) >= 1


@pytest.mark.kafka
def test_a_forwarder_that_was_killed_is_followed_by_another_and_none_outlives_the_gateway(
    kafka_address: str, tmp_path: Path, stub: EngineStub
) -> None:
    with gateway_on(kafka_address, tmp_path, stub) as (gateway, log):
        gateway.until_ready()
        (first,) = forwarders(tmp_path)
        os.kill(first, signal.SIGKILL)
        vote(gateway)
        wait_for(lambda: count(log, FEEDBACK) == 1, 15, "the next forwarder sends the vote")
        assert first not in forwarders(tmp_path)
        assert "thumbwheel_gateway_forwarder_restarts_total 1.0" in gateway.get("/metrics")[1]

        (old,) = forwarders(tmp_path)
        os.kill(old, signal.SIGSTOP)  # says farewell for as long as we like
        gateway.kill()
        gateway.start()
        gateway.until_ready()
        vote(gateway)
        wait_for(lambda: "another forwarder is at work" in gateway.output.read_text(), 15, "the new one is refused")
        assert gateway.get("/readyz")[0] == 200
        os.kill(old, signal.SIGCONT)
        wait_for(lambda: old not in forwarders(tmp_path), 15, "the old one is gone")
        vote(gateway)
        wait_for(lambda: count(log, FEEDBACK) == 3, 20, "the new one sends")

        gateway.kill()
        wait_for(lambda: forwarders(tmp_path) == [], 15, "the forwarder went with its gateway")
