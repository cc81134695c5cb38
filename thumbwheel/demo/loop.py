"""The loop under the demo: `thumbwheel up` as a newcomer would run it, and its command line."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from thumbwheel import process
from thumbwheel.demo.prompts import KL_SUBJECTS, questions
from thumbwheel.errors import ThumbwheelError
from thumbwheel.log.sqlite import SqliteLog
from thumbwheel.manifest import Manifest
from thumbwheel.reader import RolloutFollower
from thumbwheel.settings import load
from thumbwheel.store import AdapterStore

SETTINGS = """\
data = "{data}"

[engine]
model = "{model}"
max_loras = 3
max_lora_rank = 8
arguments = ["--enforce-eager", "--max-num-batched-tokens", "2048"]
environment = {{ VLLM_CPU_KVCACHE_SPACE = "1" }}

[gateway]
port = {gateway}

[learner]
metrics_port = {learner}
batch = {batch}
updates_per_candidate = {updates}
rank = 8
target_modules = ["o_proj", "down_proj"]
learning_rate = {learning_rate}
kl_budget = {kl_budget}
kl_prompts = "kl_prompts.jsonl"
kl_samples = {samples}
max_tokens = 96
settle_s = 1.0

[guardrails]
metrics_port = {guardrails}
gateway = "http://127.0.0.1:{gateway}"
suites = ["demo"]

[deploy]
metrics_port = {control}
approval = "manual"
"""

LEARNING_RATE = 1.3e-3
KL_BUDGET = 3.0
GREEDY_LEARNING_RATE = 5e-3


class Loop:
    """A running `thumbwheel up` on free ports, with its data in one directory. A context manager: it stops it."""

    def __init__(self, data: Path, model: Path, *, batch: int, updates: int, kl_samples: int) -> None:
        ports = dict(zip(("gateway", "learner", "guardrails", "control"), _free_ports(4), strict=True))
        data.mkdir(parents=True, exist_ok=True)
        self.data = data
        self.config = data / "thumbwheel.toml"
        self._values = {
            "data": data,
            "model": model,
            "batch": batch,
            "updates": updates,
            "samples": kl_samples,
            **ports,
        }
        self._configure(LEARNING_RATE, KL_BUDGET)
        asked = questions(KL_SUBJECTS, kl_samples, seed=7)
        lines = [json.dumps({"messages": [{"role": "user", "content": question}]}) for question in asked]
        (data / "kl_prompts.jsonl").write_text("\n".join(lines) + "\n")
        self.settings = load(self.config)
        self.url = f"http://127.0.0.1:{ports['gateway']}"
        self._output = (data / "up.log").open("wb")
        self._up = process.start([*self._command, "up"], output=self._output)
        self.log = SqliteLog(self.settings.path(self.settings.log.path))
        self.rollout = RolloutFollower(self.log)

    def _configure(self, learning_rate: float, kl_budget: float) -> None:
        self.config.write_text(SETTINGS.format(learning_rate=learning_rate, kl_budget=kl_budget, **self._values))

    def be_greedy(self) -> None:
        """Switch the KL budget off and turn the learning rate up; the learner starts again with that."""
        self._configure(GREEDY_LEARNING_RATE, float("inf"))
        self._up.send_signal(signal.SIGHUP)

    @property
    def _command(self) -> list[str]:
        return [sys.executable, "-m", "thumbwheel.cli", "--config", str(self.config)]

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        process.stop(self._up, 90)
        self._output.close()
        self.log.close()

    def key(self, name: str) -> str:
        """An API key that `up` made."""
        return (self.data / f"{name}.key").read_text().strip()

    def wait(self, until: Callable[[], bool], what: str, timeout_s: float, tick: Callable[[], None]) -> None:
        """Wait for something. Raises ThumbwheelError with the end of the output where it does not come in time."""
        deadline = time.monotonic() + timeout_s
        while not until():
            if self._up.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join((self.data / "up.log").read_text(errors="replace").splitlines()[-30:])
                raise ThumbwheelError(f"{what}: did not happen within {timeout_s:.0f} s\n{tail}")
            tick()
            time.sleep(0.2)

    def ready(self) -> bool:
        """Whether the gateway would take a chat now."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def manifest(self, version: str) -> Manifest:
        """What a version says of itself."""
        return AdapterStore(self.settings.path(self.settings.store.path)).open(version).manifest

    def command(self, *arguments: str) -> tuple[int, str]:
        """Run a command of the command line; its exit code and what it printed."""
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout + done.stderr).strip()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports
