"""Group commit for an event loop: many coroutines append, one thread syncs once for all that wait."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from thumbwheel.errors import LogError
from thumbwheel.events import Event
from thumbwheel.log.port import Appended, Message, message_of
from thumbwheel.log.sqlite import SqliteLog


class GroupCommit:
    """Appends from coroutines. While one transaction syncs, the next batch gathers; memory is bounded by `limit`."""

    def __init__(self, log: SqliteLog, limit: int = 10_000) -> None:
        self._log = log
        self._limit = limit
        self._waiting: list[tuple[str, Message, asyncio.Future[Appended]]] = []
        self._thread = ThreadPoolExecutor(1, "log-writer")
        self._running: asyncio.Task[None] | None = None

    async def append(self, event: Event) -> Appended:
        """Append one event; returns once it is durable. Raises LogError when it is not, or too many wait."""
        return await self.submit(event)

    def submit(self, event: Event) -> "asyncio.Future[Appended]":
        """As `append`, without waiting: the future is done once the event is durable."""
        if len(self._waiting) >= self._limit:
            raise LogError(f"the event log {self._log.path} is too slow: {self._limit} events wait for the disk")
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self._waiting.append((event.topic, message_of(event), future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._drain())
        return future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            items = [(topic, message) for topic, message, _ in batch]
            try:
                appended = await loop.run_in_executor(self._thread, self._log.append_all, items)
            except Exception as error:  # every waiter gets the reason; the next batch may fare better
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # a caller that went away is not a warning
                continue
            for (_, _, future), result in zip(batch, appended, strict=True):
                if not future.done():
                    future.set_result(result)

    async def close(self) -> None:
        """Wait for what was submitted, then stop the writer."""
        if self._running is not None:
            await self._running
        self._thread.shutdown()
