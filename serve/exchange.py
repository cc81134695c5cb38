"""One request on its way to vLLM and back.

An answer is passed on byte for byte as vLLM would have sent it without the gateway; only the model's name is the one
that the client asked for. The exchange is durable on the local log before its answer ends: before a whole answer is
sent, before the last event of a stream. What a client has seen to its end is never lost. A local log that fails, or
takes longer than a second, holds no answer back: it is counted, and said.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import orjson
from starlette.types import Receive, Scope, Send

from serve import metrics
from serve.auth import Key, user_hash
from serve.capture import Capture
from serve.errors import ApiError
from serve.injection import Endpoint, Json, inject, strip_answer, strip_chunk
from serve.routing import Route, Router
from thumbwheel.errors import LogError
from thumbwheel.events import ResponseGenerated, Timings, new_id
from thumbwheel.log import Appended
from thumbwheel.log.group import GroupCommit
from thumbwheel.settings import Settings

Outcome = Literal["completed", "client_disconnected", "engine_error", "timeout"]
PREFIX: dict[Endpoint, str] = {"chat.completions": "chatcmpl-", "completions": "cmpl-"}
UNSTORED = "ns"
"""Comes before the hex of a response id that is not on the log (`store: false`)."""
LOG_PATIENCE_S = 1.0
"""How long an answer waits for the local disk."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Line:
    """What all exchanges with one engine share."""

    settings: Settings
    router: Router
    commit: GroupCommit
    session: aiohttp.ClientSession
    engine_url: Callable[[], str]


class Exchange:
    """One request on its way to the engine and back; an ASGI response."""

    def __init__(
        self, line: Line, endpoint: Endpoint, request: Json, route: Route, asked: str, key: Key, arrived: float
    ) -> None:
        """`asked` is the model's name as the client gave it, `arrived` the request's time by `time.perf_counter`."""
        self._line = line
        self._endpoint = endpoint
        self._request = request
        self._route = route
        self._asked = asked
        self._key = key
        self._arrived = arrived
        self._id = new_id()
        self._stored = request.get("store") is not False
        self._forwarded, self._injected = inject(
            endpoint, request, route.engine_model, line.settings.engine.stop_token_ids
        )
        self._capture = Capture(endpoint, request)
        self._first_token_s: float | None = None
        self._started = False
        self._submitted = False
        self._outcome: Outcome | Literal["rejected"] = "client_disconnected"
        self._error: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay until the answer is out or the client is gone; either way the exchange is recorded."""
        with self._line.router.using(self._route), metrics.IN_FLIGHT.track_inprogress():
            relay = asyncio.create_task(self._relay(send))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait((relay, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                relay.cancel()  # closes the connection to the engine, which then aborts the request
                await asyncio.wait((relay,))
                crash = None if relay.cancelled() else relay.exception()
                if crash is not None:  # an answer of a shape that nobody foresaw
                    self._outcome, self._error = "engine_error", repr(crash)
                self._submit()
            if crash is not None:
                raise crash

    async def _relay(self, send: Send) -> None:
        line = self._line
        limit = line.settings.engine.request_timeout_s
        try:
            async with (
                asyncio.timeout(limit) as self._limit,
                line.session.post(
                    f"{line.engine_url()}/v1/{self._endpoint.replace('.', '/')}",
                    data=orjson.dumps(self._forwarded),
                    headers={"Content-Type": "application/json", "X-Request-Id": self._request_id},
                    allow_redirects=False,
                ) as upstream,
            ):
                if upstream.status != 200:
                    await self._refuse(upstream, send)
                elif upstream.content_type == "text/event-stream":
                    await self._stream(upstream, send)
                else:
                    await self._answer(await upstream.read(), send)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError):  # the latter is a TimeoutError too
            self._outcome = "engine_error"
            await self._fail(send, 503, "The engine cannot be reached; it may be restarting. Try again.")
        except TimeoutError:
            self._outcome = "timeout"
            await self._fail(send, 504, f"The engine did not finish within {limit:g} s.")
        except (aiohttp.ClientError, orjson.JSONDecodeError) as error:
            self._outcome = "engine_error"
            logger.warning("the engine broke off %s: %r", self._response_id, error)
            await self._fail(send, 502, "The engine broke off its answer. Try again.")

    async def _answer(self, raw: bytes, send: Send) -> None:
        answer = orjson.loads(raw)
        self._capture.answer(answer)
        strip_answer(answer, self._injected)
        answer["model"] = self._asked
        # As Starlette's JSONResponse in vLLM does it: orjson writes some floats differently (1e-5 for 1e-05).
        body = json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        self._outcome = "completed"
        await self._record()
        await self._send_whole(send, 200, body)

    async def _stream(self, upstream: aiohttp.ClientResponse, send: Send) -> None:
        await self._start(send, 200, [(b"content-type", upstream.headers["content-type"].encode())])
        rest = b""
        done = False
        async for data in upstream.content.iter_any():
            # One read may hold several events, and an event may be split over reads.
            *events, rest = (rest + data).split(b"\n\n")
            out = [kept + b"\n\n" for event in events if (kept := self._event(event)) is not None]
            if events and events[-1] == b"data: [DONE]":
                done = True
                # Settled before it is sent: a client may hang up as soon as it has read this.
                self._error = self._capture.error
                self._outcome = "completed" if self._error is None else "engine_error"
                await self._record()
            if out:
                await send({"type": "http.response.body", "body": b"".join(out), "more_body": True})
        if not done:
            raise aiohttp.ClientPayloadError("the stream ended without [DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _event(self, event: bytes) -> bytes | None:
        """One server-sent event as the client gets it; None for one that it would not have got."""
        if not event.startswith(b"data: {"):
            return event
        chunk = orjson.loads(event[6:])
        self._capture.chunk(chunk)
        if "error" in chunk:
            return event
        if self._first_token_s is None and self._capture.started:
            self._first_token_s = time.perf_counter() - self._arrived
        if not strip_chunk(chunk, self._injected):
            return None
        chunk["model"] = self._asked
        return b"data: " + orjson.dumps(chunk)

    async def _refuse(self, upstream: aiohttp.ClientResponse, send: Send) -> None:
        """Pass on the engine's error. The version was proved, so 404 means that the engine lost it in a restart."""
        body = await upstream.read()
        if upstream.status == 404:
            self._outcome = "engine_error"
            await self._fail(send, 503, f"The engine has lost version {self._route.version}; it is being loaded again.")
            return
        self._outcome = "rejected" if upstream.status < 500 else "engine_error"
        self._error = f"the engine answered {upstream.status}"
        await self._send_whole(send, upstream.status, body)

    async def _fail(self, send: Send, status: int, message: str) -> None:
        """Tell the client, in the stream where one has begun, as vLLM does it."""
        self._error = message
        error = ApiError(status, message)
        if not self._started:
            await self._send_whole(send, status, error.body)
            return
        body = b"data: " + error.body + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_whole(self, send: Send, status: int, body: bytes) -> None:
        length = str(len(body)).encode()
        await self._start(send, status, [(b"content-length", length), (b"content-type", b"application/json")])
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        headers += [
            (b"x-thumbwheel-version", self._route.version.encode()),
            (b"x-thumbwheel-digest", self._route.digest.encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})

    @property
    def _request_id(self) -> str:
        """What vLLM makes the response's id from."""
        return ("" if self._stored else UNSTORED) + uuid.UUID(self._id).hex

    @property
    def _response_id(self) -> str:
        return PREFIX[self._endpoint] + self._request_id

    async def _record(self) -> None:
        """Return once the exchange is durable, or the log has failed or taken too long."""
        self._limit.reschedule(None)  # the engine has answered in time; what comes now is not its fault
        appended = self._submit()
        if appended is None:
            return
        done, _ = await asyncio.wait((appended,), timeout=LOG_PATIENCE_S)
        if not done:
            metrics.LOG_LATE.inc()
            logger.error("the log has not taken %s within %g s; its answer goes out", self._response_id, LOG_PATIENCE_S)

    def _submit(self) -> "asyncio.Future[Appended] | None":
        """Hand the exchange to the log, once; None where there is nothing to wait for."""
        if self._submitted:
            return None
        self._submitted = True
        duration_s = time.perf_counter() - self._arrived
        version = self._route.version
        metrics.count_exchange(
            self._endpoint, version, self._outcome, self._first_token_s, duration_s, self._capture.tokens
        )
        if not self._stored or self._outcome == "rejected":
            return None
        try:
            appended = self._line.commit.submit(self._to_event(duration_s))
        except LogError as error:
            _not_appended(error)
            return None
        appended.add_done_callback(_appended)
        return appended

    def _to_event(self, duration_s: float) -> ResponseGenerated:
        assert self._outcome != "rejected"
        replica = self._line.settings.gateway.replica
        user: Any = self._request.get("safety_identifier") or self._request.get("user")
        return ResponseGenerated(
            id=self._id,
            source=f"gateway/{replica}",
            response_id=self._response_id,
            endpoint=self._endpoint,
            outcome=self._outcome,
            error=self._error,
            replica=replica,
            version=self._route.version,
            digest=self._route.digest,
            api_key=self._key.name,
            user=user_hash(str(user)) if user else None,
            stream=bool(self._request.get("stream")),
            request=self._request,
            prompt_token_ids=self._capture.prompt_token_ids(),
            choices=self._capture.choices(),
            sampling=self._capture.sampling,
            untrainable=self._capture.untrainable(self._outcome),
            timings=Timings(first_token_s=self._first_token_s, duration_s=duration_s),
        )


async def _gone(receive: Receive) -> None:
    """Returns when the client is gone. The body has been read, so no other message can come."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _appended(future: "asyncio.Future[Appended]") -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _not_appended(error)


def _not_appended(error: BaseException) -> None:
    metrics.APPEND_FAILURES.inc()
    logger.error("an exchange is not on the log: %s", error)
