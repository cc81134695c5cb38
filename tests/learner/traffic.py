"""A log full of responses and votes, made up: prompts differ, so that a tenth of them is held out."""

from tests.learner.conftest import respond, vote
from thumbwheel.events import Choice, Event
from thumbwheel.log import Log, message_of


def prompt_of(i: int) -> list[int]:
    return [2 + i % 29, 2 + i // 29 % 29, 3]


def append(log: Log, *events: Event) -> None:
    """One append a topic."""
    for topic in dict.fromkeys(event.topic for event in events):
        log.append(topic, [message_of(event) for event in events if event.topic == topic])


def fill(log: Log, count: int, start: int = 0, ups: int = 3) -> None:
    """`count` responses with a vote each; one in `ups` is up."""
    append(log, *(event for i in range(start, start + count) for event in _pair(i, i % ups == 0)))


def _pair(i: int, up: bool) -> list[Event]:
    ids = [4 + i % 7, 5 + i % 11, 1]
    choice = Choice(index=0, finish_reason="stop", token_ids=ids, logprobs=[-1.0, -2.0, -0.5])
    return [
        respond(f"r{i}", prompt_of(i), choices=[choice]),
        vote(f"f{i}", f"r{i}", "up" if up else "down", time=float(i)),
    ]
