"""The loop under the demo: `thumbwheel up` as a newcomer would run it, and its command line."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from thumbwheel import process
from thumbwheel.demo.broker import Cluster, free_ports
from thumbwheel.demo.prompts import KL_SUBJECTS, questions
from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import FEEDBACK
from thumbwheel.log import open_log
from thumbwheel.log.kafka.connection import Connection
from thumbwheel.log.kafka.topics import make
from thumbwheel.manifest import Manifest
from thumbwheel.reader import RolloutFollower
from thumbwheel.settings import Settings, load
from thumbwheel.store import AdapterStore

SETTINGS = """\
data = "{data}"

{log}
[engine]
model = "{model}"
max_loras = 3
max_lora_rank = 8
stop_token_ids = [1]  # <|im_start|>
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

KAFKA = """\
[log]
backend = "kafka"
forwarder_metrics_port = {forwarder}

[log.kafka]
bootstrap = "{bootstrap}"
prefix = "{prefix}"
partitions = 3
replication = 1
min_insync_replicas = 1
"""

LogName = Literal["sqlite", "kafka"]
_VARIABLE = "THUMBWHEEL_LOG__KAFKA__"

LEARNING_RATE = 5e-4
KL_BUDGET = 1.0

RENEWED = ("learner", "guardrails", "control")
"""What SIGHUP to `thumbwheel up` starts again."""


class Loop:
    """A running `thumbwheel up` on free ports, with its data in one directory. A context manager: it stops it.

    With `log="kafka"` the log is on a broker of its own, which ends last, or on the cluster that
    `$THUMBWHEEL_LOG__KAFKA__BOOTSTRAP` names, in topics that nobody else has and that are deleted there at the end.
    """

    def __init__(
        self, data: Path, model: Path, *, batch: int, updates: int, kl_samples: int, log: LogName = "sqlite"
    ) -> None:
        """Raises ThumbwheelError where there is no Kafka to be had. Then nothing is left running."""
        ports = dict(zip(("gateway", "learner", "guardrails", "control"), free_ports(4), strict=True))
        data.mkdir(parents=True, exist_ok=True)
        self.data = data
        self.config = data / "thumbwheel.toml"
        self._values = {
            "data": data,
            "model": model,
            "batch": batch,
            "updates": updates,
            "samples": kl_samples,
            "log": "",
            **ports,
        }
        self.url = f"http://127.0.0.1:{ports['gateway']}"
        asked = questions(KL_SUBJECTS, kl_samples, seed=7)
        lines = [json.dumps({"messages": [{"role": "user", "content": question}]}) for question in asked]
        (data / "kl_prompts.jsonl").write_text("\n".join(lines) + "\n")
        with ExitStack() as stack:
            if log == "kafka":
                self._values["log"] = stack.enter_context(_kafka(data))
            self._configure(LEARNING_RATE, KL_BUDGET)
            self.settings = load(self.config)
            if log == "kafka":
                stack.enter_context(_topics(self.settings))
            self.log = open_log(self.settings)
            stack.callback(self.log.close)
            self.rollout = RolloutFollower(self.log)
            output = stack.enter_context((data / "up.log").open("wb"))
            self._up = process.start([*self._command, "up"], output=output)
            stack.callback(process.stop, self._up, 90)
            self._stack = stack.pop_all()

    def _configure(self, learning_rate: float, kl_budget: float) -> None:
        self.config.write_text(SETTINGS.format(learning_rate=learning_rate, kl_budget=kl_budget, **self._values))

    def be_greedy(self, learning_rate: float) -> None:
        """Switch the KL budget off and turn the learning rate up; all but the gateway start again with that."""
        self._configure(learning_rate, float("inf"))
        self._up.send_signal(signal.SIGHUP)

    def starts(self) -> dict[str, float]:
        """When the programs that start again with new settings were started, Unix seconds; of those that answer."""
        answering = {name: metrics for name in RENEWED if (metrics := self._metrics(name))}
        return {name: metrics["process_start_time_seconds"][0].value for name, metrics in answering.items()}

    def renewed(self, before: dict[str, float]) -> bool:
        """Whether each of these programs is up and started since then."""
        now = self.starts()
        return len(now) == len(RENEWED) and all(now[name] != before.get(name) for name in now)

    def lacks_votes(self) -> bool:
        """Whether the learner waits for thumbs of the rarer kind."""
        return any(sample.value for sample in self._metrics("learner").get("thumbwheel_learner_missing_votes", ()))

    def _metrics(self, name: str) -> dict[str, list[Sample]]:
        """What a program shows on /metrics now; nothing where it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._values[name]}/metrics", timeout=5) as answer:
                families = text_string_to_metric_families(answer.read().decode())
                return {family.name: family.samples for family in families}
        except OSError:
            return {}

    @property
    def _command(self) -> list[str]:
        return [sys.executable, "-m", "thumbwheel.cli", "--config", str(self.config)]

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

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

    def votes(self) -> int:
        """How many votes are on the log."""
        partitions = range(self.log.partitions(FEEDBACK))
        return sum(self.log.ends(FEEDBACK, partition)[1] for partition in partitions)

    def manifest(self, version: str) -> Manifest:
        """What a version says of itself."""
        return AdapterStore(self.settings.path(self.settings.store.path)).open(version).manifest

    def command(self, *arguments: str) -> tuple[int, str]:
        """Run a command of the command line; its exit code and what it printed."""
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout + done.stderr).strip()


@contextmanager
def _kafka(data: Path) -> Iterator[str]:
    """The part of the settings that puts the log on Kafka; a broker of our own lives in `data` until the end.

    Raises ThumbwheelError where no cluster is named and `$KAFKA_HOME` is no release of Kafka.
    """
    (forwarder,) = free_ports(1)
    prefix = f"demo-{uuid.uuid4().hex[:8]}."
    if given := os.environ.get(f"{_VARIABLE}BOOTSTRAP"):
        if f"{_VARIABLE}PREFIX" in os.environ:
            raise ThumbwheelError(f"unset {_VARIABLE}PREFIX: the demo takes one that nobody else has")
        yield KAFKA.format(forwarder=forwarder, bootstrap=given, prefix=prefix)
        return
    try:
        cluster = Cluster(data / "kafka")
    except ThumbwheelError as error:
        raise ThumbwheelError(f"the demo has no Kafka ({_VARIABLE}BOOTSTRAP is not set): {error}") from error
    with cluster:
        yield KAFKA.format(forwarder=forwarder, bootstrap=cluster.bootstrap, prefix=prefix)


@contextmanager
def _topics(settings: Settings) -> Iterator[None]:
    """Topics for one run. A cluster that is not ours gets rid of them afterwards; ours keeps them in its directory."""
    made = make(settings)
    try:
        yield
    finally:
        if f"{_VARIABLE}BOOTSTRAP" in os.environ:
            _delete(settings, made)


def _delete(settings: Settings, topics: list[str]) -> None:
    connection = Connection(settings)
    admin = connection.admin()
    try:
        with connection.errors("delete topics in"):
            admin.delete_topics(topics)
    finally:
        admin.close()
