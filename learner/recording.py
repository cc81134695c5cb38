"""A recorded log, taken into a buffer of its own that goes when it is closed. The log stays exactly as it is.

Read as a learner would that starts today and has learned nothing yet: all votes that may be learned from are ready.
Nothing is appended, no group's position moves, and what cannot be read is counted where a learner would send it to the
dead letters.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from learner import prompts, reward_model
from learner.algorithm import Needs
from learner.buffer import Buffer, Entry
from learner.examples import Examples, Pair, Thumb
from learner.progress import task
from learner.supply import Supply
from learner.tokens import Tokens
from thumbwheel.errors import SettingsError
from thumbwheel.events import FEEDBACK, RESPONSES
from thumbwheel.log import Log, open_log
from thumbwheel.log.recorded import RecordedLog
from thumbwheel.settings import Settings

THE_LOG = "log"
"""Stands for the log that the settings name, where a path is asked for."""

TOPICS = (RESPONSES, FEEDBACK)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that is no event, where it lies, and why."""

    topic: str
    partition: int
    offset: int
    why: str


class Recording:
    """What was on the log when it was opened. `records` counts them by topic, those that could not be read included."""

    def __init__(
        self,
        settings: Settings,
        buffer: Buffer,
        path: Path,
        held_out: list[list[int]] | None,
        records: Mapping[str, int],
        unreadable: list[Unreadable],
    ) -> None:
        """`path` is the buffer's file; `held_out` are the prompts of `[learner] kl_prompts`, where that is set."""
        self.buffer = buffer
        self.path = path
        self.records = records
        self.unreadable = unreadable
        self.before = time.time() - settings.learner.settle_s
        self._settings = settings.learner
        self._held_out = held_out
        ups, downs = buffer.count_ready(self.before)
        measured_on = buffer.count_held_out() if held_out is None else len(held_out)
        self.supply = Supply(ups, downs, buffer.count_pairs(self.before), measured_on)

    def lacks(self, needs: Needs) -> list[str]:
        """What is missing for one update by an algorithm that needs this, in words."""
        missing = self.supply.lacks(needs, self._settings.batch)
        if needs.fresh:
            try:
                reward_model.enough(*self.votes(), self._settings)
            except reward_model.NoSignal as error:
                missing.append(str(error))
        return missing

    def batch(self, needs: Needs) -> Examples:
        """The first that a learner would take. Nothing may be lacking."""
        return self.supply.batch(self.buffer, needs, self.before, self._settings.batch)

    def votes(self) -> tuple[list[Thumb], list[Pair]]:
        """What a reward model is made from."""
        limit = self._settings.reward.votes
        return self.buffer.newest(self.before, limit), self.buffer.newest_pairs(self.before, limit)

    def held_out(self, limit: int) -> list[list[int]]:
        """At most so many held-out prompts."""
        return self.buffer.held_out_prompts(limit) if self._held_out is None else self._held_out[:limit]


@contextmanager
def open_recording(settings: Settings, where: str) -> Iterator[Recording]:
    """Take in the SQLite log at the path `where`, or at `log` the one that the settings name, SQLite or Kafka.

    Raises LogError where there is no such log, SettingsError where the base model's tokenizer or config cannot be read.
    """
    model = settings.path(settings.engine.model)
    chosen = settings.learner.kl_prompts
    with closing(_open(settings, where)) as log, tempfile.TemporaryDirectory(prefix="thumbwheel-") as place:
        given = None if chosen is None else prompts.read(settings.path(chosen), model)
        path, held_out, tokens = Path(place) / "buffer.sqlite", prompts.held_out(given), Tokens.load(model)
        with closing(Buffer(path, _vocabulary(model), held_out, log.identity, tokens)) as buffer:
            records, unreadable = _take_in(log, buffer)
            yield Recording(settings, buffer, path, given, records, unreadable)


def _open(settings: Settings, where: str) -> Log:
    if where != THE_LOG:
        return RecordedLog(Path(where), "--from")
    if settings.log.backend == "sqlite":
        return RecordedLog(settings.path(settings.log.path), "[log] path")
    return open_log(settings)


def _vocabulary(model: Path) -> int:
    """How many tokens the base model knows, by its config: no weights are read."""
    from transformers import AutoConfig

    if not (model / "config.json").is_file():
        raise SettingsError(f"there is no base model at {model} ([engine] model): it has no config.json")
    try:
        return int(AutoConfig.from_pretrained(model, local_files_only=True).get_text_config().vocab_size)
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read the config of the base model at {model} ([engine] model): {error}") from error


def _take_in(log: Log, buffer: Buffer) -> tuple[Counter[str], list[Unreadable]]:
    ends = {(topic, n): log.ends(topic, n) for topic in TOPICS for n in range(log.partitions(topic))}
    records, unreadable = Counter(dict.fromkeys(TOPICS, 0)), []
    total = sum(end - first for first, end in ends.values())
    with task("reading the log", total, threading.Event()) as progress:
        for (topic, partition), (offset, end) in ends.items():
            while offset < end and (batch := log.read(topic, offset, partition=partition)):
                entries: list[Entry] = []
                for record in batch:
                    try:
                        entries.append(buffer.entry(record))
                    except Exception as error:  # whatever a record provokes, the next one may be sound
                        unreadable.append(Unreadable(topic, partition, record.offset, _why(error)))
                buffer.consume(entries, batch[-1])
                records[topic] += len(batch)
                offset = batch[-1].offset + 1
                progress(len(batch))
    return records, unreadable


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(problem["msg"] for problem in error.errors(include_url=False))
    return f"{type(error).__name__}: {error}"
