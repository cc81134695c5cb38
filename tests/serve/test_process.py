"""The engine's process: right arguments, no secrets, and nothing of it outlives the gateway, however that ends."""

import asyncio
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from serve.client import EngineError
from serve.process import CPU_SLOTS, EngineProcess, argv, end_orphan, environment, started_at
from tests.launch import wait_for
from thumbwheel.settings import EngineSettings, Settings

pytestmark = pytest.mark.slow

FAMILY = ["sh", "-c", "sleep 300 & echo core $!; wait"]
"""Stands for vLLM: a leader with a child of its own, as the API server and its engine core."""


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def core(log: Path) -> int:
    """The process id of the leader's child, once it has said it."""
    wait_for(lambda: log.exists() and log.read_text().startswith("core"), 10, "the child")
    return int(log.read_text().split()[1])


@pytest.mark.parametrize(("cpu", "slots"), [(True, str(CPU_SLOTS)), (False, "4")])
def test_the_command_line_serves_adapters_on_the_loopback_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool, slots: str
) -> None:
    monkeypatch.setattr("serve.process.cpu_build", lambda: cpu)
    settings = Settings(data=tmp_path, engine=EngineSettings(arguments=["--enforce-eager"], max_loras=4))
    words = argv(settings, 4242)
    options = dict(pairwise(words))
    assert options["--host"] == "127.0.0.1"
    assert options["--port"] == "4242"
    assert options["--model"] == str(tmp_path / "model")
    assert options["--served-model-name"] == "policy@base"
    assert options["--max-loras"] == slots
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert words[-1] == "--enforce-eager"
    assert ("--no-enable-chunked-prefill" in words) == cpu
    assert "lm_head" not in words[words.index("--lora-target-modules") :]


def test_the_environment_holds_neither_secrets_nor_what_opens_more_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THUMBWHEEL_EVALUATOR_KEY", "tw-secret")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_API_KEY", "k")
    engine = EngineSettings(environment={"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_SERVER_DEV_MODE": "1"})
    inherited = environment(Settings(engine=engine))
    assert inherited["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert inherited["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert not {"THUMBWHEEL_EVALUATOR_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"} & set(inherited)


async def test_stopping_ends_the_whole_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.process.argv", lambda settings, port: FAMILY)
    process = EngineProcess(Settings(data=tmp_path))
    await process.start()
    child = core(process.log)
    assert alive(child)
    await process.stop()
    wait_for(lambda: not alive(child), 5, "the child is gone")
    assert not (tmp_path / "engine-r1.pid").exists()
    await process.stop()


async def test_an_early_end_is_told_with_the_end_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.process.argv", lambda settings, port: ["sh", "-c", "echo no such model; exit 3"])
    process = EngineProcess(Settings(data=tmp_path))
    await process.start()
    with pytest.raises(EngineError, match=r"ended with exit code 3\n.*engine\.log:\n  no such model"):
        await process.exited()
    await process.stop()


GATEWAY = f"""
import asyncio, serve.process
from pathlib import Path
from thumbwheel.settings import Settings
serve.process.argv = lambda settings, port: {FAMILY!r}
async def main():
    await serve.process.EngineProcess(Settings(data=Path("DATA"))).start()
    await asyncio.sleep(300)
asyncio.run(main())
"""


def gateway(data: Path) -> tuple["subprocess.Popen[bytes]", int, int]:
    """A process that has started an engine, and the process ids of that one's leader and child."""
    process = subprocess.Popen([sys.executable, "-c", GATEWAY.replace("DATA", str(data))])
    child = core(data / "engine.log")
    wait_for(lambda: bool(list(data.glob("engine-*.pid"))), 10, "the record")
    return process, int((data / "engine-r1.pid").read_text().split()[0]), child


def test_the_family_dies_with_a_gateway_that_is_killed(tmp_path: Path) -> None:
    process, leader, child = gateway(tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(leader) and not alive(child), 5, "the family is gone")


def members(group: int) -> set[int]:
    """The processes of a group (proc(5), field 5 of stat)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[2]) == group:
                found.add(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_an_orphan_that_lost_its_watchdog_is_ended_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, leader, child = gateway(tmp_path)
    (watchdog,) = members(leader) - {leader, child}
    os.kill(watchdog, signal.SIGKILL)
    process.kill()
    process.wait()
    assert alive(leader)
    assert alive(child)
    monkeypatch.setattr("serve.process.argv", lambda settings, port: ["sleep", "300"])

    async def start_and_stop() -> None:
        following = EngineProcess(Settings(data=tmp_path))
        await following.start()
        wait_for(lambda: not alive(leader) and not alive(child), 5, "the orphan is gone")
        await following.stop()

    asyncio.run(start_and_stop())


def test_a_process_that_only_got_the_id_of_an_old_engine_is_left_alone(tmp_path: Path) -> None:
    record = tmp_path / "engine-r1.pid"
    bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        record.write_text(f"{bystander.pid} {started_at(bystander.pid) - 1}\n")
        end_orphan(record)
        assert bystander.poll() is None
        assert not record.exists()
    finally:
        bystander.kill()
        bystander.wait()
