"""A gateway in a thread, with real sockets, for any test that wants one."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.app import create_app
from serve.auth import Keys, create
from serve.routing import Route, Router, Table
from thumbwheel.events import BASE, FEEDBACK, RESPONSES, FeedbackSubmitted, ResponseGenerated, decode
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings

DIGEST = "sha256:" + "0" * 64


@dataclass
class Gateway:
    """A running gateway and what a test needs of it. `router` may be changed while it runs."""

    url: str
    log: SqliteLog
    router: Router
    settings: Settings
    app_key: str
    evaluator_key: str

    def exchanges(self) -> list[ResponseGenerated]:
        events = [decode(record.message.value) for record in read_all(self.log, RESPONSES)]
        return [event for event in events if isinstance(event, ResponseGenerated)]

    def exchange(self, response_id: str | None = None, timeout: float = 5.0) -> ResponseGenerated:
        """The exchange of that id, or the last one, once it is on the log: it gets there after its answer is out."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = [event for event in self.exchanges() if response_id in (None, event.response_id)]
            if found:
                return found[-1]
            time.sleep(0.01)
        raise AssertionError(f"no exchange {response_id or ''} on the log within {timeout} s")

    def votes(self) -> list[FeedbackSubmitted]:
        events = [decode(record.message.value) for record in read_all(self.log, FEEDBACK)]
        return [event for event in events if isinstance(event, FeedbackSubmitted)]


class Host:
    """A server in a thread whose application can be exchanged: hundreds of tests share one."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self._dispatch, interface="asgi3", http="httptools", lifespan="off", log_config=None, access_log=False,
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="server")
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{host}:{port}"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve(sockets=[self._listener]))

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._app is not None, "nothing is being served"
        await self._app(scope, receive, send)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.002)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        self._listener.close()
        assert not self._thread.is_alive(), "the server did not stop"

    @contextmanager
    def serving(self, app: ASGIApp, life: AbstractAsyncContextManager[object]) -> Iterator[None]:
        """Serve `app`; its `life` begins before and ends after."""
        self._await(life.__aenter__())
        self._app = app
        try:
            yield
        finally:
            self._app = None
            self._await(life.__aexit__(None, None, None))

    def _await(self, coroutine: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(15)


@contextmanager
def gateway(
    host: Host, directory: Path, engine_url: str, engine_model: str = "policy@base", **sections: Any
) -> Iterator[Gateway]:
    """A gateway in front of an engine that runs at `engine_url` and serves the base model as `engine_model`."""
    settings = Settings(data=directory, **sections)
    keys = settings.path(settings.gateway.keys)
    app_key = create(keys, "app", ["inference", "feedback"])
    evaluator_key = create(keys, "evaluator", ["evaluator"])
    log = SqliteLog(settings.path(settings.log.path))
    commit = GroupCommit(log)
    router = Router()
    route = Route(BASE, DIGEST, engine_model)
    router.table = Table(champion=route, proved={BASE: route})
    app = create_app(settings, router, log, commit, Keys(keys), lambda: engine_url)

    @asynccontextmanager
    async def life() -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield
        await commit.close()

    try:
        with host.serving(app, life()):
            yield Gateway(host.url, log, router, settings, app_key, evaluator_key)
    finally:
        log.close()


def normalised(body: bytes) -> bytes:
    """An answer without what differs between two runs: ids and times. Tool calls have random ids too."""
    body = re.sub(rb'"id":"(chatcmpl-tool|chatcmpl|cmpl)-[^"]*"', rb'"id":"\1"', body)
    body = re.sub(rb'"id":"call_[^"]*"', b'"id":"call"', body)
    return re.sub(rb'"created":\d+', b'"created":0', body)


def comparable(shape: str, body: bytes) -> bytes:
    """`normalised` for two runs: log-probs differ in late digits, and streamed choices interleave by chance."""
    body = _without_digits(body)
    if "n2" not in shape or "stream" not in shape:
        return body
    return b"\n\n".join(sorted(body.split(b"\n\n"), key=lambda event: _index(bytes(event))))


def joined(shape: str, body: bytes) -> Any:
    """`comparable` for answers of an engine that is at work: it sends two tokens in one event where its reader lags.

    Of a stream the events of each choice are put together.
    """
    if "stream" not in shape:
        return comparable(shape, body)
    *events, end = _without_digits(body).strip().split(b"\n\n")
    found: dict[tuple[int, ...], Any] = {}
    for event in events:
        assert event.startswith(b"data: ")
        said = json.loads(event.removeprefix(b"data: "))
        place = tuple(choice["index"] for choice in said["choices"])
        found[place] = _and_then(found.get(place), said)
    return found, end


def _and_then(first: Any, more: Any, name: str = "") -> Any:
    """Two pieces of a stream's JSON as one, by the name that they are under."""
    if first is None or more is None:
        return more if first is None else first
    if isinstance(first, dict):
        return {key: _and_then(first.get(key), more.get(key), key) for key in {**first, **more}}
    if name in ("choices", "tool_calls"):
        both = [{one["index"]: one for one in some} for some in (first, more)]
        return [_and_then(both[0].get(i), both[1].get(i)) for i in sorted({**both[0], **both[1]})]
    return first + more if isinstance(first, list) or name in ("text", "content", "arguments") else more


def _without_digits(body: bytes) -> bytes:
    return re.sub(rb"-?\d+\.\d+(e-?\d+)?", b"0.0", normalised(body))


def _index(event: bytes) -> bytes:
    found = re.search(rb'"index":(\d+)', event)
    return found[1] if found else b""
