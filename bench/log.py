"""What the log costs: locally, through to Kafka, with the cluster gone, and with a million responses waiting.

    KAFKA_HOME=… python -m bench.log

Peers in the same run: `sqlite3` alone for the local log; a bare kafka-python producer (idempotent, acks=all), as it
comes and with our batching, for the way through to Kafka. The last line is JSON.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from learner.buffer import Buffer
from tests.faults.chaos import forwarder_of
from tests.faults.log import gateway_on, upstream_on
from tests.kafka import kafka
from thumbwheel.demo.broker import Cluster
from thumbwheel.events import FEEDBACK, RESPONSES, Choice, FeedbackSubmitted, ResponseGenerated, Sampling, Timings
from thumbwheel.log import Message, Record, message_of
from thumbwheel.log.group import GroupCommit
from thumbwheel.log.kafka import topics
from thumbwheel.log.outbox import FORWARDER, Outbox
from thumbwheel.settings import Settings

OUTSTANDING = 256
"""Appends that wait for the disk at a time: requests that a busy gateway is answering."""


def response(number: int, prompt: int, sampled: int) -> ResponseGenerated:
    """An exchange with this many tokens."""
    return ResponseGenerated(
        source="gateway/bench",
        response_id=f"chatcmpl-{number:032x}",
        endpoint="chat.completions",
        outcome="completed",
        replica="bench",
        version="v1",
        digest="sha256:0",
        api_key="bench",
        request={"model": "policy", "messages": [{"role": "user", "content": "word " * prompt}]},
        prompt_token_ids=[list(range(1000, 1000 + prompt))],
        choices=[
            Choice(
                index=0,
                text=" word" * sampled,
                finish_reason="stop",
                token_ids=list(range(sampled)),
                logprobs=[-1.2345678] * sampled,
            )
        ],
        sampling=Sampling(),
        timings=Timings(duration_s=1.0),
    )


async def append_all(log: Outbox, events: Sequence[ResponseGenerated]) -> None:
    """As a gateway under load does it."""
    commit = GroupCommit(log)
    gate = asyncio.Semaphore(OUTSTANDING)

    async def one(event: ResponseGenerated) -> None:
        async with gate:
            await commit.append(event)

    for start in range(0, len(events), 5000):
        await asyncio.gather(*(one(event) for event in events[start : start + 5000]))
    await commit.close()


def local(directory: Path, events: Sequence[ResponseGenerated]) -> float:
    """Events a second through the local log, each acknowledged after a sync that it shares with others."""
    log = Outbox(directory / "local.sqlite", 10**11)
    began = time.perf_counter()
    asyncio.run(append_all(log, events))
    elapsed = time.perf_counter() - began
    log.close()
    return len(events) / elapsed


def sqlite_alone(directory: Path, messages: Sequence[Message]) -> float:
    """The peer: rows into a table with the same columns and keys, `OUTSTANDING` a transaction, each one synced."""
    db = sqlite3.connect(directory / "alone.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE events (n INTEGER PRIMARY KEY, id TEXT UNIQUE, key TEXT, time REAL, value BLOB)")
    began = time.perf_counter()
    for start in range(0, len(messages), OUTSTANDING):
        rows = [(m.id, m.key, m.time, m.value) for m in messages[start : start + OUTSTANDING]]
        db.execute("BEGIN")
        db.executemany("INSERT INTO events (id, key, time, value) VALUES (?, ?, ?, ?)", rows)
        db.execute("COMMIT")
    elapsed = time.perf_counter() - began
    db.close()
    return len(messages) / elapsed


def bare(settings: Settings, messages: Sequence[Message], **options: Any) -> float:
    """The peer: events a second of a plain producer, until the last is acknowledged."""
    from kafka import KafkaProducer

    name = settings.log.kafka.prefix + RESPONSES
    producer = KafkaProducer(bootstrap_servers=settings.log.kafka.bootstrap, **options)
    producer.partitions_for(name)
    began = time.perf_counter()
    futures = [producer.send(name, key=message.key.encode(), value=message.value) for message in messages]
    producer.flush()
    elapsed = time.perf_counter() - began
    assert all(future.succeeded() for future in futures)
    producer.close()
    return len(messages) / elapsed


def through(settings: Settings, events: Sequence[ResponseGenerated], waits: bool) -> float:
    """Events a second from the append to Kafka's acknowledgement, with the forwarder in its own process as always.

    `waits`: everything lies in the outbox before the forwarder starts, as after an outage; else it comes meanwhile.
    """
    outbox = Outbox(settings.path(settings.log.outbox), settings.log.outbox_max_bytes)
    environment = {"THUMBWHEEL_LOG": settings.log.model_dump_json(), "THUMBWHEEL_DATA": str(settings.data)}
    done = outbox.committed(FORWARDER, RESPONSES) + len(events)
    if waits:
        asyncio.run(append_all(outbox, events))
    process = subprocess.Popen(
        [sys.executable, "-m", "thumbwheel.cli", "forward"],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if waits:  # its start is not what is measured
            while outbox.committed(FORWARDER, RESPONSES) == done - len(events):
                time.sleep(0.001)
            began, first = time.perf_counter(), outbox.committed(FORWARDER, RESPONSES)
        else:
            outbox.append(FEEDBACK, [Message(f"first-{time.time()}", "k", 1.0, b"{}")])
            while outbox.waiting(FEEDBACK)[0]:
                time.sleep(0.05)
            began, first = time.perf_counter(), done - len(events)
            asyncio.run(append_all(outbox, events))
        while outbox.committed(FORWARDER, RESPONSES) < done:
            time.sleep(0.005)
        return (done - first) / (time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait(30)
        outbox.close()


def rss_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000, 1)


def outage(directory: Path, cluster: Cluster, sizes: Sequence[int]) -> list[dict[str, float]]:
    """A gateway that answers chats, and its forwarder: with the cluster there, then with it gone and events waiting.

    The events are put into the gateway's outbox from here: the gateway does not hold them, so it makes no difference
    who put them there, and 200,000 chats would take their time. The cluster is back at the end.
    """
    log = {**kafka(cluster.bootstrap, timeout_s=3.0), "forwarder_metrics_port": 0}
    topics.make(Settings(data=directory, log=log))
    body = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}]}
    rows = []
    with ExitStack() as stack:
        url = stack.enter_context(upstream_on(directory))
        gateway = stack.enter_context(gateway_on(directory / "outage", "g1", url, log))
        outbox = Outbox(gateway.settings.path(gateway.settings.log.outbox), gateway.settings.log.outbox_max_bytes)
        gateway.until_ready(60)
        put = 0
        for size in (0, *sizes):
            if size and not put:
                cluster.brokers[0].signal(signal.SIGKILL)
            while put < size:
                count = min(1000, size - put)
                outbox.append(RESPONSES, [message_of(response(put + i, 100, 32)) for i in range(count)])
                put += count
            latencies = []
            for _ in range(500):
                began = time.perf_counter()
                assert gateway.post("/v1/chat/completions", body)[0] == 200
                latencies.append((time.perf_counter() - began) * 1000)
            forwarder = forwarder_of(gateway)
            p50, p99 = sorted(latencies)[250], sorted(latencies)[495]
            row = {"waiting": outbox.waiting(RESPONSES)[0], "chat_p50_ms": round(p50, 2), "chat_p99_ms": round(p99, 2)}
            row |= {"gateway_mb": rss_mb(gateway.process.pid), "forwarder_mb": rss_mb(forwarder) if forwarder else 0.0}
            rows.append(row)
            print(f"cluster {'gone ' if size else 'there'}  {row}", flush=True)
        outbox.close()
    cluster.brokers[0].start()
    cluster.until_ready()
    return rows


def join(directory: Path, sizes: Sequence[int], votes: int = 5000) -> list[dict[str, float]]:
    """Votes a second that the learner's buffer joins with this many responses behind it, and the memory it takes."""
    buffer = Buffer(directory / "buffer.sqlite", 100_000, lambda prompt: False, "bench")
    chance = random.Random(0)
    offset = itertools.count()
    rows = []

    def consume(topic: str, events: Sequence[ResponseGenerated | FeedbackSubmitted]) -> None:
        records = [Record(topic, 0, next(offset), message_of(event)) for event in events]
        buffer.consume([buffer.entry(record) for record in records], records[-1])

    there = 0
    for size in sizes:
        began, before = time.perf_counter(), there
        while there < size:
            consume(RESPONSES, [response(there + i, 24, 24) for i in range(500)])
            there += 500
        filled = (there - before) / (time.perf_counter() - began)
        cast = [
            FeedbackSubmitted(
                source="gateway/bench",
                response_id=f"chatcmpl-{chance.randrange(there):032x}",
                rating="up",
                api_key="bench",
                user=f"u{size}-{n}",
            )
            for n in range(votes)
        ]
        began = time.perf_counter()
        for start in range(0, votes, 500):
            consume(FEEDBACK, cast[start : start + 500])
        rate = votes / (time.perf_counter() - began)
        row = {"responses": size, "join_per_s": round(rate), "taken_in_per_s": round(filled)}
        rows.append({**row, "rss_mb": rss_mb(os.getpid())})
        print(f"join    {rows[-1]}", flush=True)
    buffer.close()
    return rows


def measure(count: int, waiting: Sequence[int], behind: Sequence[int]) -> dict[str, Any]:
    """Everything; prints as it goes and returns what the last line says."""
    with tempfile.TemporaryDirectory(prefix="thumbwheel-bench-") as scratch, ExitStack() as stack:
        directory = Path(scratch)
        # In a process of its own each, so that none starts with the memory of another.
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(1, maxtasksperchild=1) as pool:
            joined = pool.apply(join, (directory, behind))
        cluster = stack.enter_context(Cluster(directory / "kafka"))
        memory = outage(directory, cluster, waiting)
        events = [response(n, 100, 32) for n in range(count)]
        messages = [message_of(event) for event in events]
        print(f"{count} events of {len(messages[0].value)} bytes")
        alone = max(sqlite_alone(directory / f"a{n}", messages) for n in range(2) if _made(directory / f"a{n}"))
        locally = max(local(directory / f"l{n}", events) for n in range(2) if _made(directory / f"l{n}"))
        print(f"sqlite alone {alone:8.0f} events/s   local log {locally:8.0f} events/s", flush=True)
        log = {**kafka(cluster.bootstrap), "forwarder_metrics_port": 0}
        settings = Settings(data=directory / "through", log=log)
        topics.make(settings)
        tuned = {"linger_ms": 2, "batch_size": 256 * 1024}
        rates: dict[str, list[float]] = {"bare": [], "tuned": [], "drained": [], "through": []}
        for _ in range(3):  # in turn, so that a busy moment of the machine meets all of them
            rates["bare"].append(bare(settings, messages))
            rates["tuned"].append(bare(settings, messages, **tuned))
            rates["drained"].append(through(settings, _anew(events), waits=True))
            rates["through"].append(through(settings, _anew(events), waits=False))
            print("   ".join(f"{name} {values[-1]:6.0f} events/s" for name, values in rates.items()), flush=True)
        middle = {name: sorted(values)[1] for name, values in rates.items()}
    return {
        "kafka_ratio": round(middle["through"] / middle["bare"], 2),
        "kafka_ratio_same_batching": round(middle["through"] / middle["tuned"], 2),
        "drain_ratio": round(middle["drained"] / middle["bare"], 2),
        "sqlite_ratio": round(locally / alone, 2),
        "events_per_s": {name: round(rate) for name, rate in middle.items()} | {"local": round(locally)},
        "outage_rss_mb": memory[-1]["gateway_mb"],
        "outage": memory,
        "join_per_s": joined[-1]["join_per_s"],
        "join": joined,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _made(directory: Path) -> bool:
    directory.mkdir()
    return True


def _anew(events: Sequence[ResponseGenerated]) -> list[ResponseGenerated]:
    """The same events under ids that the outbox has not seen."""
    stamp = time.time_ns()
    return [event.model_copy(update={"id": f"{stamp}-{n}"}) for n, event in enumerate(events)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--waiting", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--behind", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    given = parser.parse_args()
    print(json.dumps(measure(given.events, given.waiting, given.behind)))
