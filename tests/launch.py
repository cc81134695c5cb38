"""The gateway as its own process, for tests that end it, politely or not."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from serve.auth import create
from serve.process import free_port
from thumbwheel.log import SqliteLog
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore


def wait_for(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Look again and again; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.05)


def unload(engine_url: str, *names: str) -> None:
    """Make an engine that outlives the test forget adapters; those that it does not know are no error."""
    for name in names:
        request = urllib.request.Request(
            f"{engine_url}/v1/unload_lora_adapter",
            data=json.dumps({"lora_name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:
                raise


class GatewayProcess:
    """`thumbwheel serve` on a data directory. As a context manager it starts, and is gone at the end."""

    def __init__(self, data: Path, *, gateway: dict[str, Any] | None = None, **sections: dict[str, Any]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.sections = {"gateway": {"port": self.port, **(gateway or {})}, **sections}
        self.settings = Settings(data=data, **self.sections)  # type: ignore[arg-type]
        self.key = create(
            self.settings.path(self.settings.gateway.keys), "test", ["inference", "feedback", "evaluator"]
        )
        self.log = SqliteLog(self.settings.path(self.settings.log.path))
        self.store = AdapterStore(self.settings.path(self.settings.store.path))
        self.output = data / "gateway.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.terminate()
        self.log.close()
        if kind is not None:
            print(self.output.read_text()[-5000:])

    def start(self) -> None:
        """Start it, again if need be; it answers `/healthz` soon after."""
        environment = {f"THUMBWHEEL_{name.upper()}": json.dumps(section) for name, section in self.sections.items()}
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from thumbwheel.cli import main; main()", "serve"],
                env={**os.environ, **environment, "THUMBWHEEL_DATA": str(self.settings.data)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 while nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, answer and headers. Raises OSError where the connection fails."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), dict(error.headers)

    def until_ready(self, timeout: float = 30.0) -> None:
        """Wait for `/readyz` to say 200."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the gateway ended: {self.output.read_text()[-3000:]}"
            return self.get("/readyz")[0] == 200

        wait_for(ready, timeout, "ready")
