"""`kill -9` of the gateway and of the engine under load: no acknowledged vote is lost or doubled, and the champion is
proved again before the gateway says that it is ready.
"""

import os
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import append, decided, make_adapter, submitted
from tests.launch import GatewayProcess, unload, wait_for
from thumbwheel.events import FEEDBACK, FeedbackSubmitted, decode
from thumbwheel.log.port import read_all
from thumbwheel.store import Adapter

pytestmark = pytest.mark.engine

USERS = 4


@dataclass
class Crowd:
    """Users who ask, get an answer and vote on it, each vote again and again under one key until it is acknowledged."""

    gateway: GatewayProcess
    over: threading.Event = field(default_factory=threading.Event)
    versions: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    unready: list[dict[str, Any]] = field(default_factory=list)

    def live(self) -> None:
        """One user's life."""
        while not self.over.is_set():
            body = {"model": self.gateway.settings.gateway.model_name, "prompt": "Once upon a time", "max_tokens": 6}
            status, answer, headers = self._insist("/v1/completions", body)
            if status != 200:
                continue
            self.versions.append(headers["x-thumbwheel-version"])
            vote = {"response_id": answer["id"], "rating": "up"}
            if self._insist("/v1/feedback", vote, **{"Idempotency-Key": str(uuid.uuid4())})[0] == 202:
                self.acknowledged.append(answer["id"])

    def _insist(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        while True:
            try:
                status, answer, received = self.gateway.post(path, body, **headers)
            except OSError:  # the gateway is gone; it may have taken the vote and not have said so
                status, answer, received = 0, {}, {}
            if status >= 500:
                self.unready.append(answer)
            if 0 < status < 500 or self.over.is_set():
                return status, answer, received
            self.over.wait(0.1)


@contextmanager
def crowd(gateway: GatewayProcess) -> Iterator[Crowd]:
    people = Crowd(gateway)
    threads = [threading.Thread(target=people.live) for _ in range(USERS)]
    for thread in threads:
        thread.start()
    try:
        yield people
    finally:
        people.over.set()
        for thread in threads:
            thread.join()


def promote_one(gateway: GatewayProcess, model: Path) -> Adapter:
    adapter = make_adapter(gateway.store, model, "v1", seed=1)
    append(gateway.log, submitted(adapter), *decided(adapter))
    return adapter


def check_votes(gateway: GatewayProcess, people: Crowd) -> None:
    """Every acknowledged vote is on the log once, and no vote is there twice."""
    events = [decode(record.message.value) for record in read_all(gateway.log, FEEDBACK)]
    votes = Counter((event.response_id, event.user) for event in events if isinstance(event, FeedbackSubmitted))
    assert set(people.acknowledged) <= {response for response, _ in votes}
    assert set(votes.values()) == {1}


def more_votes(people: Crowd, timeout: float = 120) -> None:
    """Wait until every user, on average, has had another vote acknowledged."""
    count = len(people.acknowledged)
    wait_for(lambda: len(people.acknowledged) >= count + USERS, timeout, "votes go on")


def proofs(gateway: GatewayProcess) -> int:
    """How often this process of the gateway has proved a version."""
    _, page = gateway.get("/metrics")
    (line,) = [line for line in page.splitlines() if line.startswith('thumbwheel_adapter_loads_total{result="proved"}')]
    return int(float(line.split()[-1]))


def test_a_killed_gateway_loses_no_acknowledged_vote_and_comes_back_with_its_champion(
    tmp_path: Path, engine_url: str, model_dir: Path
) -> None:
    name = f"kill{os.getpid()}"
    engine = {"url": engine_url, "model": str(model_dir.absolute())}
    gateway = GatewayProcess(tmp_path, gateway={"model_name": name}, engine=engine)
    promote_one(gateway, model_dir)
    with gateway:
        gateway.until_ready(120)
        with crowd(gateway) as people:
            for _ in range(2):
                more_votes(people)
                gateway.kill()
                gateway.start()
                gateway.until_ready(60)
                assert proofs(gateway) == 1, "it was ready before it had proved its champion"
            more_votes(people)
        check_votes(gateway, people)
        assert set(people.versions) == {"v1"}
    unload(engine_url, f"{name}@v1")


def test_a_killed_engine_is_started_again_and_its_champion_proved_while_votes_go_on(
    tmp_path: Path, model_dir: Path
) -> None:
    engine = {
        "model": str(model_dir.absolute()),
        "max_model_len": 512,
        "arguments": ["--enforce-eager"],
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    gateway = GatewayProcess(tmp_path, engine=engine)
    promote_one(gateway, model_dir)
    with gateway:
        gateway.until_ready(600)
        with crowd(gateway) as people:
            more_votes(people)
            leader = int((tmp_path / "engine-r1.pid").read_text().split()[0])
            os.kill(leader, signal.SIGKILL)
            wait_for(lambda: gateway.get("/readyz")[0] == 503, 10, "not ready")
            wait_for(lambda: bool(people.unready), 10, "requests hear of it")
            vote = {"response_id": people.acknowledged[0], "rating": "up", "user": "somebody else"}
            assert gateway.post("/v1/feedback", vote)[0] == 202
            gateway.until_ready(600)
            assert proofs(gateway) == 2, "it was ready again before it had proved its champion again"
            more_votes(people)
        check_votes(gateway, people)
        assert all(set(answer["error"]) >= {"message", "type", "code"} for answer in people.unready if answer)
        assert set(people.versions) == {"v1"}
        leader = int((tmp_path / "engine-r1.pid").read_text().split()[0])
        gateway.kill()
        wait_for(lambda: not group_lives(leader), 10, "the engine went with its gateway")


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
