"""The engine's life: up means healthy and warm, a death is heard at once, and what dies comes back."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serve.client import EngineError, Model
from serve.engine import Engine, base_of
from tests.serve.engine_stub import EngineStub, stub_engine
from tests.serve.world import until
from thumbwheel.settings import EngineSettings, Settings

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.WATCH_S", 0.02)
    monkeypatch.setattr("serve.engine.FIRST_PAUSE_S", 0.02)


@pytest.fixture
def stub() -> Iterator[EngineStub]:
    with stub_engine() as running:
        yield running


@asynccontextmanager
async def alive(settings: Settings) -> AsyncIterator[tuple[Engine, list[str], asyncio.Task[None]]]:
    """A watched engine, what was heard of it, and the task that watches."""
    heard: list[str] = []
    engine = Engine(settings, heard.append)
    async with engine.client:
        task = asyncio.create_task(engine.run())
        try:
            yield engine, heard, task
        finally:
            task.cancel()
            await asyncio.wait([task])


def as_process(monkeypatch: pytest.MonkeyPatch, command: Callable[[int], list[str]]) -> None:
    monkeypatch.setattr("serve.process.argv", lambda settings, port: command(port))


async def test_an_engine_by_url_is_up_once_it_is_healthy_and_warm(tmp_path: Path, stub: EngineStub) -> None:
    stub.healthy = False
    stub.base = "somebody's-name"
    async with alive(Settings(data=tmp_path, engine=EngineSettings(url=stub.url + "/"))) as (engine, heard, _):
        await asyncio.sleep(0.1)
        assert not engine.up
        assert "starting" in heard[-1]
        stub.healthy = True
        await until(lambda: engine.up)
        assert engine.generation == 1
        assert engine.base_model == "somebody's-name"
        assert stub.calls == ["complete somebody's-name"] * 2


async def test_an_engine_that_hangs_is_given_up_and_comes_back_as_a_new_generation(
    tmp_path: Path, stub: EngineStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.client.ADMIN_TIMEOUT_S", 0.2)
    async with alive(Settings(data=tmp_path, engine=EngineSettings(url=stub.url))) as (engine, heard, _):
        await until(lambda: engine.up)
        stub.hangs = True
        await until(lambda: not engine.up)
        assert any("hangs: 3 times" in why for why in heard)
        stub.hangs = False
        await until(lambda: engine.up)
        assert engine.generation == 2


async def test_an_engine_that_is_killed_is_heard_of_at_once_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_process(monkeypatch, lambda port: [sys.executable, "-m", "tests.serve.engine_stub", str(port)])
    async with alive(Settings(data=tmp_path)) as (engine, heard, _):
        await until(lambda: engine.up)
        os.kill(int((tmp_path / "engine-r1.pid").read_text().split()[0]), signal.SIGKILL)
        await until(lambda: not engine.up)
        assert any("ended with SIGKILL" in why for why in heard)
        await until(lambda: engine.up)
        assert engine.generation == 2


async def test_an_engine_that_cannot_start_ends_the_gateway_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_process(monkeypatch, lambda port: ["sh", "-c", "echo no such model; exit 1"])
    async with alive(Settings(data=tmp_path)) as (_, _, task):
        await asyncio.wait([task])
        with pytest.raises(EngineError, match=r"(?s)exit code 1.*no such model"):
            task.result()


async def test_an_engine_that_is_never_healthy_is_given_up_after_the_time_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_process(monkeypatch, lambda port: ["sleep", "300"])
    async with alive(Settings(data=tmp_path, engine=EngineSettings(start_timeout_s=0.1))) as (_, _, task):
        await asyncio.wait([task])
        with pytest.raises(EngineError, match="was not ready within"):
            task.result()


def test_the_base_model_is_the_agreed_name_or_else_the_first_without_a_parent() -> None:
    models = [Model("other", None), Model("policy@base", None), Model("policy@v1", "other")]
    assert base_of(models, "policy@base") == "policy@base"
    assert base_of(models, "policy@v1") == "other"
    with pytest.raises(EngineError, match="no base model"):
        base_of([], "policy@base")
