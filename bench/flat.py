"""Whether an update costs more when more lies on the log behind it: its time, and the learner's memory.

    python -m bench.flat [--sizes 1000 10000 100000 1000000]

A real `Learner` on a model of 3,000 parameters, so that what it does around the model is what is seen. The log is
SQLite, its events are made up, every other answer has a thumb. Before each measurement the learner has read all of it.
Time is the median of seven rounds of poll, join and update; memory is what the process holds then. The last line is
JSON; the ratios compare the largest log with the smallest.
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from learner.loop import Learner
from learner.policy import Policy
from tests.learner.conftest import respond, tiny, vote
from thumbwheel.events import Choice, Event
from thumbwheel.log import SqliteLog, message_of
from thumbwheel.settings import EngineSettings, LearnerSettings, Settings

AT_ONCE = 5000
ROUNDS = 7


def traffic(begin: int, end: int) -> Iterator[list[Event]]:
    """Responses `begin` to `end`, and thumbs on every other one, in portions; three thumbs in ten are up."""
    chance = random.Random(begin)
    for start in range(begin, end, AT_ONCE):
        events: list[Event] = []
        for i in range(start, min(start + AT_ONCE, end)):
            prompt = [chance.randrange(2, 32) for _ in range(6)]
            answer = [*(chance.randrange(2, 32) for _ in range(8)), 1]
            choice = Choice(index=0, finish_reason="stop", token_ids=answer, logprobs=[-2.0] * len(answer))
            events.append(respond(f"r{i}", prompt, choices=[choice]))
            if i % 2 == 0:
                events.append(vote(f"f{i}", f"r{i}", "up" if chance.random() < 0.3 else "down", user=f"u{i % 997}"))
        yield events


def resident_mb() -> float:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure(sizes: Sequence[int], algorithm: str) -> list[dict[str, Any]]:
    """A row for each size of the log."""
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="thumbwheel-bench-") as scratch:
        place = Path(scratch)
        tiny().save_pretrained(place / "model")
        settings = Settings(
            data=place,
            engine=EngineSettings(model=place / "model"),
            learner=LearnerSettings(
                metrics_port=0,
                algorithm=algorithm,
                batch=16,
                updates_per_candidate=1_000_000,
                target_modules=["o_proj", "down_proj"],
                settle_s=0.0,
            ),
        )
        log = SqliteLog(settings.path(settings.log.path))
        learner = Learner(settings, log, Policy.load(settings), threading.Event())
        there = 0
        for size in sizes:
            began = time.perf_counter()
            for events in traffic(there, size):
                for topic in dict.fromkeys(event.topic for event in events):
                    log.append(topic, [message_of(event) for event in events if event.topic == topic])
                while learner.poll():
                    pass
            there, filled = size, time.perf_counter() - began
            taken = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                learner.poll()
                examples = learner.join()
                if not examples:
                    raise SystemExit(f"the learner has nothing to learn from: {learner._waits_for}")
                learner.update(examples)
                taken.append(time.perf_counter() - began)
            row = {
                "responses": size,
                "update_ms": round(1e3 * statistics.median(taken), 1),
                "resident_mb": round(resident_mb(), 1),
                "fill_s": round(filled, 1),
            }
            rows.append(row)
            print("   ".join(f"{name} {value:>9}" for name, value in row.items()), flush=True)
        learner.close()
        log.close()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--algorithm", default="kto")
    given = parser.parse_args()
    found = measure(given.sizes, given.algorithm)
    first, last = found[0], found[-1]
    ratios = {
        "update_ratio": round(last["update_ms"] / first["update_ms"], 2),
        "memory_ratio": round(last["resident_mb"] / first["resident_mb"], 2),
    }
    print(json.dumps({**ratios, "algorithm": given.algorithm, "rows": found}))
