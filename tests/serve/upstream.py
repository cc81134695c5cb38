"""A stand-in for vLLM that answers what a test put into it, byte for byte: recorded answers, errors, broken streams."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.serving import Host

RECORDED = Path(__file__).parent / "recorded"
STREAM, WHOLE = "text/event-stream; charset=utf-8", "application/json"


def recorded(shape: str, suffix: str = "full") -> bytes:
    """What vLLM answered; see `record.py`."""
    return (RECORDED / f"{shape}.{suffix}").read_bytes()


@dataclass
class Reply:
    """An answer in parts; after each a pause. One that breaks off drops the connection in the middle."""

    parts: Sequence[bytes]
    status: int = 200
    content_type: str = WHOLE
    pause_s: float = 0.0
    breaks_off: bool = False


@dataclass
class Upstream:
    """Feed it with `enqueue`; it notes what it was asked, and how many requests were dropped before their end."""

    url: str = ""
    replies: deque[Reply] = field(default_factory=deque)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0

    def reset(self) -> None:
        """Forget everything but where it listens."""
        for noted in (self.replies, self.paths, self.headers, self.bodies):
            noted.clear()
        self.aborted = 0

    def enqueue(self, *parts: bytes, **options: Any) -> None:
        self.replies.append(Reply(parts, **options))

    def enqueue_recorded(self, shape: str, **options: Any) -> None:
        """A recorded answer, cut into parts where no event ends."""
        body = recorded(shape)
        if "stream" not in shape:
            return self.enqueue(body, **options)
        return self.enqueue(*(body[i : i + 700] for i in range(0, len(body), 700)), content_type=STREAM, **options)

    def wait_for_abort(self) -> None:
        deadline = time.monotonic() + 5
        while not self.aborted:
            assert time.monotonic() < deadline, "the request was not closed"
            time.sleep(0.01)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.bodies.append(orjson.loads(await request.body()))
        self.paths.append(request.url.path)
        self.headers.append(dict(request.headers))
        reply = self.replies.popleft()
        answering = asyncio.create_task(self._answer(reply, send))
        gone = asyncio.create_task(receive())  # type: ignore[var-annotated, arg-type]
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.aborted += 1
        answering.cancel()
        gone.cancel()

    async def _answer(self, reply: Reply, send: Send) -> None:
        headers = [(b"content-type", reply.content_type.encode())]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for part in reply.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(reply.pause_s)
        # Without a last message the server finds the answer unfinished and closes the connection.
        if not reply.breaks_off:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def upstream() -> Iterator[Upstream]:
    """Run one."""
    with Host() as host:
        stand_in = Upstream(host.url)
        with host.serving(stand_in, nullcontext()):
            yield stand_in
