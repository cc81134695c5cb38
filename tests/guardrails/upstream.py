"""A gateway's wire format on a real socket, for the sampler: answers from a recipe, with faults on demand."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

CHAT = {
    "prompt_token_ids": [5, 6, 7],
    "choices": [
        {
            "message": {"content": "Hi there"},
            "finish_reason": "stop",
            "token_ids": [10, 11, 2],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.5}, {"logprob": -0.1}]},
        }
    ],
}


@dataclass
class Upstream:
    """`reply(body)` gives the JSON of a 200; `faults` are given first, one status a request."""

    url: str = ""
    reply: Callable[[dict[str, Any]], Any] = lambda body: CHAT
    digest: str | None = "sha256:v1"
    faults: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if self.faults:
            return web.json_response({"error": {"message": "not now"}}, status=self.faults.pop(0))
        headers = {} if self.digest is None else {"x-thumbwheel-digest": self.digest}
        return web.json_response(self.reply(body), headers=headers)


@asynccontextmanager
async def running(upstream: Upstream) -> AsyncIterator[Upstream]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.handle)
    app.router.add_post("/v1/completions", upstream.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield upstream
    finally:
        await runner.cleanup()
