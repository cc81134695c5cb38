"""Takes responses and votes off the log into the buffer: what cannot be read goes to the dead letters, then the rest is
persisted with its offset, then the group's position is committed. Killed anywhere, nothing is lost or counted twice.
"""

import logging

from learner.buffer import Buffer, Entry
from thumbwheel.events import FEEDBACK, RESPONSES
from thumbwheel.log import Log, Record, deadletter

logger = logging.getLogger(__name__)

GROUP = "learner"
AT_ONCE = 5_000
"""About how many records one poll takes in before its caller gets to do something else."""


class Intake:
    """The learner's place in its group. One a buffer, used by one thread."""

    def __init__(self, log: Log, buffer: Buffer) -> None:
        """Follow `log` from where `buffer` stands, whatever its group committed. Raises LogError."""
        self._log = log
        self._buffer = buffer
        offsets = buffer.offsets()
        if not offsets and not buffer.blank:
            logger.info("this log is new to the buffer: all of it is read, and what is known is passed over")
        topics = (RESPONSES, FEEDBACK)
        begin = {(topic, partition): 0 for topic in topics for partition in range(log.partitions(topic))}
        self._consumer = log.consumer(GROUP, topics, begin | offsets)
        self._kept: list[Record] = []

    def poll(self) -> bool:
        """Take in what is there now, and no more than about `AT_ONCE` records of it; whether there was anything.

        Raises LogError where the log or the buffer fails for the moment; the next poll goes on from there.
        """
        taken = 0
        while taken < AT_ONCE:
            self._kept = self._kept or self._consumer.poll()  # the consumer gives a batch once
            if not self._kept:
                break
            self._take(self._kept)
            taken += len(self._kept)
            self._kept = []
        return taken > 0

    def _take(self, batch: list[Record]) -> None:
        entries: list[Entry] = []
        for record in batch:
            try:
                entries.append(self._buffer.entry(record))
            except Exception as error:  # whatever a record provokes, the next one may be sound
                deadletter.send(self._log, record, GROUP, error)
        self._buffer.consume(entries, batch[-1])
        self._consumer.commit(batch[-1])

    def close(self) -> None:
        """Leave the group. The buffer stays open."""
        self._consumer.close()
