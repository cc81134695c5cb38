"""The gateway: one process that wires log, engine, reconciler and HTTP server together, and ends them in order."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop

from serve.app import create_app
from serve.auth import Keys
from serve.engine import Engine
from serve.forwarder import ForwarderProcess
from serve.reconciler import Reconciler
from serve.routing import Router
from thumbwheel.daemon import configure_logging
from thumbwheel.errors import LogError, SettingsError
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.log.outbox import Outbox
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


def run(settings: Settings, config: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `config` is the file that the settings came from.

    Raises ThumbwheelError where it cannot start, or its engine does not.
    """
    configure_logging("gateway")
    path = settings.path(settings.gateway.keys)
    if not path.is_file():
        raise SettingsError(f"there are no API keys in {path} ([gateway] keys): make one with `thumbwheel keys add`")
    keys = Keys(path)
    listener = listen(settings.gateway.host, settings.gateway.port)
    log, rollout = logs(settings)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, keys, log, rollout, listener, config))
    finally:
        listener.close()
        rollout.close()
        log.close()


def logs(settings: Settings) -> tuple[SqliteLog, SqliteLog]:
    """The log that a gateway appends to and the one that it reads the rollout from, both on this machine.

    Raises SettingsError or LogError where they cannot be had.

    With Kafka they are the outbox and the mirror, and the forwarder carries between them and the cluster.
    """
    if settings.log.backend == "kafka":
        from thumbwheel.log.kafka.connection import Connection

        Connection(settings)  # what is wrong with the settings is said here and not, over and over, by the forwarder
        outbox = Outbox(settings.path(settings.log.outbox), settings.log.outbox_max_bytes)
        return outbox, SqliteLog(settings.path(settings.log.mirror), "[log] mirror")
    log = SqliteLog(settings.path(settings.log.path))
    return log, log


async def serve(
    settings: Settings, keys: Keys, log: SqliteLog, rollout: SqliteLog, listener: socket.socket, config: Path | None
) -> None:
    """HTTP answers at once (`/readyz` says what is missing); the engine comes up beside it."""
    router = Router()
    commit = GroupCommit(log)
    engine = Engine(settings, on_down=router.close)
    store = AdapterStore(settings.path(settings.store.path))
    reconciler = Reconciler(settings, rollout, commit, store, engine, router)
    forwarding = None
    if settings.log.backend == "kafka":
        forwarding = asyncio.create_task(ForwarderProcess(config).run())
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
        tasks = [supervision, reconciliation, *([forwarding] if forwarding else [])]
        for task in tasks:  # none ends but by an error, which ends the gateway
            task.add_done_callback(lambda _: server.stop())
        logger.info("listening on %s:%d", *listener.getsockname()[:2])
        try:
            await server.serve(sockets=[listener])
        finally:
            failed = [task for task in tasks if task.done()]
            await _leave(supervision, reconciliation, reconciler, commit)
            if forwarding:
                await _end(forwarding)
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
