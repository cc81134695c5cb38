"""Requests of every shape that the gateway has to pass on unchanged; all greedy, so that answers can be compared."""

import json
from typing import Any

# Prompts whose next tokens leave no doubt: where two are nearly as likely, rounding in bf16 decides, and that hangs on
# what else is in the engine's batch.
ASK = [
    {"role": "user", "content": "Capital of Italy?"},
    {"role": "assistant", "content": "The capital of Italy is Rome."},
    {"role": "user", "content": "Capital of Spain?"},
    {"role": "assistant", "content": "The capital of Spain is Madrid."},
    {"role": "user", "content": "Capital of France?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def _called(city: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'get_weather', 'arguments': {'city': city}})}\n</tool_call>"


def tool_messages(city: str) -> list[dict[str, str]]:
    """A conversation after which even a model of 135M parameters calls the tool."""
    messages = [{"role": "system", "content": "You call tools."}]
    for example in ("Paris", "Rome", "Berlin", "Madrid"):
        messages.append({"role": "user", "content": f"Weather in {example}?"})
        messages.append({"role": "assistant", "content": _called(example)})
    return [*messages, {"role": "user", "content": f"Weather in {city}?"}]


_CHAT: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 12}
# Each next token leads the second by a logit or more: what else the engine has in its batch may decide a near tie.
_TEXT: dict[str, Any] = {"prompt": "1, 2, 3, 4, 5, 6, 7, 8,", "temperature": 0, "max_tokens": 8}
_TOOL: dict[str, Any] = {"messages": tool_messages("Oslo"), "tools": [TOOL], "temperature": 0, "max_tokens": 60}
_N2 = {"n": 2, "temperature": 1, "top_k": 1}  # greedy, in the one way in which vLLM allows n > 1
_BOTH = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, _CHAT),
    "chat-n2": (CHAT, {**_CHAT, **_N2}),
    "chat-logprobs": (CHAT, {**_CHAT, "logprobs": True, "top_logprobs": 2}),
    "chat-ids": (CHAT, {**_CHAT, "return_token_ids": True}),
    "chat-both": (CHAT, {**_CHAT, **_BOTH}),
    "chat-stop": (CHAT, {**_CHAT, "stop": ["Paris"]}),
    "chat-echo": (CHAT, {**_CHAT, "echo": True}),
    "chat-tool": (CHAT, _TOOL),
    "text": (TEXT, _TEXT),
    "text-n2-prompts": (TEXT, {**_TEXT, **_N2, "prompt": ["1, 2, 3, 4, 5, 6, 7, 8,", "a, b, c, d, e, f, g, h,"]}),
    "text-ids-prompt": (TEXT, {**_TEXT, "prompt": [81, 28, 278, 28, 265, 28, 287, 28]}),
    "text-logprobs": (TEXT, {**_TEXT, "logprobs": 2}),
    "text-ids": (TEXT, {**_TEXT, "return_token_ids": True}),
    "text-echo": (TEXT, {**_TEXT, "echo": True, "logprobs": 0}),
    "text-score": (TEXT, {**_TEXT, "max_tokens": 1, "prompt_logprobs": 0}),
}
_STREAMED = [name for name in SHAPES if name != "text-score"]
SHAPES |= {f"{name}-stream": (SHAPES[name][0], {**SHAPES[name][1], "stream": True}) for name in _STREAMED}
SHAPES |= {
    f"{name}-stream-usage": (SHAPES[name][0], {**SHAPES[name][1], "stream": True, "stream_options": options})
    for name, options in {
        "chat": {"include_usage": True},
        "chat-tool": {"include_usage": True, "continuous_usage_stats": True},
        "text": {"include_usage": True},
    }.items()
}
