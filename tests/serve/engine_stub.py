"""A stand-in for vLLM's admin and scoring wire, which a test can make lie, refuse, hang and die.

It scores as an engine with perfect kernels would: the manifest's candidate log-probs where that adapter is loaded, the
base log-probs where `lies` has its name.
"""

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from thumbwheel.manifest import Manifest


@dataclass
class EngineStub:
    """What it holds and how it behaves; a test reads and changes both while it runs."""

    url: str = ""
    base: str = "policy@base"
    loaded: dict[str, Path] = field(default_factory=dict)
    unloaded: list[str] = field(default_factory=list)
    lies: set[str] = field(default_factory=set)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    healthy: bool = True
    hangs: bool = False
    calls: list[str] = field(default_factory=list)
    takes_s: float = 0.0

    def restart(self) -> None:
        """Forget every adapter, as a vLLM that starts again does."""
        self.loaded.clear()

    async def health(self, request: web.Request) -> web.Response:
        if self.hangs:
            await asyncio.sleep(1.0)
        return web.Response(status=200 if self.healthy else 503)

    async def models(self, request: web.Request) -> web.Response:
        entries = [(self.base, None), *((name, self.base) for name in self.loaded)]
        return web.json_response({"data": [{"id": name, "parent": parent} for name, parent in entries]})

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        self.calls.append(f"load {name}")
        if name in self.refuses:
            return error(*self.refuses[name])
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        self.loaded[name] = path
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self.loaded.pop(name, None) is None:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        self.unloaded.append(name)
        return web.Response(text="Success")

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(f"complete {body['model']}")
        assert body["max_tokens"] <= 8, "neither warming nor scoring needs more"
        if body["model"] not in {self.base, *self.loaded}:
            return error(404, f"The model `{body['model']}` does not exist.")
        await asyncio.sleep(self.takes_s)
        scores = self._scores(body) if "prompt_logprobs" in body else None
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": scores}
        return web.json_response({"id": "cmpl-1", "choices": [choice]})

    def _scores(self, body: dict[str, Any]) -> list[dict[str, dict[str, float]] | None]:
        manifest = Manifest.model_validate_json((self.loaded[body["model"]] / "manifest.json").read_bytes())
        for probe in manifest.probes:
            if [*probe.prompt_token_ids, *probe.completion_token_ids] == body["prompt"]:
                values = probe.base_logprobs if body["model"] in self.lies else probe.candidate_logprobs
                at = [
                    {str(token): {"logprob": value}}
                    for token, value in zip(probe.completion_token_ids, values, strict=True)
                ]
                return [None, *({"0": {"logprob": 0.0}} for _ in probe.prompt_token_ids[1:]), *at]
        raise AssertionError("a prompt that is no probe")


def error(status: int, message: str) -> web.Response:
    """As vLLM says it."""
    return web.json_response({"error": {"message": message, "type": "Error", "code": status}}, status=status)


def application(stub: EngineStub) -> web.Application:
    """The wire."""
    app = web.Application()
    app.router.add_get("/health", stub.health)
    app.router.add_get("/v1/models", stub.models)
    app.router.add_post("/v1/load_lora_adapter", stub.load)
    app.router.add_post("/v1/unload_lora_adapter", stub.unload)
    app.router.add_post("/v1/completions", stub.complete)
    app.router.add_post("/v1/chat/completions", stub.complete)
    return app


@contextmanager
def stub_engine() -> Iterator[EngineStub]:
    """Run one on a thread, on a real socket."""
    stub = EngineStub()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(application(stub), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stub.url = "http://{}:{}".format(*runner.addresses[0][:2])
        return runner

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield stub
    finally:
        stub.hangs = False
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


if __name__ == "__main__":  # as a process: python -m tests.serve.engine_stub PORT
    web.run_app(application(EngineStub()), host="127.0.0.1", port=int(sys.argv[1]), print=None)
