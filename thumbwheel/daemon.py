"""The life of a program that follows the log: start, step until told to stop, leave in order."""

import logging
import signal
import threading
from collections.abc import Callable

from prometheus_client import start_http_server

from thumbwheel.errors import LogError

logger = logging.getLogger(__name__)


def configure_logging(program: str) -> None:
    """Plain lines on standard error, with the time and the program's name."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {program} %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )


def on_signal(number: signal.Signals, act: Callable[[], None]) -> None:
    """Run `act` when the signal comes, in a thread of its own.

    A handler runs in the middle of whatever the main thread does: setting the event that the main thread is about to
    wait on would wait for a lock that the same thread holds, for ever.
    """
    signal.signal(number, lambda *_: threading.Thread(target=act, name=number.name).start())


class Daemon:
    """Runs a step over and over. SIGTERM and SIGINT end it after the step in progress."""

    def __init__(self, metrics_port: int) -> None:
        """`metrics_port` serves `/metrics`; 0 serves none."""
        self._metrics_port = metrics_port
        self.should_exit = threading.Event()

    def run(self, step: Callable[[], bool], poll_s: float, max_wait_s: float = 30.0) -> None:
        """Call `step` until told to stop; when it says that it found nothing to do, wait `poll_s` seconds.

        A log that cannot be reached is waited for, `max_wait_s` at most between tries. Any other error ends the
        program: its state is on disk, and what supervises it starts it again.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            on_signal(number, self._stop)
        if self._metrics_port:
            start_http_server(self._metrics_port)
        wait = poll_s
        while not self.should_exit.is_set():
            try:
                busy = step()
                wait = poll_s
            except LogError as error:
                wait = min(max_wait_s, wait * 2)
                logger.warning("%s; trying again in %.1f s", error, wait)
                busy = False
            if not busy:
                self.should_exit.wait(wait)

    def _stop(self) -> None:
        logger.info("told to stop")
        self.should_exit.set()
