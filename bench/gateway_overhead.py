"""What the gateway costs: added latency against the same upstream asked directly, and CPU against litellm's proxy.

    python -m bench.gateway_overhead [--requests N]

The upstream answers at once in vLLM's shape (`light_upstream.py`); each server is a process of its own, and the gateway
logs every exchange to disk. Three measures of latency, direct and through the gateway by turns:

    whole    one client, whole answers: time to the answer
    stream   one client, streams: time to the first token
    streams  32 clients that start one after the other, streams at 50 tokens/s each: time to the first token

The last line is one JSON object. `added_p50_ms` and `added_p99_ms` are the largest of the three differences of
percentiles; `litellm_ratio` is litellm's CPU time for a whole answer divided by the gateway's, that is how many times
more requests a core serves. Not covered: the engine's own cost of log-probs, TLS, a disk that is slower than this one.
"""

import argparse
import asyncio
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson

from bench.light_upstream import PACE_S, TOKENS

ROOT = Path(__file__).parent.parent
LITELLM = ROOT / ".cache" / "bench" / "litellm"
BODY = {"model": "policy", "messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": 64}
STREAM_S = TOKENS * PACE_S
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A process that serves, its address and its CPU time."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, key: str = "none") -> None:
        self.process = process
        self.url = url
        self.headers = {"Authorization": f"Bearer {key}"}

    def cpu_s(self) -> float:
        """CPU time so far, of all threads (proc(5), fields 14 and 15 of stat)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def serving(
    command: Sequence[str | Path], port: int, key: str = "none", environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, wait until its port answers, stop it at the end."""
    merged = os.environ | (environment or {})
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=merged, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} did not listen within 120 s"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield Server(process, f"http://127.0.0.1:{port}", key)
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def ask(session: aiohttp.ClientSession, server: Server, stream: bool) -> float:
    """Seconds to the whole answer, or to the first token of a stream (which is then read to its end)."""
    started = time.perf_counter()
    url = f"{server.url}/v1/chat/completions"
    async with session.post(url, json={**BODY, "stream": stream}, headers=server.headers) as answer:
        assert answer.status == 200, await answer.text()
        if not stream:
            await answer.read()
            return time.perf_counter() - started
        seen = b""
        async for data in answer.content.iter_any():
            seen += data
            if b'"content":" word"' in seen:
                break
        first = time.perf_counter() - started
        await answer.read()
        return first


async def compare(servers: Sequence[Server], requests: int, clients: int, stream: bool) -> list[list[float]]:
    """The times of each server, asked by turns so that what else the machine does meets them alike."""
    times: list[list[float]] = [[] for _ in servers]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int, share: int, server: Server, into: list[float]) -> None:
            # Users do not press enter at the same moment: spread the starts over one stream.
            await asyncio.sleep(number / clients * STREAM_S if stream else 0)
            into.extend([await ask(session, server, stream) for _ in range(share)])

        rounds = 10
        for _ in range(rounds):
            for server, into in zip(servers, times, strict=True):
                share = max(1, requests // rounds // clients)
                await asyncio.gather(*(client(number, share, server, into) for number in range(clients)))
    return times


async def cpu_per_request(server: Server, requests: int, clients: int = 8) -> float:
    """CPU seconds of one whole answer, after a warm-up."""
    await compare([server], 100, clients, stream=False)
    before = server.cpu_s()
    (times,) = await compare([server], requests, clients, stream=False)
    return (server.cpu_s() - before) / len(times)


def install_litellm() -> Path:
    """litellm's proxy in a virtual environment of its own, made once."""
    program = LITELLM / "bin" / "litellm"
    if not program.exists():
        print("installing litellm[proxy] beside, once", file=sys.stderr)
        uv = [sys.executable, "-m", "uv"]
        environment = os.environ | {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
        subprocess.run([*uv, "venv", "--quiet", "--allow-existing", LITELLM], check=True, env=environment)
        python = str(LITELLM / "bin" / "python")
        subprocess.run(
            [*uv, "pip", "install", "--quiet", "--python", python, "litellm[proxy]"], check=True, env=environment
        )
    return program


def litellm_config(directory: Path, upstream: str) -> Path:
    """One model, one upstream, nothing else switched on."""
    parameters = {"model": "openai/policy", "api_base": f"{upstream}/v1", "api_key": "none"}
    path = directory / "litellm.yaml"  # JSON is YAML
    path.write_bytes(orjson.dumps({"model_list": [{"model_name": "policy", "litellm_params": parameters}]}))
    return path


def gateway_process(directory: str, upstream: str, port: str) -> None:
    """The gateway as `serve.main` runs it, but for the engine: its routes are fixed."""
    import uvicorn

    from serve.app import create_app
    from serve.auth import Keys
    from serve.routing import Route, Router, Table
    from thumbwheel.log import SqliteLog
    from thumbwheel.log.group import GroupCommit
    from thumbwheel.settings import Settings

    settings = Settings(data=Path(directory))
    log = SqliteLog(settings.path(settings.log.path))
    router = Router()
    route = Route("base", "sha256:0", "policy@base")
    router.table = Table(champion=route, proved={"base": route})
    keys = Keys(settings.path(settings.gateway.keys))
    app = create_app(settings, router, log, GroupCommit(log), keys, lambda: upstream)
    uvicorn.run(app, port=int(port), http="httptools", loop="uvloop", log_config=None, access_log=False)


def measure(requests: int) -> dict[str, Any]:
    """Run everything; prints a table and returns what the last line says."""
    from serve.auth import create
    from thumbwheel.events import RESPONSES
    from thumbwheel.log import SqliteLog
    from thumbwheel.settings import Settings

    program = install_litellm()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = Settings(data=directory)
        key = create(settings.path(settings.gateway.keys), "bench", ["inference"])

        def start(*command: str | Path, port: int, key: str = "none", **environment: str) -> Server:
            return stack.enter_context(serving(command, port, key, environment))

        port = free_port()
        upstream = start(sys.executable, "-m", "bench.light_upstream", str(port), port=port)
        port = free_port()
        me = (sys.executable, "-m", "bench.gateway_overhead", "--gateway", directory, upstream.url)
        gateway = start(*me, str(port), port=port, key=key)
        added: list[tuple[float, float]] = []
        scenarios = {"whole": (1, False, requests), "stream": (1, True, 50), "streams": (32, True, 960)}
        for name, (clients, stream, count) in scenarios.items():
            asyncio.run(compare([upstream, gateway], clients * 10, clients, stream))  # warm-up
            direct, through = asyncio.run(compare([upstream, gateway], count, clients, stream))
            p = [np.percentile(np.array(times) * 1000, (50, 99)) for times in (direct, through)]
            added.append((float(p[1][0] - p[0][0]), float(p[1][1] - p[0][1])))
            rows = {"direct": p[0], "gateway": p[1], "added": added[-1]}
            cells = [f"{row} p50 {p50:.2f} p99 {p99:.2f} ms" for row, (p50, p99) in rows.items()]
            print(f"{name:8} n={len(through):5}  " + "   ".join(cells))
        ours = asyncio.run(cpu_per_request(gateway, requests))
        config = litellm_config(directory, upstream.url)
        port = free_port()
        master = "sk-" + secrets.token_hex(16)
        local = {
            "LITELLM_MASTER_KEY": master,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }  # checks keys too; fetches nothing
        where = ("--config", config, "--port", str(port), "--host", "127.0.0.1")
        litellm = start(program, *where, port=port, key=master, **local)
        theirs = asyncio.run(cpu_per_request(litellm, requests))
        print(f"CPU per request: gateway {ours * 1000:.2f} ms (logging on), litellm {theirs * 1000:.2f} ms")
        log = SqliteLog(settings.path(settings.log.path))
        logged = log.ends(RESPONSES)[1]
        log.close()
        assert logged > requests, "the gateway did not log"
    return {
        "added_p50_ms": round(max(p50 for p50, _ in added), 3),
        "added_p99_ms": round(max(p99 for _, p99 in added), 3),
        "litellm_ratio": round(theirs / ours, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--gateway", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gateway:
        gateway_process(*arguments.gateway)
    else:
        print(orjson.dumps(measure(arguments.requests)).decode())
