"""kill -9 of a real learner, wherever it is: no vote is learned twice, no version is half, no offset is off."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.admission import one_tenth
from learner.buffer import Buffer
from learner.checkpoint import Checkpoints
from tests import kafka
from tests.learner.conftest import VOCABULARY, tiny_dir
from tests.learner.conftest import settings as plain_settings
from tests.learner.test_loop import decide
from tests.learner.traffic import fill
from tests.learner.worker import POINTS, started
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT, CandidateSubmitted, decode
from thumbwheel.log import Log, open_log
from thumbwheel.log.port import read_all
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.slow

__all__ = ["plain_settings", "tiny_dir"]

VOTES = 240


@pytest.fixture
def settings(request: pytest.FixtureRequest, plain_settings: Settings) -> Settings:
    """On the log that a test asks for, SQLite else."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return plain_settings
    known = kafka.on(request.getfixturevalue("kafka_address"), plain_settings.data)
    return plain_settings.model_copy(update={"log": known.log})


@pytest.fixture
def log(settings: Settings) -> Iterator[Log]:
    log = open_log(settings)
    yield log
    log.close()


def submitted(log: Log) -> list[CandidateSubmitted]:
    """Each once: Kafka has two copies where a kill came between an append and its note."""
    events = {event.id: event for event in (decode(record.message.value) for record in read_all(log, ROLLOUT))}
    return [event for event in events.values() if isinstance(event, CandidateSubmitted)]


def wait_for(log: Log, count: int, patience: float = 120) -> None:
    end = time.monotonic() + patience
    while len(submitted(log)) < count:
        assert time.monotonic() < end, f"{len(submitted(log))} of {count} candidates came"
        time.sleep(0.05)


def check(log: Log, settings: Settings, scratch: Path) -> list[str]:
    """What must hold after any kills; returns the votes that were learned."""
    store = AdapterStore(settings.path(settings.store.path))
    events = submitted(log)
    manifests = [store.verify(event.version, event.digest).manifest for event in events]
    assert [event.version for event in events] == store.versions(), "each version was submitted once"
    learned = [id for manifest in manifests for id in manifest.learned_from.feedback_ids]
    assert len(learned) == len(set(learned)), "a vote was learned twice"
    place = settings.data / "learner"
    checkpoint = Checkpoints(place / "checkpoints").load()
    working = checkpoint.cursor.feedback_ids if checkpoint else ()
    if manifests and set(working) == set(manifests[-1].learned_from.feedback_ids):
        working = ()  # killed between submitting and clearing: one of the points, which the next start mends
    assert not set(working) & set(learned)
    buffer = Buffer(place / "buffer.sqlite", VOCABULARY, one_tenth, log.identity)
    replay = Buffer(scratch / "replay.sqlite", VOCABULARY, one_tenth, log.identity)
    for topic in (FEEDBACK, RESPONSES):
        for partition in range(log.partitions(topic)):
            records = list(read_all(log, topic, partition=partition))
            assert records[-1].offset + 1 == log.ends(topic, partition)[1]
            replay.consume([replay.entry(record) for record in records], records[-1])
    assert buffer.offsets() == replay.offsets()
    replay.learned([*learned, *working], "somewhere")
    assert buffer.counts() == replay.counts()
    buffer.close()
    replay.close()
    return learned


def test_killed_at_one_point_after_the_other_it_makes_one_whole_candidate(
    settings: Settings, log: Log, tmp_path: Path
) -> None:
    fill(log, VOTES)
    store = AdapterStore(settings.path(settings.store.path))
    versions = {}
    for point in POINTS:
        with started(settings, point) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "hangs\n", point
        versions[point] = store.versions()
    assert versions["measured, not written"] == []
    assert versions["written, not submitted"] == versions["submitted, not cleared"] == ["v1"]
    with started(settings):
        wait_for(log, 1)
        decide(log, store, "v1", promote=True)
        wait_for(log, 2)
    assert len(check(log, settings, tmp_path)) == 16


@pytest.mark.parametrize("settings", ["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
def test_killed_again_and_again_at_random_it_learns_nothing_twice(settings: Settings, log: Log, tmp_path: Path) -> None:
    chance = random.Random(3)
    store = AdapterStore(settings.path(settings.store.path))
    place = settings.data / "learner"
    for turn in range(6):
        fill(log, VOTES // 4, start=turn * VOTES // 4)
        with started(settings):
            ready = time.monotonic() + 60
            while not (place / "lock").exists() and time.monotonic() < ready:
                time.sleep(0.05)
            time.sleep(chance.uniform(2, 7))
        for event in submitted(log)[-1:]:
            decide(log, store, event.version, promote=turn % 2 == 0)
    count = len(submitted(log))
    with started(settings):
        wait_for(log, count + 1 if count < 6 else count)
    assert len(check(log, settings, tmp_path)) >= 8
