"""The client of the engine's wire: what is said is understood, and each failure is told for what it is."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from serve.client import EngineBusy, EngineClient, EngineRefused, EngineUnreachable, Model
from serve.process import free_port
from tests.serve.engine_stub import EngineStub, stub_engine


@pytest.fixture
def stub() -> Iterator[EngineStub]:
    with stub_engine() as running:
        yield running


@pytest.fixture
async def client(stub: EngineStub) -> AsyncIterator[EngineClient]:
    async with EngineClient(lambda: stub.url, 5.0) as opened:
        yield opened


async def test_the_base_model_and_the_adapters_are_told_apart(client: EngineClient) -> None:
    await client.load("policy@v1", Path("/store/v1"))
    assert await client.models() == [Model("policy@base", None), Model("policy@v1", "policy@base")]


async def test_loading_what_is_loaded_and_unloading_what_is_not_is_no_error(
    client: EngineClient, stub: EngineStub
) -> None:
    await client.load("policy@v1", Path("/store/v1"))
    await client.load("policy@v1", Path("/store/v1"))
    await client.unload("policy@v1")
    await client.unload("policy@v1")
    assert stub.unloaded == ["policy@v1"]


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_a_refused_adapter_tells_the_engines_reason(client: EngineClient, stub: EngineStub, status: int) -> None:
    stub.refuses["policy@v1"] = (status, "rank 64 is greater than max_lora_rank")
    with pytest.raises(EngineRefused, match=f"{status}: rank 64 is greater") as caught:
        await client.load("policy@v1", Path("/store/v1"))
    assert caught.value.status == status


async def test_scoring_an_unknown_model_is_refused(client: EngineClient) -> None:
    with pytest.raises(EngineRefused, match="does not exist"):
        await client.score("policy@v9", [1, 2], [3])


async def test_an_engine_that_is_not_there_is_unreachable() -> None:
    async with EngineClient(lambda: f"http://127.0.0.1:{free_port()}", 5.0) as client:
        with pytest.raises(EngineUnreachable, match="cannot be reached"):
            await client.health()


async def test_an_engine_that_does_not_answer_is_busy_and_not_gone(
    client: EngineClient, stub: EngineStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.client.ADMIN_TIMEOUT_S", 0.05)
    stub.hangs = True
    with pytest.raises(EngineBusy, match="did not answer /health within"):
        await client.health()


async def test_an_unhealthy_engine_is_refused(client: EngineClient, stub: EngineStub) -> None:
    stub.healthy = False
    with pytest.raises(EngineRefused):
        await client.health()


async def test_warming_reaches_both_endpoints(client: EngineClient, stub: EngineStub) -> None:
    await client.warm("policy@base")
    assert stub.calls == ["complete policy@base"] * 2
