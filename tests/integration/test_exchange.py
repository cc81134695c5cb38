"""The recorded exchange is right, and the gateway cannot be told from the engine: with a real vLLM and `openai`."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving import Gateway, Host, gateway, joined
from tests.shapes import ASK, CHAT, SHAPES, TOOL, tool_messages
from thumbwheel.events import Choice, ResponseGenerated
from thumbwheel.settings import EngineSettings

pytestmark = pytest.mark.engine

PROMPTS = [
    "Tell me about the sea.",
    "Why is the sky blue?",
    "Give me three names for a cat.",
    "What is a prime number?",
]


@pytest.fixture
def client(real_gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_gateway.url}/v1", api_key=real_gateway.app_key, max_retries=0) as stock:
        yield stock


@cache
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@cache
def network(model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()


def rescored(model: Path, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """What transformers gives each token of a completion. Nats."""
    import torch

    with torch.inference_mode():
        logits = network(model)(torch.tensor([prompt + completion])).logits[0].float()
    scores = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)  # position t scores token t + 1
    found: list[float] = scores.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
    return found


def differences(model: Path, event: ResponseGenerated) -> list[float]:
    found = []
    for choice in event.choices:
        prompt = event.prompt_token_ids[choice.prompt_index]
        scores = rescored(model, prompt, choice.token_ids, event.sampling.temperature)
        for served, score in zip(choice.logprobs, scores, strict=True):
            assert served is not None
            found.append(served - score)
    return found


def assert_within_tolerance(found: list[float]) -> None:
    """Two kernels in bf16: one token proves nothing, the means over a few hundred do."""
    assert len(found) >= 300
    assert sum(map(abs, found)) / len(found) < 0.1
    assert abs(sum(found) / len(found)) < 0.02


def decoded(model: Path, choice: Choice) -> str:
    text: str = tokenizer(model).decode(choice.token_ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("stream", [False, True])
def test_ids_decode_to_what_the_client_saw_and_logprobs_match_a_rescoring(
    real_gateway: Gateway, client: openai.OpenAI, model_dir: Path, stream: bool, temperature: float
) -> None:
    found: list[float] = []
    for seed, prompt in enumerate(PROMPTS):
        given: dict[str, Any] = {"max_tokens": 64, "n": 2, "temperature": temperature, "seed": seed}
        seen = ["", ""]
        messages: Any = [{"role": "user", "content": prompt}]
        if stream:
            for chunk in client.chat.completions.create(model="policy", messages=messages, stream=True, **given):
                response_id = chunk.id
                for part in chunk.choices:
                    seen[part.index] += part.delta.content or ""
        else:
            answer = client.chat.completions.create(model="policy", messages=messages, **given)
            response_id = answer.id
            for choice in answer.choices:
                seen[choice.index] = choice.message.content or ""
        event = real_gateway.exchange(response_id)
        rendered = tokenizer(model_dir).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert event.prompt_token_ids == [rendered]
        assert [choice.text for choice in event.choices] == seen == [decoded(model_dir, c) for c in event.choices]
        assert (event.outcome, event.untrainable, event.stream) == ("completed", None, stream)
        found += differences(model_dir, event)
    assert_within_tolerance(found)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_two_prompts_are_recorded_each_with_its_own(
    real_gateway: Gateway, client: openai.OpenAI, model_dir: Path, stream: bool
) -> None:
    prompts = ["The sea is", "My cat is called"]
    seen = [""] * 4
    given: dict[str, Any] = {"model": "policy", "prompt": prompts, "n": 2, "max_tokens": 80, "seed": 1}
    if stream:
        for chunk in client.completions.create(**given, stream=True):
            response_id = chunk.id
            for part in chunk.choices:
                seen[part.index] += part.text
    else:
        answer = client.completions.create(**given)
        response_id = answer.id
        for choice in answer.choices:
            seen[choice.index] = choice.text
    event = real_gateway.exchange(response_id)
    assert event.prompt_token_ids == [tokenizer(model_dir)(prompt)["input_ids"] for prompt in prompts]
    assert [choice.prompt_index for choice in event.choices] == [0, 0, 1, 1]
    assert [choice.text for choice in event.choices] == seen == [decoded(model_dir, c) for c in event.choices]
    found = differences(model_dir, event)
    assert len(found) > 100
    assert sum(map(abs, found)) / len(found) < 0.1


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_is_recorded_whole(
    real_gateway: Gateway, client: openai.OpenAI, model_dir: Path, stream: bool
) -> None:
    messages: Any = tool_messages("Oslo")
    tools: Any = [TOOL]
    given: dict[str, Any] = {"messages": messages, "tools": tools, "tool_choice": "auto", "temperature": 0}
    if stream:
        name, arguments = "", ""
        for chunk in client.chat.completions.create(model="policy", max_tokens=60, stream=True, **given):
            response_id = chunk.id
            for part in chunk.choices:
                for delta in part.delta.tool_calls or ():
                    assert delta.function is not None
                    name += delta.function.name or ""
                    arguments += delta.function.arguments or ""
                reason = part.finish_reason
    else:
        answer = client.chat.completions.create(model="policy", max_tokens=60, **given)
        response_id, reason = answer.id, answer.choices[0].finish_reason
        called: Any = (answer.choices[0].message.tool_calls or [])[0]
        name, arguments = called.function.name, called.function.arguments
    (choice,) = real_gateway.exchange(response_id).choices
    assert choice.tool_calls is not None
    (call,) = choice.tool_calls
    assert reason == choice.finish_reason == "tool_calls"
    assert (call["function"]["name"], call["function"]["arguments"]) == (name, arguments)
    assert choice.text == ""
    raw = decoded(model_dir, choice)
    assert raw.startswith("<tool_call>")
    assert raw.endswith("</tool_call>")
    sent = json.loads(raw.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert sent == {"name": name, "arguments": json.loads(arguments)}
    assert len(choice.logprobs) == len(choice.token_ids)


def test_a_stop_token_ends_an_answer_that_would_go_on_as_somebody_else(
    host: Host, tmp_path: Path, engine_url: str, engine_base: str, model_dir: Path
) -> None:
    """The adapter that opens the user's turn is played by a bias for the token with which a turn begins."""
    (turn,) = tokenizer(model_dir).encode("<|im_start|>")
    request = {"model": "policy", "messages": ASK, "logit_bias": {str(turn): 100}, "max_tokens": 8}
    ended = []
    for chosen in ([], [turn]):
        data = tmp_path / str(len(chosen))
        with gateway(host, data, engine_url, engine_base, engine=EngineSettings(stop_token_ids=chosen)) as running:
            headers = {"Authorization": f"Bearer {running.app_key}"}
            answer = httpx.post(f"{running.url}{CHAT}", json=request, headers=headers, timeout=60).json()
            (choice,) = running.exchange(answer["id"]).choices
        assert answer["choices"][0]["message"]["content"] == choice.text == decoded(model_dir, choice)
        ended.append((choice.finish_reason, choice.token_ids))
    assert ended == [("length", [turn] * 8), ("stop", [turn])]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gateway_sends_what_the_engine_sends(
    real_gateway: Gateway, engine_url: str, engine_base: str, shape: str
) -> None:
    path, request = SHAPES[shape]
    headers = {"Authorization": f"Bearer {real_gateway.app_key}"}
    direct = httpx.post(engine_url + path, json={**request, "model": engine_base}, timeout=60)
    through = httpx.post(real_gateway.url + path, json={**request, "model": "policy"}, headers=headers, timeout=60)
    renamed = direct.content.replace(f'"model":"{engine_base}"'.encode(), b'"model":"policy"')
    assert joined(shape, through.content) == joined(shape, renamed)
    assert through.headers["content-type"] == direct.headers["content-type"]
    added = set(through.headers) - set(direct.headers)
    assert added == {"x-thumbwheel-version", "x-thumbwheel-digest"}


@pytest.mark.parametrize(
    "request_",
    [
        {"max_tokens": -1},
        {"max_tokens": 99_999},
        {"temperature": "warm"},
        {"top_logprobs": 3},
        {"n": 2, "temperature": 0},
        {"messages": "hi"},
        {"tools": []},
    ],
)
def test_the_gateway_refuses_as_the_engine_refuses(
    real_gateway: Gateway, engine_url: str, engine_base: str, request_: dict[str, Any]
) -> None:
    request = {"messages": ASK, **request_}
    headers = {"Authorization": f"Bearer {real_gateway.app_key}"}
    direct = httpx.post(engine_url + CHAT, json={**request, "model": engine_base}, timeout=60)
    through = httpx.post(real_gateway.url + CHAT, json={**request, "model": "policy"}, headers=headers, timeout=60)
    assert direct.status_code == through.status_code == 400
    assert through.content == direct.content


def test_a_stock_client_reads_our_errors(real_gateway: Gateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.PermissionDeniedError, match="scope"):
        client.chat.completions.create(model="policy@base", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="tw-wrong").models.list()
    assert [model.id for model in client.models.list()] == ["policy"]


def test_a_client_that_leaves_stops_the_engine(real_gateway: Gateway, client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="policy", stream=True, **given)
    response_id = next(iter(stream)).id
    stream.close()
    event = real_gateway.exchange(response_id)
    assert event.outcome == "client_disconnected"
    assert 1 <= len(event.choices[0].token_ids) < 200
