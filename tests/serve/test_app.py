import itertools
from typing import Any

import httpx

from serve.routing import Table
from tests.serve.test_feedback import error
from tests.serve.upstream import Upstream
from tests.serving import Gateway
from tests.shapes import ASK, CHAT, TEXT

ELSEWHERE = """
/ /docs /openapi.json /redoc /v1/models/ /v1/models/policy /v1/embeddings /v1/responses /v1/chat/completions/
/v1/chat/completions/batch //v1/completions /v1/load_lora_adapter /v1/unload_lora_adapter /tokenize /invocations /pause
/version /inference/v1/generate
"""
API = {CHAT: "POST", TEXT: "POST", "/v1/models": "GET", "/v1/feedback": "POST", "/v1/feedback/x": "DELETE"}


def test_what_is_not_on_the_list_is_404_and_never_reaches_the_engine(engine: Upstream, client: httpx.Client) -> None:
    for method, path in itertools.product(("GET", "POST", "DELETE"), ELSEWHERE.split()):
        answer = client.request(method, path)
        assert answer.status_code == 404, (method, path)
        assert error(answer)["type"] == "NotFoundError"
    assert engine.paths == []


def test_a_wrong_method_is_405_and_names_the_right_one(client: httpx.Client) -> None:
    for path, method in API.items():
        answer = client.request("PUT", path)
        assert answer.status_code == 405
        assert method in answer.headers["allow"]
        assert answer.headers["allow"] in error(answer)["message"]


def test_every_api_path_wants_a_key(served: Gateway) -> None:
    for path, method in API.items():
        for headers in ({}, {"Authorization": "Bearer tw-wrong"}):
            answer = httpx.request(method, served.url + path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error(answer)["type"] == "AuthenticationError"


def test_the_list_of_models_names_the_stable_one_alone_in_vllms_shape(client: httpx.Client) -> None:
    body = client.get("/v1/models").json()
    (model,) = body["data"]
    fields = ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"]
    assert list(model) == fields
    assert (model["id"], model["root"], model["max_model_len"]) == ("policy", "policy", 2048)


def test_readiness_follows_the_router_and_liveness_does_not(served: Gateway) -> None:
    assert httpx.get(f"{served.url}/readyz").status_code == 200
    served.router.table = Table(why="the engine is warming up")
    answer = httpx.get(f"{served.url}/readyz")
    assert answer.status_code == 503
    assert "warming up" in error(answer)["message"]
    assert httpx.get(f"{served.url}/healthz").status_code == 200


def test_metrics_count_requests_votes_and_tokens(engine: Upstream, served: Gateway, client: httpx.Client) -> None:
    engine.enqueue_recorded("chat-stream")
    before = samples(served)
    client.post(CHAT, json={"messages": ASK, "stream": True}).raise_for_status()
    client.post("/v1/feedback", json={"rating": "up"})
    served.exchange()
    after = samples(served)

    def grown(series: str) -> float:
        return after[series] - before.get(series, 0.0)

    labels = 'endpoint="chat.completions",outcome="completed",version="base"'
    assert grown(f"thumbwheel_gateway_requests_total{{{labels}}}") == 1
    assert grown('thumbwheel_gateway_tokens_total{kind="sampled",version="base"}') == 8
    assert grown('thumbwheel_gateway_time_to_first_token_seconds_count{version="base"}') == 1
    assert grown('thumbwheel_gateway_feedback_total{rating="none",result="rejected"}') == 1
    assert after["thumbwheel_gateway_in_flight_requests"] == 0


def samples(served: Gateway) -> dict[str, float]:
    lines: list[Any] = httpx.get(f"{served.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
