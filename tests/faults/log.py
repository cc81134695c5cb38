"""A fault run over the log: two gateways, Kafka, and somebody who kills. Then every acknowledged event is looked up.

    KAFKA_HOME=… python -m tests.faults.log [--responses N] [--votes N] [--kills N] [--brokers 1|3] [--seed N]

Clients ask and vote; brokers, gateways, forwarders and the consumer are killed with SIGKILL at random times and started
again; brokers are paused with SIGSTOP until more events wait than may be in flight. The engine behind the gateways is
`bench.light_upstream`: what is on trial is the log. The consumer is the learner's intake with its buffer. The last line
is the account in JSON; the exit code says whether it balances.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.process import free_port
from tests.faults import account
from tests.faults.chaos import Chaos, ConsumerProcess
from tests.faults.traffic import Crowd
from tests.kafka import kafka
from tests.launch import GatewayProcess, wait_for
from thumbwheel.demo.broker import Cluster
from thumbwheel.events import FEEDBACK, RESPONSES
from thumbwheel.log.kafka import topics
from thumbwheel.log.kafka.forwarder import BATCH, ORDER
from thumbwheel.log.outbox import Outbox
from thumbwheel.settings import Settings


@dataclass(frozen=True)
class Size:
    """How much of everything. `pause_s`: how long the brokers stand still."""

    responses: int = 10_000
    votes: int = 5_000
    kills: int = 24
    brokers: int = 1
    pause_s: float = 25.0
    seed: int = 0


def run(size: Size, directory: Path) -> dict[str, Any]:
    """The whole run in a directory; returns the account. Leaves nothing running."""
    copies = min(size.brokers, 3)
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(directory / "kafka", size.brokers))
        log = kafka(
            cluster.bootstrap,
            replication=copies,
            min_insync_replicas=max(1, copies - 1),
            timeout_s=8.0,
            member="",
        )
        topics.make(Settings(data=directory, log=log))
        log["forwarder_metrics_port"] = 0
        upstream = stack.enter_context(upstream_on(directory))
        gateways = [stack.enter_context(gateway_on(directory / name, name, upstream, log)) for name in ("g1", "g2")]
        consumer = ConsumerProcess(directory, {"THUMBWHEEL_LOG": json.dumps(_as_member(log, "consumer"))})
        stack.callback(consumer.stop)
        consumer.start()
        for gateway in gateways:
            gateway.until_ready(120)
        crowd = Crowd(gateways, size.responses, size.votes, size.seed)
        chaos = Chaos(cluster.brokers, gateways, consumer, size.kills, size.pause_s, size.seed)
        most = asyncio.run(_live(crowd, chaos, gateways))
        told = crowd.told
        print(f"{len(told.responses)} responses, {len(told.votes)} votes acknowledged; waiting for the log", flush=True)
        wait_for(lambda: not any(_waiting(gateway) for gateway in gateways), 300, "all outboxes are empty")
        prefix = log["kafka"]["prefix"]
        votes = list(account.read_topic(cluster.bootstrap, prefix + FEEDBACK))
        responses = [event for _, event in account.read_topic(cluster.bootstrap, prefix + RESPONSES)]
        ids = {event["id"] for _, event in votes}, {event["response_id"] for event in responses}

        def all_counted() -> bool:
            counted_responses, counted_votes = account.counted(directory / "buffer.sqlite")
            return {id for id, _ in counted_votes} >= ids[0] and set(counted_responses) >= ids[1]

        wait_for(all_counted, 300, "the consumer has counted what is on the log")
        found = account.settle(told, responses, votes, *account.counted(directory / "buffer.sqlite"))
    return {
        "kills": chaos.killed.total(),
        **found.as_json(),
        "killed": dict(chaos.killed),
        "most_waiting": most,
        "in_flight_bound": BATCH,
        "refused_while_down": told.refused,
        "brokers": size.brokers,
    }


async def _live(crowd: Crowd, chaos: Chaos, gateways: list[GatewayProcess]) -> int:
    """Clients and chaos side by side; returns the most events that ever waited in one outbox."""
    began = time.monotonic()
    most = 0

    def say(words: str) -> None:
        told = crowd.told
        print(
            f"{time.monotonic() - began:6.1f} s  {words}; {len(told.responses)} responses, {len(told.votes)} votes, "
            f"waiting {[_waiting(gateway) for gateway in gateways]}",
            flush=True,
        )

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, *[await asyncio.to_thread(_waiting, gateway) for gateway in gateways])
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    living = asyncio.create_task(crowd.run())
    try:
        await chaos.run(say)
        crowd.enough.set()
        await living
    finally:
        watching.cancel()
        living.cancel()
    return most


def _waiting(gateway: GatewayProcess) -> int:
    settings = gateway.settings
    outbox = Outbox(settings.path(settings.log.outbox), settings.log.outbox_max_bytes)
    try:
        return sum(outbox.waiting(topic)[0] for topic in ORDER)
    finally:
        outbox.close()


def _as_member(log: dict[str, Any], member: str) -> dict[str, Any]:
    return {**log, "kafka": {**log["kafka"], "member": member}}


@contextmanager
def gateway_on(data: Path, name: str, upstream: str, log: dict[str, Any]) -> Iterator[GatewayProcess]:
    (data / "model").mkdir(parents=True)
    (data / "model" / "config.json").write_text("{}")
    process = GatewayProcess(data, gateway={"replica": name}, engine={"url": upstream}, log=_as_member(log, name))
    with process:
        yield process


@contextmanager
def upstream_on(directory: Path) -> Iterator[str]:
    port = free_port()
    with (directory / "upstream.log").open("wb") as output:
        command = [sys.executable, "-m", "bench.light_upstream", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def balances(found: dict[str, Any]) -> bool:
    """Whether nothing was lost, counted twice or out of order."""
    return not (found["lost"] or found["twice"] or found["disordered"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Size().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--keep", type=Path, help="a directory for everything, which stays")
    given = vars(parser.parse_args())
    keep = given.pop("keep")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="thumbwheel-faults-") as scratch:
        directory = keep.absolute() if keep else Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        found = run(Size(**given), directory)
    found["seconds"] = round(time.monotonic() - began, 1)
    found["load_average"] = round(os.getloadavg()[0], 1)
    print(json.dumps(found))
    sys.exit(0 if balances(found) else 1)


if __name__ == "__main__":
    main()
