"""The way to the engine and back: bytes, ids, records, and everything that can go wrong on it."""

import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from serve.auth import user_hash
from tests.serve.test_feedback import error, response_id
from tests.serve.upstream import STREAM, WHOLE, Upstream, recorded
from tests.serving import Gateway, Host, comparable, gateway
from tests.shapes import ASK, CHAT, SHAPES, TEXT
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, RESPONSES
from thumbwheel.log import Message, SqliteLog
from thumbwheel.log.outbox import Outbox


def as_asked(body: bytes) -> bytes:
    return body.replace(b'"model":"policy@base"', b'"model":"policy"')


@pytest.mark.parametrize("shape", SHAPES)
def test_the_client_gets_the_bytes_that_vllm_sends_without_the_gateway(
    engine: Upstream, client: httpx.Client, shape: str
) -> None:
    path, request = SHAPES[shape]
    engine.enqueue_recorded(shape)
    answer = client.post(path, json={**request, "model": "policy"})
    assert comparable(shape, answer.content) == comparable(shape, as_asked(recorded(shape, "plain")))
    whole = "stream" not in shape
    assert answer.headers["content-type"] == ("application/json" if whole else "text/event-stream; charset=utf-8")
    assert engine.paths == [path]


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_events_come_out_whole_however_they_are_cut(engine: Upstream, client: httpx.Client, size: int) -> None:
    body = recorded("chat-n2-stream")
    engine.enqueue(*(body[i : i + size] for i in range(0, len(body), size)), content_type=STREAM)
    answer = client.post(CHAT, json={**SHAPES["chat-n2-stream"][1], "model": "policy"})
    plain = as_asked(recorded("chat-n2-stream", "plain"))
    assert comparable("chat-n2-stream", answer.content) == comparable("chat-n2-stream", plain)


def test_a_comment_that_keeps_the_stream_alive_passes(engine: Upstream, client: httpx.Client) -> None:
    engine.enqueue(b": keep-alive\n\n" + recorded("chat-stream"), content_type=STREAM)
    answer = client.post(CHAT, json={"messages": ASK, "stream": True})
    assert answer.content == b": keep-alive\n\n" + as_asked(recorded("chat-stream", "plain"))


def test_text_beyond_ascii_keeps_its_bytes(engine: Upstream, client: httpx.Client) -> None:
    engine.enqueue(recorded("chat").replace(b"Paris", "Päris 🗼\\u0007\x7f".encode()))
    answer = client.post(CHAT, json={"messages": ASK})
    assert answer.content == as_asked(recorded("chat", "plain")).replace(b"Paris", "Päris 🗼\\u0007\x7f".encode())


@pytest.mark.parametrize(("stream", "small"), [(True, b"-1e-7"), (False, b"-1e-07")])
def test_numbers_are_written_as_vllm_writes_them(
    engine: Upstream, client: httpx.Client, stream: bool, small: bytes
) -> None:
    """Its streams and its whole answers come from two JSON writers."""
    shape = "chat-logprobs-stream" if stream else "chat-logprobs"
    body = re.sub(rb'"logprob":-[0-9.e-]+', b'"logprob":' + small, recorded(shape))
    engine.enqueue(body, content_type=STREAM if stream else WHOLE)
    answer = client.post(CHAT, json=SHAPES[shape][1])
    assert answer.content.count(b'"logprob":' + small + b",") == body.count(b'"logprob":') > 0


@pytest.mark.parametrize(("path", "prefix", "shape"), [(CHAT, "chatcmpl-", "chat"), (TEXT, "cmpl-", "text")])
def test_the_gateway_makes_the_id_and_not_the_client(
    engine: Upstream, served: Gateway, client: httpx.Client, path: str, prefix: str, shape: str
) -> None:
    for _ in range(2):
        engine.enqueue_recorded(shape)
        client.post(path, json={**SHAPES[shape][1], "request_id": "mine"}, headers={"X-Request-Id": "mine"})
    ids = [uuid.UUID(headers["x-request-id"]) for headers in engine.headers]
    assert len(set(ids)) == 2
    assert {made.version for made in ids} == {7}
    assert served.exchange(prefix + ids[1].hex).id == str(ids[1])


def test_the_record_is_the_exchange(engine: Upstream, served: Gateway, client: httpx.Client) -> None:
    request = {"model": "policy", "messages": ASK, "temperature": 0.5, "user": "ada", "stream": True, "made_up": 1}
    engine.enqueue_recorded("chat-stream")
    client.post(CHAT, json=request)
    event = served.exchange()
    assert event.request == request
    assert (event.outcome, event.error, event.untrainable) == ("completed", None, None)
    assert (event.endpoint, event.stream, event.api_key, event.replica) == ("chat.completions", True, "app", "r1")
    assert event.user == user_hash("ada")
    assert event.sampling.temperature == 0.5
    assert event.timings.first_token_s is not None
    assert 0 < event.timings.first_token_s <= event.timings.duration_s < 5
    (choice,) = event.choices
    whole = orjson.loads(recorded("chat"))
    assert choice.text == whole["choices"][0]["message"]["content"]
    assert choice.token_ids == whole["choices"][0]["token_ids"]
    assert event.prompt_token_ids == [whole["prompt_token_ids"]]


def test_the_safety_identifier_is_the_user(engine: Upstream, served: Gateway, client: httpx.Client) -> None:
    engine.enqueue_recorded("chat")
    client.post(CHAT, json={"messages": ASK, "safety_identifier": "s", "user": "u"})
    assert served.exchange().user == user_hash("s")


def test_store_false_keeps_the_exchange_off_the_log_and_marks_the_id(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    engine.enqueue_recorded("chat")
    client.post(CHAT, json={"messages": ASK, "store": False})
    assert engine.headers[0]["x-request-id"].startswith("ns")
    engine.enqueue_recorded("chat")
    client.post(CHAT, json={"messages": ASK, "store": True})
    served.exchange("chatcmpl-" + engine.headers[1]["x-request-id"])
    assert len(served.exchanges()) == 1
    vote = {"response_id": "chatcmpl-" + engine.headers[0]["x-request-id"], "rating": "up"}
    assert client.post("/v1/feedback", json=vote).status_code == 400


def test_an_error_of_the_client_is_passed_on_unchanged_and_not_recorded(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    body = b'{"error":{"message":"max_tokens is -1","type":"BadRequestError","param":"max_tokens","code":400}}'
    engine.enqueue(body, status=400)
    answer = client.post(CHAT, json={"messages": ASK, "max_tokens": -1, "stream": True})
    assert (answer.status_code, answer.content) == (400, body)
    assert served.log.ends(RESPONSES) == (0, 0)


def test_an_error_of_the_engine_is_passed_on_and_recorded(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    body = b'{"error":{"message":"boom","type":"InternalServerError","param":null,"code":500}}'
    engine.enqueue(body, status=500)
    answer = client.post(CHAT, json={"messages": ASK})
    assert (answer.status_code, answer.content) == (500, body)
    event = served.exchange()
    assert (event.outcome, event.choices) == ("engine_error", [])
    assert event.untrainable == "outcome: engine_error"


def test_a_version_that_the_engine_lost_is_503_and_not_the_clients_fault(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    engine.enqueue(b'{"error":{"message":"The model `policy@base` does not exist."}}', status=404)
    answer = client.post(CHAT, json={"messages": ASK})
    assert answer.status_code == 503
    assert "base" in error(answer)["message"]
    assert served.exchange().outcome == "engine_error"


def test_no_engine_is_503(host: Host, tmp_path: Path) -> None:
    with gateway(host, tmp_path, "http://127.0.0.1:9") as served:
        headers = {"Authorization": f"Bearer {served.app_key}"}
        answer = httpx.post(served.url + CHAT, json={"messages": ASK}, headers=headers)
        assert answer.status_code == 503
        assert error(answer)["type"] == "ServiceUnavailableError"
        assert served.exchange().outcome == "engine_error"


@pytest.mark.parametrize("garbage", [b"<html>", b"{}"])
def test_an_answer_that_makes_no_sense_is_an_error_of_the_engine(
    engine: Upstream, served: Gateway, client: httpx.Client, garbage: bytes
) -> None:
    engine.enqueue(garbage)
    answer = client.post(CHAT, json={"messages": ASK})
    assert answer.status_code in (500, 502)
    assert error(answer)
    assert served.exchange().outcome == "engine_error"


def test_an_answer_that_breaks_off_is_502(engine: Upstream, served: Gateway, client: httpx.Client) -> None:
    engine.enqueue(recorded("chat")[:100], breaks_off=True)
    answer = client.post(CHAT, json={"messages": ASK})
    assert answer.status_code == 502
    assert served.exchange().outcome == "engine_error"


@pytest.mark.parametrize("breaks_off", [True, False])
def test_a_stream_that_breaks_off_ends_with_an_error_event_and_keeps_what_there_was(
    engine: Upstream, served: Gateway, client: httpx.Client, breaks_off: bool
) -> None:
    events = recorded("chat-stream").split(b"\n\n")[:4]
    engine.enqueue(b"\n\n".join(events) + b"\n\n", content_type=STREAM, pause_s=0.05, breaks_off=breaks_off)
    answer = client.post(CHAT, json={"messages": ASK, "stream": True})
    *_, last, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(last[6:])["error"]["code"] == 502
    event = served.exchange()
    assert event.outcome == "engine_error"
    assert len(event.choices[0].token_ids) == 3


def test_an_error_event_of_vllm_is_passed_on_and_recorded(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    events = recorded("chat-stream").split(b"\n\n")[:3]
    broken = b'data: {"error":{"message":"engine died","type":"InternalServerError","param":null,"code":500}}'
    engine.enqueue(b"\n\n".join([*events, broken, b"data: [DONE]", b""]), content_type=STREAM)
    answer = client.post(CHAT, json={"messages": ASK, "stream": True})
    assert answer.content.endswith(broken + b"\n\ndata: [DONE]\n\n")
    event = served.exchange()
    assert (event.outcome, event.error) == ("engine_error", "engine died")


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_takes_too_long_is_a_timeout(host: Host, tmp_path: Path, engine: Upstream, stream: bool) -> None:
    with gateway(host, tmp_path, engine.url, engine={"request_timeout_s": 0.5}) as impatient:
        headers = {"Authorization": f"Bearer {impatient.app_key}"}
        engine.enqueue_recorded("chat-stream" if stream else "chat", pause_s=5)
        answer = httpx.post(impatient.url + CHAT, json={"messages": ASK, "stream": stream}, headers=headers, timeout=10)
        if stream:
            assert json.loads(answer.text.split("\n\n")[-3][6:])["error"]["code"] == 504
        else:
            assert (answer.status_code, error(answer)["type"]) == (504, "GatewayTimeoutError")
        engine.wait_for_abort()
        event = impatient.exchange()
    assert (event.outcome, event.untrainable) == ("timeout", "outcome: timeout")


def test_a_client_that_hangs_up_on_done_has_had_all_of_it(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    """The last bytes of the connection come after `[DONE]`, and a client need not wait for them."""
    engine.enqueue(recorded("chat-stream"), content_type=STREAM, pause_s=0.5)
    with client.stream("POST", CHAT, json={"messages": ASK, "stream": True}) as answer:
        lines = answer.iter_lines()
        while next(lines) != "data: [DONE]":
            pass
    event = served.exchange()
    assert (event.outcome, event.untrainable, event.choices[0].finish_reason) == ("completed", None, "stop")


def test_a_client_that_leaves_a_stream_ends_it_at_the_engine_and_what_it_saw_is_recorded(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    events = recorded("chat-stream").split(b"\n\n")
    engine.enqueue(
        *(event + b"\n\n" for event in events[:4]), *([b": wait\n\n"] * 50), content_type=STREAM, pause_s=0.05
    )
    with client.stream("POST", CHAT, json={"messages": ASK, "stream": True}) as answer:
        lines = answer.iter_lines()
        while '"content":" capital"' not in next(lines):
            pass
    engine.wait_for_abort()
    event = served.exchange()
    assert event.outcome == "client_disconnected"
    assert 2 <= len(event.choices[0].token_ids) == len(event.choices[0].logprobs) < 8
    assert event.choices[0].text.startswith("The capital")
    assert served.router.in_flight("base") == 0


def test_a_client_that_leaves_before_the_answer_ends_it_at_the_engine(
    engine: Upstream, served: Gateway, client: httpx.Client
) -> None:
    engine.enqueue(recorded("chat"), pause_s=30)
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json={"messages": ASK}, timeout=0.1)
    engine.wait_for_abort()
    assert served.exchange().outcome == "client_disconnected"


def test_a_route_is_held_until_the_stream_has_ended(engine: Upstream, served: Gateway, client: httpx.Client) -> None:
    engine.enqueue_recorded("chat-stream", pause_s=0.05)
    asking = threading.Thread(target=lambda: client.post(CHAT, json={"messages": ASK, "stream": True}))
    asking.start()
    held = []
    while asking.is_alive():
        held.append(served.router.in_flight("base"))
        time.sleep(0.01)
    assert max(held) == 1
    served.exchange()  # it is on the log before the answer ends, and the route is let go after that
    deadline = time.monotonic() + 10
    while served.router.in_flight("base") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.router.in_flight("base") == 0


def test_a_log_that_fails_costs_no_answer_and_is_told(
    engine: Upstream,
    served: Gateway,
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(items: object) -> None:
        raise LogError("the disk is full")

    monkeypatch.setattr(served.log, "append_all", fail)
    engine.enqueue_recorded("chat")
    assert client.post(CHAT, json={"messages": ASK}).status_code == 200
    deadline = time.monotonic() + 5
    while "disk is full" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class SlowLog:
    """The commits of a gateway's log, held up by a test."""

    def __init__(self, log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
        self._append_all = log.append_all
        self.let_go = threading.Event()
        self.asked = threading.Event()
        monkeypatch.setattr(log, "append_all", self.append_all)

    def append_all(self, items: Any) -> Any:
        self.asked.set()
        self.let_go.wait(10)
        return self._append_all(items)


@pytest.fixture
def slow(served: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowLog]:
    log = SlowLog(served.log, monkeypatch)
    yield log
    log.let_go.set()


@pytest.mark.parametrize("shape", ["chat", "text"])
def test_a_whole_answer_is_on_the_log_before_the_client_has_it(
    engine: Upstream, served: Gateway, client: httpx.Client, slow: SlowLog, shape: str
) -> None:
    path, request = SHAPES[shape]
    engine.enqueue_recorded(shape)
    threading.Timer(0.3, slow.let_go.set).start()
    began = time.monotonic()
    assert client.post(path, json=request).status_code == 200
    assert len(served.exchanges()) == 1
    assert time.monotonic() - began > 0.3


def test_a_stream_is_on_the_log_before_its_done_and_only_the_end_waits_for_that(
    engine: Upstream, served: Gateway, client: httpx.Client, slow: SlowLog
) -> None:
    events = recorded("chat-stream").split(b"\n\n")[:-1]
    engine.enqueue(*(event + b"\n\n" for event in events), content_type=STREAM, pause_s=0.01)
    with client.stream("POST", CHAT, json={"messages": ASK, "stream": True}) as answer:
        lines = answer.iter_lines()
        while 'finish_reason":"stop' not in next(lines):
            pass
        assert slow.asked.wait(5)
        assert served.exchanges() == []
        threading.Timer(0.2, slow.let_go.set).start()
        while next(lines) != "data: [DONE]":
            pass
        assert len(served.exchanges()) == 1


@pytest.mark.parametrize("shape", ["chat", "chat-stream"])
def test_a_log_that_hangs_keeps_no_answer_back_for_long_and_is_counted(
    engine: Upstream,
    served: Gateway,
    client: httpx.Client,
    slow: SlowLog,
    shape: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.exchange.LOG_PATIENCE_S", 0.2)
    late = counted(client, "late")
    path, request = SHAPES[shape]
    engine.enqueue_recorded(shape)
    began = time.monotonic()
    answer = client.post(path, json={**request, "model": "policy"})
    assert 0.2 < time.monotonic() - began < 3
    assert comparable(shape, answer.content) == comparable(shape, as_asked(recorded(shape, "plain")))
    assert served.exchanges() == []
    assert counted(client, "late") == late + 1
    slow.let_go.set()
    served.exchange()


@pytest.mark.parametrize("shape", ["chat", "chat-stream"])
def test_a_log_that_fails_keeps_no_answer_back_and_is_counted(
    engine: Upstream, served: Gateway, client: httpx.Client, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(items: object) -> None:
        raise LogError("the disk is full")

    monkeypatch.setattr(served.log, "append_all", fail)
    failures = counted(client, "append_failures")
    path, request = SHAPES[shape]
    engine.enqueue_recorded(shape)
    answer = client.post(path, json={**request, "model": "policy"})
    assert comparable(shape, answer.content) == comparable(shape, as_asked(recorded(shape, "plain")))
    assert counted(client, "append_failures") == failures + 1


def test_a_client_that_leaves_while_the_log_is_waited_for_is_recorded_once_and_as_answered(
    engine: Upstream, served: Gateway, client: httpx.Client, slow: SlowLog
) -> None:
    engine.enqueue_recorded("chat")
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json={"messages": ASK}, timeout=0.2)
    time.sleep(0.2)
    slow.let_go.set()
    assert served.exchange().outcome == "completed"
    engine.enqueue_recorded("chat")
    client.post(CHAT, json={"messages": ASK})
    assert len(served.exchanges()) == 2


def test_the_time_that_the_log_takes_is_not_the_engines(
    host: Host, tmp_path: Path, engine: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway(host, tmp_path, engine.url, engine={"request_timeout_s": 0.3}) as served:
        slow = SlowLog(served.log, monkeypatch)
        threading.Timer(0.6, slow.let_go.set).start()
        engine.enqueue_recorded("chat")
        headers = {"Authorization": f"Bearer {served.app_key}"}
        assert httpx.post(served.url + CHAT, json={"messages": ASK}, headers=headers).status_code == 200
        assert served.exchange().outcome == "completed"


def counted(client: httpx.Client, what: str) -> float:
    """`/metrics` of what the log did to answers."""
    found = re.search(rf"^thumbwheel_gateway_log_{what}_total (\S+)$", client.get("/metrics").text, re.M)
    assert found is not None
    return float(found[1])


def test_an_outbox_full_of_votes_refuses_more_by_the_setting_and_chats_are_answered_until_kafka_took_them(
    host: Host, tmp_path: Path, engine: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def outbox(path: Path) -> Outbox:
        made.append(Outbox(path, 1_000_000))
        return made[-1]

    monkeypatch.setattr("tests.serving.SqliteLog", outbox)
    with gateway(host, tmp_path, engine.url) as served:
        (log,) = made
        headers = {"Authorization": f"Bearer {served.app_key}"}
        with suppress(LogError):
            for number in range(10_000):
                log.append(FEEDBACK, [Message(f"v{number}", f"k{number}", 1.0, b"{}".ljust(900))])
        with httpx.Client(base_url=served.url, headers=headers) as client:
            failures = counted(client, "append_failures")
            vote = {"response_id": response_id(), "rating": "down"}
            refused = client.post("/v1/feedback", json=vote)
            assert refused.status_code == 503
            assert error(refused)["type"] == "ServiceUnavailableError"
            assert "[log] outbox_max_bytes" in error(refused)["message"]
            engine.enqueue_recorded("chat")
            assert client.post(CHAT, json={"messages": ASK}).status_code == 200
            assert counted(client, "append_failures") == failures + 1
            while waiting := log.next(FEEDBACK, 1000, 10**6):
                log.sent(FEEDBACK, waiting[-1])
            assert client.post("/v1/feedback", json=vote).status_code == 202
            engine.enqueue_recorded("chat")
            assert client.post(CHAT, json={"messages": ASK}).status_code == 200
            assert counted(client, "append_failures") == failures + 1


def test_a_graceful_stop_writes_every_exchange(host: Host, tmp_path: Path, engine: Upstream) -> None:
    with gateway(host, tmp_path, engine.url) as served:
        headers = {"Authorization": f"Bearer {served.app_key}"}
        with httpx.Client(base_url=served.url, headers=headers) as http:
            for _ in range(20):
                engine.enqueue_recorded("chat")
                http.post(CHAT, json={"messages": ASK}).raise_for_status()
    reopened = SqliteLog(served.log.path)
    assert reopened.ends(RESPONSES) == (0, 20)
    reopened.close()
