"""What a start would need: each thing looked at, with words on how to mend it."""

import importlib.util
import os
from dataclasses import dataclass

from thumbwheel.errors import ThumbwheelError
from thumbwheel.events import TOPICS
from thumbwheel.log.sqlite import SqliteLog
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore, fingerprint


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    words: str


def examine(settings: Settings) -> list[Finding]:
    """Look at everything that the settings name. Changes nothing but that an absent log is made."""
    log = [*_kafka(settings), _outbox(settings)] if settings.log.backend == "kafka" else [_log(settings)]
    return [_data(settings), *log, *_store(settings), _model(settings), _engine(settings), _keys(settings)]


def _data(settings: Settings) -> Finding:
    data = settings.data.absolute()
    there = next(path for path in (data, *data.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Finding("data", False, f"{data} cannot be written: set `data` to a directory that can")
    return Finding("data", True, str(data))


def _log(settings: Settings) -> Finding:
    try:
        log = SqliteLog(settings.path(settings.log.path))
        log.close()
    except ThumbwheelError as error:
        return Finding("log", False, str(error))
    return Finding("log", True, str(log.path))


def _kafka(settings: Settings) -> list[Finding]:
    """Whether the cluster answers, within a few times `[log.kafka] timeout_s`, and what is wrong with its topics."""
    from thumbwheel.log.kafka.topics import check, wanted

    try:
        problems = check(settings)
    except ThumbwheelError as error:
        return [Finding("kafka", False, str(error))]
    found = [Finding(f"topic {problem.topic}", False, problem.words) for problem in problems]
    if not found:
        found = [Finding("topics", True, f"all {len(wanted(settings))} as they should be")]
    return [Finding("kafka", True, settings.log.kafka.bootstrap), *found]


def _outbox(settings: Settings) -> Finding:
    from thumbwheel.log.outbox import Outbox

    path = settings.path(settings.log.outbox)
    if not path.exists():
        return Finding("outbox", True, f"none yet: a gateway makes {path}")
    try:
        outbox = Outbox(path, settings.log.outbox_max_bytes)
        waiting = sum(outbox.waiting(topic)[0] for topic in TOPICS)
        size = outbox.bytes()
        outbox.close()
    except ThumbwheelError as error:
        return Finding("outbox", False, str(error))
    return Finding("outbox", True, f"{path}: {size} bytes, {waiting} events wait for Kafka")


def _store(settings: Settings) -> list[Finding]:
    store = AdapterStore(settings.path(settings.store.path))
    findings = []
    for version in store.versions():
        try:
            findings.append(Finding(f"adapter {version}", True, store.verify(version).digest))
        except ThumbwheelError as error:
            findings.append(Finding(f"adapter {version}", False, str(error)))
    return findings or [Finding("adapters", True, f"none yet in {store.root}")]


def _model(settings: Settings) -> Finding:
    try:
        return Finding("model", True, fingerprint(settings.path(settings.engine.model)))
    except ThumbwheelError as error:
        return Finding("model", False, str(error))


def _engine(settings: Settings) -> Finding:
    if settings.engine.url:
        return Finding("engine", True, f"given: {settings.engine.url}")
    if importlib.util.find_spec("vllm") is None:
        return Finding("engine", False, "vLLM is not installed: install the extra `engine` (GPU) or `engine-cpu`")
    return Finding("engine", True, "vLLM is installed")


def _keys(settings: Settings) -> Finding:
    keys = settings.path(settings.gateway.keys)
    if not keys.is_file():
        return Finding(
            "keys", False, f"{keys} is missing: make a key with `thumbwheel keys add NAME --scope inference`"
        )
    if keys.stat().st_mode & 0o077:
        return Finding("keys", False, f"{keys} can be read by others: chmod 600 {keys}")
    return Finding("keys", True, str(keys))
