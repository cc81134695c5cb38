"""The forwarder: a process beside each gateway that carries its outbox to Kafka, and the rollout back.

    outbox ──▶ sent, in every in-sync replica ──▶ position moved on, in one transaction with what is no longer needed

Killed at any moment it sends some messages again, as copies with the same ids. Reports and votes go before responses.
"""

import fcntl
import logging
import os
import threading
import time
from collections import Counter as Counts
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from prometheus_client import Counter, Gauge

from thumbwheel.daemon import Daemon, configure_logging
from thumbwheel.errors import LogError, ThumbwheelError
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.log import KafkaLog
from thumbwheel.log.kafka.sender import Sender, Undeliverable
from thumbwheel.log.mirror import Mirror
from thumbwheel.log.outbox import Outbox
from thumbwheel.log.sqlite import SqliteLog
from thumbwheel.settings import Settings

logger = logging.getLogger(__name__)

ORDER = (ROLLOUT, FEEDBACK, RESPONSES)
BATCH = 2000
BATCH_BYTES = 8 * 1024 * 1024
POLL_S = 0.05
MAX_WAIT_S = 2.0
"""Between two tries while the cluster is away."""
HOUSEKEEPING_S = 1.0
FAREWELL_S = 5.0
"""How long a forwarder that is told to stop goes on sending what waits."""

waiting = Gauge("thumbwheel_forwarder_waiting_events", "Events that Kafka has not got yet", ["topic"])
oldest = Gauge(
    "thumbwheel_forwarder_oldest_waiting_timestamp_seconds", "Time of the oldest event that waits, 0 when none does"
)
used = Gauge("thumbwheel_forwarder_outbox_bytes", "Size of what the outbox holds")
limit = Gauge("thumbwheel_forwarder_outbox_limit_bytes", "Over this, responses are dropped")
forwarded = Counter("thumbwheel_forwarder_forwarded", "Events that Kafka has acknowledged", ["topic"])
dropped = Counter("thumbwheel_forwarder_dropped", "Events that will never be sent", ["topic", "reason"])
failures = Counter("thumbwheel_forwarder_failures", "Times that sending failed and is tried again")
last_success = Gauge("thumbwheel_forwarder_last_success_timestamp_seconds", "When Kafka last acknowledged something")


class Forwarder:
    """Empties an outbox. One at a time: `run` holds a lock."""

    def __init__(self, outbox: Outbox, sender: Sender) -> None:
        self._outbox = outbox
        self._sender = sender

    def step(self) -> bool:
        """Send the next messages of each topic; whether there were any. Raises LogError, and then none is forgotten."""
        sent = [self._carry(topic) for topic in ORDER]
        return any(sent)

    def _carry(self, topic: str) -> bool:
        records = self._outbox.next(topic, BATCH, BATCH_BYTES)
        if not records:
            return False
        try:
            self._sender.send([(topic, record.message) for record in records])
        except Undeliverable as error:
            logger.error("%s %s is kept among the dead letters of the outbox: %s", topic, error.item[1].id, error)
            self._outbox.shelve(*error.item)
            return True
        except LogError:
            failures.inc()
            raise
        self._outbox.sent(topic, records[-1])
        forwarded.labels(topic).inc(len(records))
        last_success.set_to_current_time()
        return True


class Housekeeping(threading.Thread):
    """Holds the outbox to its limit, whatever the cluster does, and says on /metrics how it stands."""

    def __init__(self, outbox: Outbox, keep_s: float) -> None:
        super().__init__(name="housekeeping", daemon=True)
        self._outbox = outbox
        self._keep_s = keep_s
        self._ending = threading.Event()
        self._counted: Counts[tuple[str, str]] = Counts()
        limit.set(outbox.limit)

    def run(self) -> None:
        """Once a second, until `end`."""
        while not self._ending.wait(HOUSEKEEPING_S):
            try:
                self.tidy()
            except LogError as error:
                logger.warning("%s", error)

    def tidy(self) -> None:
        """One round."""
        if gone := self._outbox.trim():
            logger.error("%d responses were dropped: what waits has passed [log] outbox_max_bytes", gone)
        self._outbox.forget(time.time() - self._keep_s)
        used.set(self._outbox.bytes())
        standing = {topic: self._outbox.waiting(topic) for topic in ORDER}
        for topic, (count, _) in standing.items():
            waiting.labels(topic).set(count)
        oldest.set(min((time for _, time in standing.values() if time), default=0.0))
        for topic, reason, count in self._outbox.dropped():
            dropped.labels(topic, reason).inc(count - self._counted[topic, reason])
            self._counted[topic, reason] = count

    def end(self) -> None:
        """Wait for the round in progress."""
        self._ending.set()
        self.join()


def run(settings: Settings) -> None:
    """Forward until SIGTERM or SIGINT. Raises ThumbwheelError where another forwarder has the same outbox."""
    configure_logging("forwarder")
    connection = Connection(settings)
    path = settings.path(settings.log.outbox)
    with ExitStack() as life:
        outbox = life.enter_context(closing(Outbox(path, settings.log.outbox_max_bytes)))
        life.enter_context(_alone(path))
        mirrored = life.enter_context(closing(SqliteLog(settings.path(settings.log.mirror), "[log] mirror")))
        log = life.enter_context(closing(KafkaLog(settings)))
        sender = life.enter_context(closing(Sender(connection)))
        mirror = life.enter_context(closing(Mirror(log, mirrored, f"gateway.{settings.gateway.replica}")))
        forwarder = Forwarder(outbox, sender)
        housekeeping = Housekeeping(outbox, settings.log.outbox_keep_s)
        housekeeping.start()
        life.callback(housekeeping.end)

        def step() -> bool:
            try:
                sent = forwarder.step()
            finally:  # a cluster that takes nothing may still give
                copied = mirror.poll()
            return sent or copied

        Daemon(settings.log.forwarder_metrics_port).run(step, POLL_S, MAX_WAIT_S)
        _farewell(forwarder)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock beside an outbox; the end of the process, whatever its kind, gives it back."""
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ThumbwheelError(f"another forwarder is at work on {path} ([log] outbox)") from error
        yield
    finally:
        os.close(lock)


def _farewell(forwarder: Forwarder) -> None:
    """Send what the gateway said last. What does not go now goes after the next start."""
    deadline = time.monotonic() + FAREWELL_S
    try:
        while forwarder.step() and time.monotonic() < deadline:
            pass
    except LogError as error:
        logger.warning("%s; what waits goes after the next start", error)
