"""The engine's life as the gateway sees it: start, wait, warm, watch, and again with growing pauses when it dies.

Each time that it comes up counts as a new generation: a restarted vLLM has forgotten every adapter.
"""

import asyncio
import logging
from collections.abc import Callable

from prometheus_client import Counter, Gauge

from serve.client import EngineBusy, EngineClient, EngineError, Model
from serve.process import EngineProcess
from thumbwheel.events import BASE
from thumbwheel.settings import Settings

logger = logging.getLogger(__name__)

WATCH_S = 1.0
"""Between two looks at the engine's health."""
PATIENCE = 3
"""Looks in a row that may time out: an engine under full load answers late, one that hangs does not answer."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0

up = Gauge("thumbwheel_engine_up", "1 while the engine is healthy and warm, else 0")
restarts = Counter("thumbwheel_engine_restarts", "Times that the engine went down after it had been up")


class Engine:
    """A vLLM that the gateway starts, or one that runs at `[engine] url`."""

    def __init__(self, settings: Settings, on_down: Callable[[str], None]) -> None:
        """`on_down` hears at once when the engine is lost, and why."""
        self._settings = settings
        self._on_down = on_down
        self._process = None if settings.engine.url else EngineProcess(settings)
        self.client = EngineClient(lambda: self.url, settings.engine.request_timeout_s)
        self.up = False
        self.generation = 0
        self.base_model = f"{settings.gateway.model_name}@{BASE}"
        """The name under which the engine serves the base model."""

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return self._process.url if self._process else self._settings.engine.url.rstrip("/")

    async def run(self) -> None:
        """Keep the engine up until cancelled.

        Raises EngineError when a vLLM of our own does not come up the first time: a mistake in the settings more
        likely than bad luck. Later deaths are followed by a restart.
        """
        pause = FIRST_PAUSE_S
        try:
            while True:
                generation = self.generation
                why = await self._live()
                if self._process and not self.generation:
                    raise EngineError(why)
                if self.generation > generation:
                    pause = FIRST_PAUSE_S
                    restarts.inc()
                self._down(f"{why.splitlines()[0]}; it is tried again in {pause:g} s")
                logger.error("%s", why)
                if self._process:
                    await self._process.stop()
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            self._down("the gateway is stopping")
            if self._process:
                await self._process.stop()

    async def _live(self) -> str:
        """One life of the engine, from start to death. Returns what it died of."""
        why = ""
        try:
            if self._process:
                await self._process.start()
            self._on_down(f"the engine at {self.url} is starting")
            async with asyncio.TaskGroup() as group:
                if self._process:
                    group.create_task(self._process.exited())
                group.create_task(self._serve())
        except* EngineError as errors:
            why = str(errors.exceptions[0])
        return why

    async def _serve(self) -> None:
        """Up, and watched. Raises EngineError when it is no longer healthy."""
        limit = self._settings.engine.start_timeout_s
        try:
            async with asyncio.timeout(limit):
                await self._until_healthy()
                await self._warm()
        except TimeoutError as error:
            raise EngineError(f"the engine at {self.url} was not ready within {limit:g} s") from error
        self.up = True
        self.generation += 1
        up.set(1)
        logger.info("the engine at %s is up and warm", self.url)
        late = 0
        while late < PATIENCE:
            await asyncio.sleep(WATCH_S)
            try:
                await self.client.health()
                late = 0
            except EngineBusy:
                late += 1
        raise EngineError(f"the engine at {self.url} hangs: {PATIENCE} times in a row it did not answer")

    async def _until_healthy(self) -> None:
        while True:
            try:
                return await self.client.health()
            except EngineError:
                await asyncio.sleep(WATCH_S / 2)

    async def _warm(self) -> None:
        """Real requests: the first ones compile and allocate, and the clients should not wait for that."""
        self._on_down("the engine is warming up")
        self.base_model = base_of(await self.client.models(), self.base_model)
        await self.client.warm(self.base_model)

    def _down(self, why: str) -> None:
        self.up = False
        up.set(0)
        self._on_down(why)


def base_of(models: list[Model], name: str) -> str:
    """The name of the base model: `name` if it is served, else the first model that has no parent."""
    names = [model.id for model in models if model.parent is None]
    if not names:
        raise EngineError("the engine serves no base model")
    return name if name in names else names[0]
