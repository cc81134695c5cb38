"""Sends messages so that those of one key keep their order whatever fails on the way.

An idempotent producer keeps the order within its session, until a batch fails or the producer is started again. Here a
message is on its way only when no other of its key is: what is sent again can come behind its successor only as a copy,
and copies are dropped by the id.
"""

import contextlib
from collections.abc import Iterator, Sequence

from kafka import KafkaProducer, errors

from thumbwheel.errors import LogError
from thumbwheel.log.cloudevents import to_headers
from thumbwheel.log.kafka.connection import MAX_BYTES, Connection
from thumbwheel.log.port import Message

Item = tuple[str, Message]
IN_FLIGHT_BYTES = 16 * 1024 * 1024


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

        Raises LogError when one of them is not known to have arrived, Undeliverable when it never will: then send all
        of them again. At most `IN_FLIGHT_BYTES` of messages, and one of a key, are on their way at once.
        """
        offsets: list[int] = []
        for wave in _waves(items):
            offsets += self._send(wave)
        return offsets

    def _send(self, wave: Sequence[Item]) -> list[int]:
        connection = self._connection
        doing = "send to"
        try:
            with connection.errors(doing):
                producer = self._ready()
            futures = []
            for item in wave:
                topic, message = item
                try:
                    with connection.errors(doing):
                        futures.append(
                            producer.send(
                                connection.name(topic),
                                key=message.key.encode(errors="surrogateescape"),
                                value=message.value,
                                headers=to_headers(message),
                                timestamp_ms=int(message.time * 1000),
                            )
                        )
                except LogError as error:
                    if isinstance(error.__cause__, _NEVER):
                        raise Undeliverable(item, error) from error
                    raise
            with connection.errors(doing):
                producer.flush(timeout=connection.settings.timeout_s * 2)
            offsets = []
            for item, future in zip(wave, futures, strict=True):
                if not future.is_done:
                    raise connection.explain(doing, TimeoutError("no answer in time"))
                if future.failed():
                    failure = connection.explain(doing, future.exception)
                    if isinstance(future.exception, _NEVER):
                        raise Undeliverable(item, failure) from future.exception
                    raise failure from future.exception
                offsets.append(future.value.offset)
            return offsets
        except LogError:
            self.close()  # what is still on its way must not overtake what is sent again
            raise

    def _ready(self) -> KafkaProducer:
        if self._producer is None:
            self._producer = KafkaProducer(
                **self._connection.options,
                acks="all",
                enable_idempotence=True,
                metrics_enabled=False,
                allow_auto_create_topics=False,
                linger_ms=2,
                batch_size=256 * 1024,
                max_request_size=MAX_BYTES,
                max_block_ms=self._connection.timeout_ms,
                delivery_timeout_ms=self._connection.timeout_ms + 1000,
            )
        return self._producer

    def close(self) -> None:
        """Drop the producer with what it still holds; the next message makes a new one."""
        if self._producer is not None:
            with contextlib.suppress(errors.KafkaError):
                self._producer.close(timeout=0)
            self._producer = None


_NEVER = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError, errors.InvalidTimestampError)


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
