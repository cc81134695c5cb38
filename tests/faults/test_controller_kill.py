"""`kill -9` of the controller at whatever it is doing."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests import kafka
from tests.deploy.lives import replica, reported, submitted
from thumbwheel.events import ROLLOUT, AnyEvent
from thumbwheel.log import message_of, open_log
from thumbwheel.reader import RolloutFollower
from thumbwheel.settings import load

pytestmark = pytest.mark.slow

CONTROL = "from deploy.controller import run; from thumbwheel.settings import load; run(load())"
VERSIONS = 24


@pytest.mark.parametrize("backend", ["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_killed_controllers_decide_everything_and_nothing_twice(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    config = tmp_path / "thumbwheel.toml"
    text = (
        f'data = "{tmp_path}"\n[deploy]\n'
        'approval = "auto"\nmetrics_port = 0\npoll_s = 0.001\nreplica_silence_s = 1e12\n'
    )
    if backend == "kafka":
        known = kafka.on(request.getfixturevalue("kafka_address"), tmp_path).log.kafka
        text += f'[log]\nbackend = "kafka"\n[log.kafka]\nbootstrap = "{known.bootstrap}"\nprefix = "{known.prefix}"\n'
    config.write_text(text)
    log = open_log(load(config))
    versions = [f"v{number}" for number in range(1, VERSIONS + 1)]
    chance = random.Random(7)
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = [sys.executable, "-c", CONTROL]
        process = subprocess.Popen(command, env={"THUMBWHEEL_CONFIG": str(config)}, stderr=subprocess.PIPE)
        running.append(process)
        assert process.stderr is not None
        process.stderr.readline()  # its first words: it is about to follow the log

    def append(*events: AnyEvent) -> None:
        log.append(ROLLOUT, [message_of(event) for event in events])

    kills = 0
    try:
        start()
        start()  # two at once: the second is there by mistake, and must do no harm
        append(replica("r1", *versions))
        for version in versions:
            append(submitted(version), reported(version, kl="pass" if chance.random() < 0.7 else "fail"))
            time.sleep(chance.uniform(0, 0.03))
            victim = chance.choice(running)
            if chance.random() < 0.3:
                victim.send_signal(signal.SIGKILL)
                victim.communicate()
                running.remove(victim)
                kills += 1
                start()
        follower = RolloutFollower(log)
        deadline = time.monotonic() + 30
        while follower.poll() or follower.state.open():
            assert time.monotonic() < deadline, [candidate.version for candidate in follower.state.open()]
            time.sleep(0.05)
        for process in running:
            process.terminate()
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0, said.decode()
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()

    state = follower.state
    assert kills > 3
    assert state.ignored == ()
    for candidate in state.candidates.values():
        kinds = Counter(type(event).__name__ for event in candidate.history)
        assert max(kinds.values()) == 1, kinds
        assert candidate.status in ("promoted", "rejected")
    assert state.champion == max(
        (candidate.version for candidate in state.candidates.values() if candidate.status == "promoted"),
        key=lambda version: int(version[1:]),
    )
    log.close()
