"""A gateway's inside, without its HTTP face: engine watch and reconciler in front of an engine stub."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.engine import Engine
from serve.reconciler import Reconciler
from serve.routing import Router
from tests.adapters import append, decided, submitted, tiny_adapter
from tests.serve.engine_stub import EngineStub
from thumbwheel.events import ROLLOUT, ReplicaReported, decode
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings
from thumbwheel.store import Adapter, AdapterStore, fingerprint


@dataclass
class World:
    """What a test sees of it, and what it may put onto the log."""

    log: SqliteLog
    store: AdapterStore
    router: Router
    base_model: str

    def submit(self, version: str, **options: Any) -> Adapter:
        adapter = tiny_adapter(self.store, version, self.base_model, **options)
        append(self.log, submitted(adapter))
        return adapter

    def promote(self, adapter: Adapter) -> None:
        append(self.log, *decided(adapter))

    def reports(self) -> list[ReplicaReported]:
        events = [decode(record.message.value) for record in read_all(self.log, ROLLOUT)]
        return [event for event in events if isinstance(event, ReplicaReported)]

    def reported(self, version: str) -> tuple[str, str]:
        """What the last report says of a version: its state and why."""
        reports = self.reports()
        held = {seen.version: seen for seen in reports[-1].versions} if reports else {}
        return (held[version].state, held[version].why) if version in held else ("", "")

    def serves(self, version: str) -> bool:
        route = self.router.current()
        return route is not None and route.version == version


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true within 10 s")


@asynccontextmanager
async def world(directory: Path, stub: EngineStub, backend: str = "sqlite", **gateway: Any) -> AsyncIterator[World]:
    """Engine watch and reconciler, running until the end of the block; then the replica takes leave.

    With the backend "kafka" the log is a mirror, and nobody fills it but the test.
    """
    model = directory / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    settings = Settings(
        data=directory,
        log={"backend": backend},
        engine={"url": stub.url, "max_loras": 2},
        gateway={"poll_s": 0.01} | gateway,
    )
    log = SqliteLog(settings.path(settings.log.path))
    commit, router = GroupCommit(log), Router()
    store = AdapterStore(settings.path(settings.store.path))
    engine = Engine(settings, on_down=router.close)
    reconciler = Reconciler(settings, log, commit, store, engine, router)
    async with engine.client:
        tasks = [asyncio.create_task(engine.run()), asyncio.create_task(reconciler.run())]
        try:
            yield World(log, store, router, fingerprint(model))
            for task in tasks:
                assert not task.done(), task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await reconciler.leave()
            await commit.close()
            log.close()
