from typing import Any

import orjson
import pytest

from serve.capture import Capture, effective_sampling
from serve.injection import inject
from tests.serve.test_injection import endpoint
from tests.serve.upstream import recorded
from tests.shapes import ASK, SHAPES, TOOL

WHOLE = [name for name in SHAPES if f"{name}-stream" in SHAPES]


def captured(shape: str) -> Capture:
    path, request = SHAPES[shape]
    capture = Capture(endpoint(path), request)
    if not request.get("stream"):
        capture.answer(orjson.loads(recorded(shape)))
        return capture
    for event in recorded(shape).split(b"\n\n"):
        if event.startswith(b"data: {"):
            capture.chunk(orjson.loads(event[6:]))
    return capture


@pytest.mark.parametrize("shape", [name for name in WHOLE if "echo" not in name])
def test_a_stream_is_captured_as_the_whole_answer_is(shape: str) -> None:
    whole, stream = captured(shape), captured(f"{shape}-stream")
    assert whole.prompt_token_ids() == stream.prompt_token_ids()
    assert whole.tokens == stream.tokens
    for one, other in zip(whole.choices(), stream.choices(), strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=0.15)  # two runs in bf16
        exact = {"logprobs", "tool_calls"}
        assert one.model_dump(exclude=exact) == other.model_dump(exclude=exact)
        assert _calls(one.tool_calls) == _calls(other.tool_calls)


def _calls(calls: list[dict[str, Any]] | None) -> list[Any]:
    return [(call["type"], call["function"]) for call in calls or ()]


@pytest.mark.parametrize("shape", [name for name in SHAPES if "echo" not in name])
def test_every_choice_has_as_many_logprobs_as_ids_and_may_be_learned_from(shape: str) -> None:
    capture = captured(shape)
    assert capture.untrainable("completed") is None
    for choice in capture.choices():
        assert len(choice.token_ids) == len(choice.logprobs) > 0
        assert all(logprob is not None and logprob <= 0 for logprob in choice.logprobs)


def test_a_streamed_tool_call_is_put_together() -> None:
    (choice,) = captured("chat-tool-stream").choices()
    assert choice.text == ""
    assert choice.finish_reason == "tool_calls"
    assert choice.tool_calls is not None
    (call,) = choice.tool_calls
    assert call["function"]["name"] == "get_weather"
    assert list(orjson.loads(call["function"]["arguments"])) == ["city"]
    assert len(choice.token_ids) == 32, "ids are complete, though the client saw fewer characters"


def test_choices_of_several_prompts_know_their_prompt() -> None:
    capture = captured("text-n2-prompts-stream")
    assert [(choice.index, choice.prompt_index) for choice in capture.choices()] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert len(capture.prompt_token_ids()) == 2


def test_what_was_streamed_before_a_break_is_there() -> None:
    path, request = SHAPES["chat-stream"]
    capture = Capture(endpoint(path), request)
    assert not capture.started
    for event in recorded("chat-stream").split(b"\n\n")[:4]:
        capture.chunk(orjson.loads(event[6:]))
    (choice,) = capture.choices()
    assert capture.started
    assert len(choice.token_ids) == len(choice.logprobs) == 3
    assert choice.finish_reason is None
    assert capture.untrainable("client_disconnected") == "outcome: client_disconnected"


def test_a_missing_logprob_becomes_null() -> None:
    capture = Capture("completions", {})
    logprobs = {"token_logprobs": [-0.5, -9999.0, None]}
    choice = {"index": 0, "text": "abc", "token_ids": [1, 2, 3], "logprobs": logprobs, "prompt_token_ids": [7]}
    capture.answer({"choices": [choice]})
    assert capture.choices()[0].logprobs == [-0.5, None, None]
    assert capture.untrainable("completed") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"5": 10}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]},  # type: ignore[dict-item]
        {"include_reasoning": False},
        {"min_tokens": 5},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
    ],
)
def test_an_answer_that_was_not_the_policys_own_choice_is_untrainable(fields: dict[str, Any]) -> None:
    capture = Capture("chat.completions", {"messages": ASK, **fields})
    capture.answer(orjson.loads(recorded("chat")))
    assert capture.untrainable("completed")


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "text"}}, {"tools": [TOOL], "tool_choice": "auto"}, {}]
)
def test_an_answer_of_the_policys_own_choice_may_be_learned_from(fields: dict[str, Any]) -> None:
    text = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    capture = Capture("chat.completions", {"messages": text, **fields})
    capture.answer(orjson.loads(recorded("chat")))
    assert capture.untrainable("completed") is None


def test_missing_ids_and_missing_logprobs_are_untrainable() -> None:
    for lacking in ("token_ids", "logprobs"):
        answer = orjson.loads(recorded("chat"))
        answer["choices"][0][lacking] = None
        capture = Capture("chat.completions", {"messages": ASK})
        capture.answer(answer)
        assert capture.untrainable("completed")


def test_sampling_has_vllms_defaults_and_what_the_client_set() -> None:
    chat = effective_sampling(
        "chat.completions", {"max_tokens": 5, "max_completion_tokens": 7, "stop": "x", "top_p": None}
    )
    assert (chat.temperature, chat.top_p, chat.top_k, chat.n, chat.max_tokens, chat.stop) == (1.0, 1.0, 0, 1, 7, ["x"])
    text = effective_sampling("completions", {"temperature": 0, "n": 3, "seed": 4, "stop": ["a", "b"]})
    assert (text.temperature, text.n, text.seed, text.max_tokens, text.stop) == (0.0, 3, 4, 16, ["a", "b"])


def test_sampling_that_the_engine_would_refuse_does_not_stop_the_record() -> None:
    assert effective_sampling("completions", {"temperature": "warm"}).temperature == 1.0


def test_what_the_gateway_injects_does_not_count_as_asked_for() -> None:
    request = {"messages": ASK}
    inject("chat.completions", request, "policy@v1")
    assert Capture("chat.completions", request).sampling == effective_sampling("chat.completions", {})
