"""Reading events off the log: decoded, in order, each id once."""

import logging
from collections.abc import Iterator

from thumbwheel.events import ROLLOUT, AnyEvent, decode
from thumbwheel.log.port import Log, Record
from thumbwheel.rollout import Rollout, apply

logger = logging.getLogger(__name__)


def read_all(log: Log, topic: str, start: int = 0, partition: int = 0) -> Iterator[Record]:
    """Every record from `start` to the end of the log as it is now."""
    offset = start
    while batch := log.read(topic, offset, partition=partition):
        yield from batch
        offset = batch[-1].offset + 1


class RolloutFollower:
    """The rollout's state, kept up with the log. Call `poll` as often as you like; it reads only what is new."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._offsets: dict[int, int] = {}
        self.state = Rollout()

    def poll(self) -> list[AnyEvent]:
        """Fold what is new into `state` and return it. What cannot be decoded is logged and changes nothing."""
        fresh: list[AnyEvent] = []
        for partition in range(self._log.partitions(ROLLOUT)):
            for record in read_all(self._log, ROLLOUT, self._offsets.get(partition, 0), partition):
                self._offsets[partition] = record.offset + 1
                try:
                    event = decode(record.message.value)
                except ValueError as error:
                    logger.warning("%s offset %d cannot be read: %s", ROLLOUT, record.offset, error)
                    continue
                self.state = apply(self.state, event)
                fresh.append(event)
        return fresh
