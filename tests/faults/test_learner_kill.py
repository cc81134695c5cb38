"""kill -9 of a real learner, wherever it is: no vote is learned twice, no version is half, no offset is off."""

import random
import time
from pathlib import Path

from learner.admission import one_tenth
from learner.buffer import Buffer
from learner.checkpoint import Checkpoints
from tests.learner.conftest import VOCABULARY, settings, tiny_dir
from tests.learner.test_loop import decide
from tests.learner.traffic import fill
from tests.learner.worker import POINTS, started
from thumbwheel.events import FEEDBACK, RESPONSES, ROLLOUT, CandidateSubmitted, decode
from thumbwheel.log import SqliteLog
from thumbwheel.reader import read_all
from thumbwheel.settings import Settings
from thumbwheel.store import AdapterStore

__all__ = ["settings", "tiny_dir"]

VOTES = 240


def submitted(log: SqliteLog) -> list[CandidateSubmitted]:
    events = [decode(record.message.value) for record in read_all(log, ROLLOUT)]
    return [event for event in events if isinstance(event, CandidateSubmitted)]


def wait_for(log: SqliteLog, count: int, patience: float = 120) -> None:
    end = time.monotonic() + patience
    while len(submitted(log)) < count:
        assert time.monotonic() < end, f"{len(submitted(log))} of {count} candidates came"
        time.sleep(0.05)


def check(log: SqliteLog, settings: Settings, scratch: Path) -> list[str]:
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
    assert not set(working) & set(learned)
    buffer = Buffer(place / "buffer.sqlite", VOCABULARY, one_tenth)
    replay = Buffer(scratch / "replay.sqlite", VOCABULARY, one_tenth)
    for topic in (RESPONSES, FEEDBACK):
        replay.consume(list(read_all(log, topic)))
        assert buffer.offset(topic) == replay.offset(topic) == log.ends(topic)[1]
    replay.learned([*learned, *working], "somewhere")
    assert buffer.counts() == replay.counts()
    buffer.close()
    replay.close()
    return learned


def test_killed_at_one_point_after_the_other_it_makes_one_whole_candidate(settings: Settings, tmp_path: Path) -> None:
    log = SqliteLog(settings.path(settings.log.path))
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
    log.close()


def test_killed_again_and_again_at_random_it_learns_nothing_twice(settings: Settings, tmp_path: Path) -> None:
    chance = random.Random(3)
    log = SqliteLog(settings.path(settings.log.path))
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
    log.close()
