"""A recorded log from which every algorithm can learn, and the settings for it; sampled by the tiny model itself."""

from collections.abc import Iterator
from pathlib import Path

import torch

from learner.algorithm import Algorithm
from learner.compute import Compute
from learner.logprobs import Row
from learner.policy import Policy
from tests.learner.conftest import respond, vote
from tests.learner.traffic import append
from thumbwheel.events import Choice, Event
from thumbwheel.log import Message, SqliteLog
from thumbwheel.settings import LearnerSettings, RewardSettings, Settings

GOOD, BAD = 7, 8
"""The last token of answers that users like, and of those that they do not."""
PROMPTS = 120


def configured(settings: Settings, **changes: object) -> Settings:
    """With batches of four and a reward model that learns within a second; `changes` go to [learner]."""
    fitting = RewardSettings(votes=120, learning_rate=2e-2, epochs=2, batch=8, samples=8)
    learner = settings.learner.model_copy(update={"reward": fitting, "threads": 1, **changes})
    return settings.model_copy(update={"learner": learner})


def record(path: Path, settings: Settings) -> None:
    """Two answers a prompt, an up for the one that ends well and a down for the other; a stop token is the last."""
    policy = Policy.load(settings)
    rows = list(_rows())
    logprobs, _ = Compute(policy, Algorithm(LearnerSettings(), policy.width)).read(rows)
    events: list[Event] = []
    for i, (row, each) in enumerate(zip(rows, logprobs, strict=True)):
        ids = row.completion
        choice = Choice(index=0, finish_reason="stop", token_ids=ids, logprobs=each[: len(ids)].tolist())
        rating = "up" if ids[-1] == GOOD else "down"
        events += [
            respond(f"r{i}", row.prompt, choices=[choice]),
            vote(f"f{i}", f"r{i}", rating, time=float(i), user=f"u{i % 7}"),
        ]
    log = SqliteLog(path)
    append(log, *events)
    log.close()


def _rows() -> Iterator[Row]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(PROMPTS):
        prompt = torch.randint(9, 32, (4,), generator=generator).tolist()
        for last in (GOOD, BAD):
            length = int(torch.randint(2, 7, (1,), generator=generator))
            yield Row(prompt, [*torch.randint(9, 32, (length,), generator=generator).tolist(), last])


def spoil(path: Path) -> None:
    """Put records on the log that cannot be read."""
    log = SqliteLog(path)
    log.append("llm.feedback.submitted.v1", [Message("bad", "r9", 2.5, b"\x1b[2J no event")])
    log.append("llm.response.generated.v1", [Message(f"bad{i}", "r9", 2.5, b'{"type": "unknown"}') for i in range(2)])
    log.close()


def contents(path: Path) -> dict[str, bytes]:
    """Every byte of the log and of whatever lies beside it."""
    return {file.name: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}
