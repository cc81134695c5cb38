import json
from typing import Any

import orjson
import pytest

from serve.injection import Endpoint, Injected, inject, strip_answer, strip_chunk
from tests.serve.upstream import recorded
from tests.serving import comparable
from tests.shapes import ASK, CHAT, SHAPES


def endpoint(path: str) -> Endpoint:
    return "chat.completions" if path == CHAT else "completions"


def stripped(body: bytes, injected: Injected, stream: bool) -> bytes:
    if not stream:
        answer = json.loads(body)
        strip_answer(answer, injected)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
    out = []
    for event in body.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            out.append(event)
        elif strip_chunk(chunk := orjson.loads(event[6:]), injected):
            out.append(b"data: " + orjson.dumps(chunk))
    return b"\n\n".join(out)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stripped_answer_has_the_bytes_that_vllm_sends_without_injection(shape: str) -> None:
    path, request = SHAPES[shape]
    _, injected = inject(endpoint(path), request, "policy@base")
    body = stripped(recorded(shape), injected, bool(request.get("stream")))
    assert comparable(shape, body) == comparable(shape, recorded(shape, "plain"))


def test_recordings_hold_chunks_that_only_injection_brings() -> None:
    """Else the test above would say nothing about dropping them."""
    assert recorded("chat-tool-stream").count(b"\n\n") > recorded("chat-tool-stream", "plain").count(b"\n\n")


@pytest.mark.parametrize(
    ("name", "request_", "injected"),
    [
        ("chat.completions", {}, Injected(True, True)),
        ("chat.completions", {"logprobs": False}, Injected(True, True)),
        ("chat.completions", {"logprobs": None}, Injected(True, True)),
        ("chat.completions", {"logprobs": True}, Injected(False, True)),
        ("chat.completions", {"logprobs": True, "return_token_ids": True}, Injected(False, False)),
        ("completions", {}, Injected(True, True)),
        ("completions", {"logprobs": 0}, Injected(False, True)),
        ("completions", {"return_token_ids": True}, Injected(True, False)),
        # vLLM answers these with 400, and must be let:
        ("chat.completions", {"top_logprobs": 3}, Injected(False, True)),
        ("completions", {"logprob_token_ids": [1]}, Injected(False, True)),
        # Injection would change what the client gets:
        ("completions", {"echo": True}, Injected(False, False)),
        ("completions", {"use_beam_search": True}, Injected(False, False)),
        ("completions", {"prompt_embeds": "AA=="}, Injected(False, False)),
    ],
)
def test_only_what_the_client_left_out_is_injected(name: Endpoint, request_: Any, injected: Injected) -> None:
    assert inject(name, request_, "policy@v1")[1] == injected


def test_unknown_fields_pass_untouched_and_the_request_itself_is_left_alone() -> None:
    request = {"model": "policy", "messages": ASK, "made_up": {"deep": [1, None]}, "store": True}
    before = json.dumps(request)
    forwarded, _ = inject("chat.completions", request, "policy@v7")
    assert json.dumps(request) == before
    added = {"model": "policy@v7", "logprobs": True, "top_logprobs": 0, "return_token_ids": True}
    assert forwarded == request | added


@pytest.mark.parametrize(
    ("request_", "sent"),
    [
        ({}, [1, 7]),
        ({"stop_token_ids": None}, [1, 7]),
        ({"stop_token_ids": [5]}, [5, 1, 7]),
        ({"stop_token_ids": "no list"}, "no list"),  # vLLM answers this with 400, and must be let
        ({"ignore_eos": True, "stop_token_ids": [5]}, [5]),
        ({"ignore_eos": True}, None),
    ],
)
def test_our_stop_tokens_end_an_answer_beside_those_of_the_client(request_: Any, sent: Any) -> None:
    forwarded, injected = inject("chat.completions", request_, "policy@v1", [1, 7])
    assert forwarded.get("stop_token_ids") == sent
    assert injected == Injected(True, True)
