import time
from typing import Any

import httpx
import pytest

from serve.auth import create, user_hash
from serve.feedback import parse
from tests.serving import Gateway
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, new_id


def response_id(prefix: str = "chatcmpl-") -> str:
    return prefix + new_id().replace("-", "")


def error(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["code"] == answer.status_code
    found: dict[str, Any] = body["error"]
    return found


@pytest.mark.parametrize("prefix", ["chatcmpl-", "cmpl-"])
def test_202_means_that_the_vote_is_on_the_log(served: Gateway, client: httpx.Client, prefix: str) -> None:
    vote = {
        "response_id": response_id(prefix),
        "rating": "down",
        "choice_index": 1,
        "reasons": ["wrong"],
        "comment": "No.",
        "correction": "Yes.",
        "preferred_over": response_id(),
        "metadata": {"page": 3},
        "user": "ada",
    }
    answer = client.post("/v1/feedback", json=vote)
    (event,) = served.votes()  # read at once: 202 is said when it is durable
    assert answer.status_code == 202
    assert answer.json() == {
        "id": event.id,
        "object": "feedback",
        "response_id": vote["response_id"],
        "status": "accepted",
    }
    assert event.model_dump(include=set(vote)) == {**vote, "user": user_hash("ada")}
    assert (event.api_key, event.source) == ("app", "gateway/r1")


def test_without_a_user_the_key_votes(served: Gateway, client: httpx.Client) -> None:
    client.post("/v1/feedback", json={"response_id": response_id(), "rating": "up"}).raise_for_status()
    assert served.votes()[0].user == user_hash("key:app")


def test_the_same_idempotency_key_is_one_vote(served: Gateway, client: httpx.Client) -> None:
    vote = {"response_id": response_id(), "rating": "up"}
    answers = [client.post("/v1/feedback", json=vote, headers={"Idempotency-Key": "k1"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(served.votes()) == 1


def test_an_idempotency_key_with_another_vote_is_409_and_the_first_stands(
    served: Gateway, client: httpx.Client
) -> None:
    vote = {"response_id": response_id(), "rating": "up"}
    headers = {"Idempotency-Key": "k1"}
    client.post("/v1/feedback", json=vote, headers=headers).raise_for_status()
    answer = client.post("/v1/feedback", json={**vote, "rating": "down"}, headers=headers)
    assert answer.status_code == 409
    assert "Idempotency-Key" in error(answer)["message"]
    assert [event.rating for event in served.votes()] == ["up"]


def test_idempotency_keys_of_two_api_keys_do_not_meet(served: Gateway, client: httpx.Client) -> None:
    other = create(served.settings.path(served.settings.gateway.keys), "other", ["feedback"])
    headers = {"Idempotency-Key": "k1"}
    client.post("/v1/feedback", json={"response_id": response_id(), "rating": "up"}, headers=headers).raise_for_status()
    headers["Authorization"] = f"Bearer {other}"
    answer = client.post("/v1/feedback", json={"response_id": response_id(), "rating": "down"}, headers=headers)
    assert answer.status_code == 202
    assert len(served.votes()) == 2


@pytest.mark.parametrize(
    ("vote", "status", "param", "word"),
    [
        ({"rating": "up"}, 400, "response_id", "missing"),
        ({"response_id": "", "rating": "up"}, 400, "response_id", "missing"),
        ({"response_id": 7, "rating": "up"}, 400, "response_id", "string"),
        ({"response_id": "chatcmpl-1", "rating": "up"}, 404, "response_id", "chatcmpl-1"),
        ({"response_id": "chatcmpl-" + "f" * 32, "rating": "up"}, 404, "response_id", "no response"),
        (
            {"response_id": "chatcmpl-" + "f" * 12 + "7abc8" + "0" * 15, "rating": "up"},
            404,
            "response_id",
            "no response",
        ),
        ({"rating": "maybe"}, 400, "rating", "'up' or 'down'"),
        ({}, 400, "rating", "'up' or 'down'"),
        ({"rating": None}, 400, "rating", "'up' or 'down'"),
        ({"rating": "up", "stars": 5}, 400, "stars", "unknown field 'stars'"),
        ({"rating": "up", "choice_index": -1}, 400, "choice_index", "greater"),
        ({"rating": "up", "choice_index": "1"}, 400, "choice_index", "integer"),
        ({"rating": "up", "reasons": ["x"] * 17}, 400, "reasons", "16"),
        ({"rating": "up", "reasons": ["x" * 65]}, 400, "reasons.0", "64"),
        ({"rating": "up", "comment": "ä" * 16_385}, 400, "comment", "32768 bytes"),
        ({"rating": "up", "correction": "x" * 32_769}, 400, "correction", "32768 bytes"),
        ({"rating": "up", "metadata": {"a": "x" * 4096}}, 400, "metadata", "4096 bytes"),
        ({"rating": "up", "preferred_over": "x"}, 404, "preferred_over", "no response"),
        ({"rating": "up", "user": ""}, 400, "user", "1 character"),
    ],
)
def test_a_vote_that_makes_no_sense_says_why_and_changes_nothing(
    served: Gateway, client: httpx.Client, vote: dict[str, Any], status: int, param: str, word: str
) -> None:
    nothing_given = param == "response_id"
    answer = client.post("/v1/feedback", json=vote if nothing_given else {"response_id": response_id(), **vote})
    assert answer.status_code == status
    assert error(answer)["param"] == param
    assert word in error(answer)["message"]
    assert served.votes() == []


def test_a_response_is_not_preferred_over_itself(client: httpx.Client) -> None:
    same = response_id()
    answer = client.post("/v1/feedback", json={"response_id": same, "rating": "up", "preferred_over": same})
    assert answer.status_code == 400


def test_a_response_that_was_not_stored_takes_no_feedback(client: httpx.Client) -> None:
    answer = client.post("/v1/feedback", json={"response_id": response_id("chatcmpl-ns"), "rating": "up"})
    assert answer.status_code == 400
    assert "store: false" in error(answer)["message"]


def test_what_is_as_large_as_allowed_is_taken() -> None:
    sizes = {"comment": "x" * 32_768, "correction": "ä" * 16_384, "reasons": ["x" * 64] * 16}
    assert parse({"response_id": response_id(), "rating": "up", **sizes}).correction == sizes["correction"]


@pytest.mark.parametrize("how", ["query", "body", "post"])
def test_a_vote_is_taken_back(served: Gateway, client: httpx.Client, how: str) -> None:
    target = response_id()
    about: dict[str, Any] = {"user": "ada", "choice_index": 2}
    if how == "query":
        answer = client.delete(f"/v1/feedback/{target}", params=about)
    elif how == "body":
        answer = client.request("DELETE", f"/v1/feedback/{target}", json=about)
    else:
        answer = client.post("/v1/feedback", json={"response_id": target, "retracted": True, **about})
    assert answer.status_code == 202, answer.text
    (event,) = served.votes()
    assert (event.response_id, event.retracted, event.rating) == (target, True, None)
    assert (event.user, event.choice_index) == (user_hash("ada"), 2)


def test_taking_back_needs_a_choice_that_is_a_number(client: httpx.Client) -> None:
    answer = client.delete(f"/v1/feedback/{response_id()}", params={"choice_index": "two"})
    assert (answer.status_code, error(answer)["param"]) == (400, "choice_index")


def test_a_log_that_fails_is_503_and_never_202(
    served: Gateway, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(items: object) -> None:
        raise LogError("the disk is full")

    monkeypatch.setattr(served.log, "append_all", fail)
    answer = client.post("/v1/feedback", json={"response_id": response_id(), "rating": "up"})
    assert answer.status_code == 503
    assert "disk is full" in error(answer)["message"]


def test_an_evaluator_does_not_vote(served: Gateway, client: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {served.evaluator_key}"}
    answer = client.post("/v1/feedback", json={"response_id": response_id(), "rating": "up"}, headers=headers)
    assert answer.status_code == 403
    assert served.log.ends(FEEDBACK) == (0, 0)


def test_an_id_from_the_future_was_never_issued(client: httpx.Client) -> None:
    later = f"{int((time.time() + 2 * 86_400) * 1000):012x}"
    answer = client.post("/v1/feedback", json={"response_id": f"chatcmpl-{later}7abc8{'0' * 15}", "rating": "up"})
    assert answer.status_code == 404
