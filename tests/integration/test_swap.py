"""A swap under load on the real engine: nobody fails or changes version midway; the next request gets the new one."""

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.adapters import append, decided, make_adapter, submitted
from tests.launch import GatewayProcess, unload, wait_for
from thumbwheel.events import RESPONSES, ROLLOUT, ReplicaReported, ResponseGenerated, decode
from thumbwheel.log.port import read_all

pytestmark = pytest.mark.engine

CLIENTS = 8
PROMPTS = ("Tell me a story.", "What is a river?", "How do plants grow?", "Describe a good day.")


@dataclass(frozen=True)
class Answered:
    """What a client saw: when it asked and had its answer, by its own clock, and the version that the headers name."""

    asked: float
    finished: float
    response_id: str
    version: str
    digest: str
    text: str


@pytest.fixture
def gateway(tmp_path: Path, engine_url: str, model_dir: Path) -> Iterator[GatewayProcess]:
    """In front of the real engine, under a model name of its own: the engine may serve others as well."""
    name = f"swap{os.getpid()}"
    engine = {"url": engine_url, "model": str(model_dir.absolute())}
    with GatewayProcess(tmp_path, gateway={"model_name": name}, engine=engine) as running:
        yield running
    unload(engine_url, f"{name}@v1", f"{name}@v2")


def client_of(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0, timeout=120)


def test_a_swap_under_load_fails_no_request_and_changes_no_version_on_the_way(
    gateway: GatewayProcess, model_dir: Path
) -> None:
    first = make_adapter(gateway.store, model_dir, "v1", seed=1)
    second = make_adapter(gateway.store, model_dir, "v2", seed=2)
    append(gateway.log, submitted(first), *decided(first), submitted(second))
    gateway.until_ready(60)
    wait_for(lambda: proved(gateway) == {"v1", "v2"}, 60, "both versions are proved")

    over, answered = threading.Event(), list[Answered]()
    with ThreadPoolExecutor(CLIENTS) as clients:
        talks = [clients.submit(talk, gateway, number, over, answered) for number in range(CLIENTS)]
        try:
            wait_for(lambda: len(answered) >= CLIENTS, 120, "answers of v1")
            append(gateway.log, *decided(second, previous="v1"))
            promoted = time.monotonic()
            wait_for(lambda: serving(gateway) == "v2", 30, "the flip")
            flipped = time.monotonic()
            wait_for(lambda: sum(one.asked > flipped for one in answered) >= CLIENTS, 120, "answers of v2")
        finally:
            over.set()
        for future in talks:
            future.result()  # any request that failed raises here

    print(f"{len(answered)} answers; {flipped - promoted:.2f} s from the promotion to the reported flip")
    digests = {"v1": first.digest, "v2": second.digest}
    assert all(one.digest == digests[one.version] for one in answered)
    assert all(one.version == "v1" for one in answered if one.finished < promoted)
    assert all(one.version == "v2" for one in answered if one.asked > flipped)
    assert any(one.version == "v1" for one in answered if one.finished > flipped), "nobody was in flight at the flip"

    wait_for(lambda: {one.response_id for one in answered} <= set(exchanges(gateway)), 10, "everything on the log")
    recorded = exchanges(gateway)
    for one in answered:
        exchange = recorded[one.response_id]
        assert exchange.outcome == "completed"
        assert (exchange.version, exchange.digest) == (one.version, one.digest)
        assert exchange.choices[0].text == one.text
    check_rescored(gateway, [recorded[one.response_id] for one in answered])


def talk(gateway: GatewayProcess, number: int, over: threading.Event, answered: list[Answered]) -> None:
    """One client: asks again and again, every second client by streams. It does not try again what fails."""
    chance = random.Random(number)
    with client_of(gateway) as client:
        while not over.is_set():
            asked = time.monotonic()
            messages: Any = [{"role": "user", "content": chance.choice(PROMPTS)}]
            raw = client.chat.completions.with_raw_response.create(
                model=gateway.settings.gateway.model_name,
                messages=messages,
                max_tokens=chance.randint(6, 12),
                seed=chance.randrange(1 << 30),
                stream=number % 2 == 0,
            )
            parsed = raw.parse()
            if isinstance(parsed, openai.Stream):
                chunks = list(parsed)
                response_id = chunks[0].id
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            else:
                response_id, text = parsed.id, parsed.choices[0].message.content or ""
            version, digest = raw.headers["x-thumbwheel-version"], raw.headers["x-thumbwheel-digest"]
            answered.append(Answered(asked, time.monotonic(), response_id, version, digest, text))


def exchanges(gateway: GatewayProcess) -> dict[str, ResponseGenerated]:
    events = [decode(record.message.value) for record in read_all(gateway.log, RESPONSES)]
    return {event.response_id: event for event in events if isinstance(event, ResponseGenerated)}


def reports(gateway: GatewayProcess) -> list[ReplicaReported]:
    events = [decode(record.message.value) for record in read_all(gateway.log, ROLLOUT)]
    return [event for event in events if isinstance(event, ReplicaReported)]


def proved(gateway: GatewayProcess) -> set[str]:
    said = reports(gateway)
    states = {seen.version: seen for seen in said[-1].versions} if said else {}
    assert all(seen.state == "proved" for seen in states.values()), states
    return set(states)


def serving(gateway: GatewayProcess) -> str:
    return reports(gateway)[-1].serving


def check_rescored(gateway: GatewayProcess, recorded: list[ResponseGenerated]) -> None:
    """The recorded log-probs are those of the version that the record names: nearer to it than to the other.

    Both versions score a sample of the answers through the gateway, pinned, by the engine's own prompt scoring.
    """
    name = gateway.settings.gateway.model_name
    nearer = []
    with client_of(gateway) as client:
        for version, other in (("v1", "v2"), ("v2", "v1")):
            sample = [one for one in recorded if one.version == version and len(one.choices[0].token_ids) >= 6][-4:]
            assert sample
            for one in sample:
                behaviour = np.array(one.choices[0].logprobs, float)
                own, others = (score(client, f"{name}@{pinned}", one) for pinned in (version, other))
                nearer.append(np.abs(behaviour - own).mean() < np.abs(behaviour - others).mean())
                assert np.abs(behaviour - own).mean() < 0.15
    assert all(nearer), nearer


def score(client: openai.OpenAI, model: str, exchange: ResponseGenerated) -> np.ndarray:
    prompt, completion = exchange.prompt_token_ids[0], exchange.choices[0].token_ids
    answer = client.completions.create(
        model=model, prompt=[*prompt, *completion], max_tokens=1, extra_body={"prompt_logprobs": 0}
    ).model_dump()
    at = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
    return np.array([entry[str(token)]["logprob"] for entry, token in zip(at, completion, strict=True)])


def test_a_truncated_adapter_is_reported_and_answers_nobody(gateway: GatewayProcess, model_dir: Path) -> None:
    adapter = make_adapter(gateway.store, model_dir, "v1", seed=3)
    weights = adapter.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    append(gateway.log, submitted(adapter))
    gateway.until_ready(60)
    wait_for(lambda: bool(reports(gateway)[-1].versions), 30, "the verdict")
    (seen,) = reports(gateway)[-1].versions
    assert seen.state == "failed"
    assert "is truncated" in seen.why
    status, answer, _ = gateway.post(
        "/v1/completions", {"model": f"{gateway.settings.gateway.model_name}@v1", "prompt": "Hi", "max_tokens": 1}
    )
    assert status == 404, answer
