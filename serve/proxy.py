"""The inference endpoints: who asks, of which version, and off it goes to vLLM (see `exchange.py`)."""

import time
from collections.abc import Callable

import aiohttp
from starlette.requests import Request

from serve import metrics
from serve.auth import Key, Keys
from serve.body import read_object
from serve.errors import ApiError
from serve.exchange import Exchange, Line
from serve.injection import Endpoint, Json
from serve.routing import Route, Router
from thumbwheel.log.group import GroupCommit
from thumbwheel.settings import Settings

KEEP_ALIVE_S = 3.0
"""Shorter than the 5 s after which vLLM closes an idle connection: a request must not meet a closing one."""


class Proxy:
    """Forwards to one engine. `open` and `close` belong to the application's life."""

    def __init__(
        self, settings: Settings, router: Router, commit: GroupCommit, keys: Keys, engine_url: Callable[[], str]
    ) -> None:
        self._settings = settings
        self._router = router
        self._commit = commit
        self._keys = keys
        self._engine_url = engine_url

    async def open(self) -> None:
        """Make the pool of connections to the engine: as many as there are requests, kept alive between them."""
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._line = Line(self._settings, self._router, self._commit, session, self._engine_url)

    async def close(self) -> None:
        await self._line.session.close()

    async def chat(self, request: Request) -> Exchange:
        """POST /v1/chat/completions"""
        return await self._accept(request, "chat.completions")

    async def complete(self, request: Request) -> Exchange:
        """POST /v1/completions"""
        return await self._accept(request, "completions")

    async def _accept(self, request: Request, endpoint: Endpoint) -> Exchange:
        arrived = time.perf_counter()
        try:
            key = self._keys.authenticate(request.headers.get("authorization"))
            key.require("inference", "evaluator", "operator")
            body = await read_object(request, self._settings.gateway.max_body_bytes)
            route, asked = self._route(body, key)
        except ApiError:
            metrics.REQUESTS.labels(endpoint, "none", "rejected").inc()
            raise
        return Exchange(self._line, endpoint, body, route, asked, key, arrived)

    def _route(self, body: Json, key: Key) -> tuple[Route, str]:
        """Who answers, and the model name that the answer carries. Without a model it is the champion, as in vLLM."""
        name = self._settings.gateway.model_name
        asked = body.get("model") or name
        if not isinstance(asked, str):
            raise ApiError(400, "'model' has to be a string.", param="model")
        if asked == name:
            route = self._router.current()
            if route is None:
                why = self._router.why_not_ready()
                raise ApiError(503, f"The gateway is not ready: {why}.", headers={"Retry-After": "1"})
            return route, asked
        base, _, version = asked.partition("@")
        if base == name and version:
            key.require("evaluator", "operator")
            route = self._router.pinned(version)
            if route is not None:
                return route, asked
        raise ApiError(404, f"The model `{asked}` does not exist. Valid aliases: {name}.", param="model")
