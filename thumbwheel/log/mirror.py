"""The rollout's events, copied from Kafka into a file beside the gateway, which reads no further than there.

A gateway that starts while the cluster is away serves what the rollout was when it was last seen.
"""

import logging

from thumbwheel.errors import LogError
from thumbwheel.events import ROLLOUT
from thumbwheel.log import deadletter
from thumbwheel.log.port import Consumer, Log, Record
from thumbwheel.log.sqlite import SqliteLog
from thumbwheel.reader import event_of

logger = logging.getLogger(__name__)

WHOLE = "whole"
"""The group whose position, once there is one, says that the mirror has held all that the log held at a time."""


class Mirror:
    """Follows the log as a member of `group`: persist, then commit."""

    def __init__(self, log: Log, mirror: SqliteLog, group: str) -> None:
        self._log = log
        self._mirror = mirror
        self._group = group
        self._consumer: Consumer | None = None
        self._taken: list[Record] = []
        self._goal: int | None = None

    def poll(self) -> bool:
        """Copy what is there; whether there was anything. Raises LogError; call again later."""
        if self._consumer is None:
            self._consumer = self._join()
        self._taken = self._taken or self._consumer.poll()  # none is skipped when one of the next steps fails
        records, messages = self._taken, []
        for record in records:
            try:
                event_of(record)
            except ValueError as error:
                deadletter.send(self._log, record, self._group, error)
            else:
                messages.append(record.message)
        if records:
            self._mirror.append(ROLLOUT, messages)
            self._mirror.commit(self._log.identity, ROLLOUT, records[-1].offset + 1)
            self._consumer.commit(records[-1])
            self._taken = []
        held = self._mirror.committed(self._log.identity, ROLLOUT)
        if self._goal is not None and held >= self._goal:
            self._mirror.commit(self._log.identity, ROLLOUT, held)
            self._mirror.commit(WHOLE, ROLLOUT, self._mirror.ends(ROLLOUT)[1])
            self._goal = None
            logger.info("the rollout is known up to now")
        return bool(records)

    def _join(self) -> Consumer:
        log, mirror = self._log, self._mirror
        if whole(mirror) and not mirror.has_committed(log.identity, ROLLOUT):
            raise LogError(
                f"{mirror.path} ([log] mirror) is the rollout of another cluster or prefix than [log.kafka] names: "
                "move it away, or name that one again"
            )
        first, end = log.ends(ROLLOUT)
        self._goal = end if end > first else 0
        return log.consumer(self._group, [ROLLOUT], {(ROLLOUT, 0): mirror.committed(log.identity, ROLLOUT)})

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()


def whole(mirror: SqliteLog) -> bool:
    """Whether the mirror ever held all of the rollout. Raises LogError where it cannot be read."""
    return mirror.has_committed(WHOLE, ROLLOUT)
