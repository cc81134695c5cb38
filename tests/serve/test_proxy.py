"""Who is let through, to which version, with which body."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.routing import Route, Table
from tests.serve.test_feedback import error
from tests.serve.upstream import Upstream
from tests.serving import DIGEST, Gateway
from tests.shapes import ASK, CHAT, TEXT
from thumbwheel.events import FEEDBACK, RESPONSES

V12 = Route("v12", "sha256:" + "1" * 64, "policy@v12")
BASE = Route("base", DIGEST, "policy@base")


@pytest.fixture
def evaluator(served: Gateway) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {served.evaluator_key}"}
    with httpx.Client(base_url=served.url, headers=headers) as http:
        yield http


@pytest.mark.parametrize("body", [{"model": "policy"}, {"model": ""}, {"model": None}, {}])
def test_the_stable_name_and_no_name_go_to_the_champion(
    engine: Upstream, served: Gateway, client: httpx.Client, body: dict[str, Any]
) -> None:
    served.router.table = Table(champion=V12, proved={"v12": V12, "base": BASE})
    engine.enqueue_recorded("chat")
    answer = client.post(CHAT, json={**body, "messages": ASK})
    assert engine.bodies[0]["model"] == "policy@v12"
    assert answer.json()["model"] == "policy"
    assert answer.headers["x-thumbwheel-version"] == "v12"
    assert answer.headers["x-thumbwheel-digest"] == V12.digest
    event = served.exchange()
    assert (event.version, event.digest, event.request) == ("v12", V12.digest, {**body, "messages": ASK})


def test_an_evaluator_pins_a_version_and_the_answer_bears_that_name(
    engine: Upstream, served: Gateway, evaluator: httpx.Client
) -> None:
    served.router.table = Table(champion=V12, proved={"v12": V12, "base": BASE})
    engine.enqueue_recorded("chat-stream")
    answer = evaluator.post(CHAT, json={"model": "policy@base", "messages": ASK, "stream": True})
    assert engine.bodies[0]["model"] == "policy@base"
    assert answer.headers["x-thumbwheel-version"] == "base"
    assert answer.text.count('"model":"policy@base"') == answer.text.count("data: {")


def test_an_application_may_not_pin_nor_find_out_what_there_is(engine: Upstream, client: httpx.Client) -> None:
    for model in ("policy@base", "policy@v99"):
        answer = client.post(CHAT, json={"model": model, "messages": ASK})
        assert answer.status_code == 403
        assert error(answer)["type"] == "PermissionDeniedError"
    assert engine.paths == []


@pytest.mark.parametrize("model", ["policy@v99", "policy@", "gpt-4o", "v12", "policy@v12@v13"])
def test_an_unknown_model_is_404_as_in_vllm(engine: Upstream, evaluator: httpx.Client, model: str) -> None:
    answer = evaluator.post(TEXT, json={"model": model, "prompt": "hi"})
    assert answer.status_code == 404
    assert error(answer) == {
        "message": f"The model `{model}` does not exist. Valid aliases: policy.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    assert engine.paths == []


def test_not_ready_is_503_with_the_reason(engine: Upstream, served: Gateway, client: httpx.Client) -> None:
    served.router.table = Table(why="v12 is being loaded")
    answer = client.post(CHAT, json={"model": "policy", "messages": ASK})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "v12 is being loaded" in error(answer)["message"]


BROKEN = [b'{"model":', b"", b"[1]", b'"policy"', b"null", b"\xff\xfe", b'{"a":"\\ud800"}']


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/feedback"])
def test_a_body_that_is_no_json_object_is_400(
    engine: Upstream, served: Gateway, client: httpx.Client, path: str
) -> None:
    for content in BROKEN:
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, content
        assert error(answer)["type"] == "BadRequestError"
    assert engine.paths == []
    assert served.log.ends(RESPONSES) == served.log.ends(FEEDBACK) == (0, 0)


def test_another_content_type_is_400_as_in_vllm(client: httpx.Client) -> None:
    answer = client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in error(answer)["message"]


def test_a_model_that_is_no_string_is_400(client: httpx.Client) -> None:
    answer = client.post(CHAT, json={"model": 7, "messages": ASK})
    assert (answer.status_code, error(answer)["param"]) == (400, "model")


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/feedback"])
def test_two_megabytes_are_413_declared_or_not(
    engine: Upstream, client: httpx.Client, path: str, declared: bool
) -> None:
    body = json.dumps({"model": "policy", "prompt": "x" * 2_000_000}).encode()
    content: Any = body if declared else iter([body[i : i + 50_000] for i in range(0, len(body), 50_000)])
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "200000 bytes" in error(answer)["message"]
    assert engine.paths == []
    engine.enqueue_recorded("chat")  # and the connection is good for the next request
    assert client.post(CHAT, json={"messages": ASK}).status_code == 200


def test_scoring_fields_reach_the_engine(engine: Upstream, served: Gateway, evaluator: httpx.Client) -> None:
    engine.enqueue_recorded("text-score")
    request = {"model": "policy@base", "prompt": [1, 2, 3], "max_tokens": 1, "prompt_logprobs": 0}
    answer = evaluator.post(TEXT, json=request)
    assert answer.json()["choices"][0]["prompt_logprobs"]
    assert request.items() <= engine.bodies[0].items()
