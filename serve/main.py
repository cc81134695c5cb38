"""The gateway: one process that wires log, engine, reconciler and HTTP server together, and ends them in order."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop

from serve.app import create_app
from serve.auth import Keys
from serve.engine import Engine
from serve.reconciler import Reconciler
from serve.routing import Router
from thumbwheel.daemon import configure_logging
from thumbwheel.errors import LogError, SettingsError
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn that leaves the signals to us: its own handling ends the process before the log is flushed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Stop accepting and drain; told a second time, don't drain."""
        self.force_exit = self.should_exit
        self.should_exit = True


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ThumbwheelError where it cannot start, or its engine does not."""
    configure_logging("gateway")
    path = settings.path(settings.gateway.keys)
    if not path.is_file():
        raise SettingsError(f"there are no API keys in {path} ([gateway] keys): make one with `thumbwheel keys add`")
    keys = Keys(path)
    listener = listen(settings.gateway.host, settings.gateway.port)
    log = SqliteLog(settings.path(settings.log.path))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, keys, log, listener))
    finally:
        listener.close()
        log.close()


async def serve(settings: Settings, keys: Keys, log: SqliteLog, listener: socket.socket) -> None:
    """HTTP answers at once (`/readyz` says what is missing); the engine comes up beside it."""
    router = Router()
    commit = GroupCommit(log)
    engine = Engine(settings, on_down=router.close)
    reconciler = Reconciler(settings, log, commit, AdapterStore(settings.path(settings.store.path)), engine, router)
    server = Server(
        uvicorn.Config(
            create_app(settings, router, log, commit, keys, lambda: engine.url),
            http="httptools",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(settings.gateway.drain_s),
        )
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    async with engine.client:
        supervision = asyncio.create_task(engine.run())
        reconciliation = asyncio.create_task(reconciler.run())
        for task in (supervision, reconciliation):  # neither ends but by an error, which ends the gateway
            task.add_done_callback(lambda _: server.stop())
        logger.info("listening on %s:%d", *listener.getsockname()[:2])
        try:
            await server.serve(sockets=[listener])
        finally:
            failed = [task for task in (supervision, reconciliation) if task.done()]
            await _leave(supervision, reconciliation, reconciler, commit)
    for task in failed:
        task.result()


async def _leave(
    supervision: asyncio.Task[None], reconciliation: asyncio.Task[None], reconciler: Reconciler, commit: GroupCommit
) -> None:
    """Requests are drained by now: take leave on the log, flush it, and stop the engine last."""
    await _end(reconciliation)  # or its next report would say that this replica is back
    try:
        await reconciler.leave()
    except LogError as error:
        logger.warning("could not take leave on the log: %s", error)
    await commit.close()
    await _end(supervision)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def listen(host: str, port: int) -> socket.socket:
    """The gateway's socket; port 0 takes a free one. Raises SettingsError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port} ([gateway] host, port): {error.strerror}") from error
