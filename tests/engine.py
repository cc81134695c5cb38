"""A real vLLM for a session of tests, started as the gateway starts its own."""

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.process import EngineProcess
from thumbwheel.settings import EngineSettings, Settings

ARGUMENTS = ["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@contextmanager
def started(model: Path, directory: Path, timeout_s: float = 600.0) -> Iterator[str]:
    """Start one, wait until it is healthy, yield its URL, stop it."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    engine = EngineSettings(model=model.absolute(), arguments=ARGUMENTS, environment=environment)
    process = EngineProcess(Settings(data=directory, engine=engine))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine")
    thread.start()

    def call(stop: bool) -> None:
        asyncio.run_coroutine_threadsafe(process.stop() if stop else process.start(), loop).result(60)

    try:
        call(stop=False)
        deadline = time.monotonic() + timeout_s
        while not _healthy(process.url):
            assert time.monotonic() < deadline, f"vLLM was not ready within {timeout_s:g} s:\n{process.tail()}"
            time.sleep(0.5)
        yield process.url
    finally:
        call(stop=True)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
