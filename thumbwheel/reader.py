"""Reading events off the log: decoded, in order, each id once."""

import logging

from thumbwheel.events import ROLLOUT, AnyEvent, ReplicaReported, decode
from thumbwheel.log import deadletter
from thumbwheel.log.port import Log, Record, read_all
from thumbwheel.rollout import Rollout, apply

logger = logging.getLogger(__name__)

REPORTS_KEPT = 10_000
"""How many ids of replicas' reports are remembered: reports never end, and a copy that comes later is out of date for
as long as the next report takes."""


def event_of(record: Record) -> AnyEvent:
    """The event in a record.

    Raises ValueError where it is none, none of a major version that this reader knows, or none of that topic.
    """
    event = decode(record.message.value)
    if event.topic != record.topic:
        raise ValueError(f"an event {event.type} does not belong on {record.topic}")
    return event


class RolloutFollower:
    """The rollout's state, kept up with the log. Call `poll` as often as you like; it reads only what is new.

    It reads from the beginning whoever it is. With a `group`, what that group has not dealt with and nobody can read
    goes to the dead letters, and its position is committed. Without one, what cannot be read is logged.
    """

    def __init__(self, log: Log, group: str | None = None) -> None:
        self._log = log
        self._group = group
        self._offsets: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._seen: dict[str, None] = {}
        self._reports: dict[str, None] = {}
        self._fresh: list[AnyEvent] = []
        self.state = Rollout()

    def poll(self) -> list[AnyEvent]:
        """Fold what is new into `state` and return it: each event once, however many copies of it lie on the log.

        Raises LogError; then the next poll goes on from there.
        """
        for partition in range(self._log.partitions(ROLLOUT)):
            if self._group is not None and partition not in self._committed:
                self._committed[partition] = self._log.committed(self._group, ROLLOUT, partition)
            for record in read_all(self._log, ROLLOUT, self._offsets.get(partition, 0), partition):
                self._take(record)
                self._offsets[partition] = record.offset + 1
            self._commit(partition)
        fresh, self._fresh = self._fresh, []
        return fresh

    def _take(self, record: Record) -> None:
        try:
            event = event_of(record)
        except ValueError as error:
            self._pass_over(record, error)
            return
        if not self._is_copy(event):
            self.state = apply(self.state, event)
            self._fresh.append(event)

    def _is_copy(self, event: AnyEvent) -> bool:
        seen = self._reports if isinstance(event, ReplicaReported) else self._seen
        if event.id in seen:
            return True
        seen[event.id] = None
        if len(self._reports) > REPORTS_KEPT:
            del self._reports[next(iter(self._reports))]  # a dict keeps the order: the oldest
        return False

    def _pass_over(self, record: Record, error: ValueError) -> None:
        if self._group is None:
            logger.warning("%s offset %d cannot be read: %s", ROLLOUT, record.offset, error)
        elif record.offset >= self._committed[record.partition]:
            deadletter.send(self._log, record, self._group, error)

    def _commit(self, partition: int) -> None:
        offset = self._offsets.get(partition, 0)
        if self._group is not None and offset > self._committed[partition]:
            self._log.commit(self._group, ROLLOUT, offset, partition)
            self._committed[partition] = offset
