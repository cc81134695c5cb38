"""Sends messages so that those of one key keep their order whatever fails on the way.

An idempotent producer keeps the order within its session, until a batch fails or the producer is started again. Here a
message is on its way only when no other of its key is: what is sent again can come behind its successor only as a copy,
and copies are dropped by the id.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from kafka import KafkaProducer, errors

from thumbwheel.errors import LogError
from thumbwheel.log.cloudevents import bounded, to_headers
from thumbwheel.log.kafka.client import make
from thumbwheel.log.kafka.connection import LETTER_BYTES, Connection
from thumbwheel.log.port import Message

Item = tuple[str, Message]
IN_FLIGHT_BYTES = 16 * 1024 * 1024

_NEVER = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError, errors.InvalidTimestampError)


class Undeliverable(LogError):
    """The cluster will never take this message. `item` says which."""

    def __init__(self, item: Item, error: LogError) -> None:
        super().__init__(str(error))
        self.item = item


class Sender:
    """A producer, made when it is first needed. For one thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._producer: KafkaProducer | None = None

    def send(self, items: Sequence[Item]) -> list[int]:
        """Send messages to topics; returns their offsets once every in-sync replica has them.

        Raises LogError when one of them is not known to have arrived: send them again. Raises Undeliverable when one
        never will: send the others again. At most `IN_FLIGHT_BYTES`, and one of a key, are on their way at once.
        """
        offsets: list[int] = []
        for wave in _waves(items):
            start = time.time()
            try:
                with self._connection.errors("send to"):
                    offsets += self._send(wave, start)
            except LogError:
                self.close()  # what is still on its way must not overtake what is sent again
                raise
        return offsets

    def _send(self, wave: Sequence[Item], start: float) -> list[int]:
        """One wave; it has an end for every message of it."""
        producer = self._ready()
        futures = [self._hand_over(producer, item) for item in wave]
        deadline = time.monotonic() + 2 * self._connection.settings.timeout_s
        failed = []
        for item, future in zip(wave, futures, strict=True):
            try:
                future.get(max(0.0, deadline - time.monotonic()))  # flush() takes a batch that is split for a failure
            except errors.KafkaError as error:
                failed.append((item, error))
        if not failed:
            return [future.value.offset for future in futures]
        for item, failure in failed:
            if isinstance(failure, _NEVER):  # what lay in one batch with it has failed as well
                raise Undeliverable(item, self._connection.explain("send to", failure, start)) from failure
        raise failed[0][1]

    def _hand_over(self, producer: KafkaProducer, item: Item) -> Any:
        """The future of a message. One that is refused here and now has failed already."""
        topic, message = item
        try:
            return producer.send(
                self._connection.name(topic),
                key=message.key.encode(errors="surrogateescape"),
                value=message.value,
                headers=to_headers(message),
                timestamp_ms=int(bounded(message.time) * 1000),
            )
        except _NEVER as error:
            return _Refused(error)

    def _ready(self) -> KafkaProducer:
        if self._producer is None:
            self._producer = make(
                KafkaProducer,
                **self._connection.options,
                acks="all",
                enable_idempotence=True,
                metrics_enabled=False,
                allow_auto_create_topics=False,
                linger_ms=2,
                batch_size=256 * 1024,
                max_request_size=LETTER_BYTES,
                max_block_ms=self._connection.timeout_ms,
                delivery_timeout_ms=self._connection.timeout_ms + 1000,
            )
        return self._producer

    def close(self) -> None:
        """Drop the producer with what it still holds; the next message makes a new one."""
        producer, self._producer = self._producer, None
        if producer is not None:
            # Where something is on its way still, close() alone gives up, and its thread goes on sending.
            producer._sender.force_close()
            producer._sender.join(self._connection.settings.timeout_s)
            producer.close(timeout=0)


class _Refused:
    """The future of a message that the producer did not take."""

    def __init__(self, error: errors.KafkaError) -> None:
        self._error = error

    def get(self, timeout: float) -> None:
        raise self._error


def _waves(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Cut a sequence where a key comes again or the bytes in flight would be too many."""
    wave: list[Item] = []
    keys: set[tuple[str, str]] = set()
    size = 0
    for topic, message in items:
        if wave and ((topic, message.key) in keys or size + len(message.value) > IN_FLIGHT_BYTES):
            yield wave
            wave, keys, size = [], set(), 0
        wave.append((topic, message))
        keys.add((topic, message.key))
        size += len(message.value)
    if wave:
        yield wave
