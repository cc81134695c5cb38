"""A server that answers at once in vLLM's shape, so that a measurement shows what lies in front of it and nothing else.

    python -m bench.light_upstream PORT

Log-probs and token ids are in the answer where the request asks for them, as in vLLM. A stream sends its first token at
once and the others `PACE_S` apart.
"""

import asyncio
import sys
from typing import Any

import orjson
import uvicorn
from starlette.types import Receive, Scope, Send

TOKENS = 32
PACE_S = 0.02
PROMPT_IDS = list(range(1000, 1200))


def _logprobs(count: int) -> dict[str, Any]:
    entry = {"token": " word", "logprob": -1.2345678, "bytes": [32, 119, 111, 114, 100], "top_logprobs": []}
    return {"content": [entry] * count}


def _whole(asked: bool) -> bytes:
    message = {"role": "assistant", "content": " word" * TOKENS, "refusal": None, "function_call": None}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(TOKENS) if asked else None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": list(range(TOKENS)) if asked else None,
    }
    usage = {"prompt_tokens": 200, "total_tokens": 200 + TOKENS, "completion_tokens": TOKENS}
    head = {"id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": "policy@base", "choices": [choice]}
    return orjson.dumps(head | {"usage": usage, "prompt_token_ids": PROMPT_IDS if asked else None})


def _events(asked: bool) -> list[bytes]:
    def event(choice: dict[str, Any], **more: Any) -> bytes:
        head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": "policy@base"}
        return b"data: " + orjson.dumps(head | {"choices": [{"index": 0, **choice}]} | more) + b"\n\n"

    role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    events = [event(role, prompt_token_ids=PROMPT_IDS if asked else None)]
    for number in range(TOKENS):
        choice: dict[str, Any] = {"delta": {"content": " word"}, "logprobs": _logprobs(1) if asked else None}
        choice |= {"finish_reason": "stop" if number == TOKENS - 1 else None, "token_ids": [number] if asked else None}
        events.append(event(choice))
    return [events[0] + events[1], *events[2:], b"data: [DONE]\n\n"]


MODELS = orjson.dumps({"object": "list", "data": [{"id": "policy@base", "parent": None}]})
WHOLE = {asked: _whole(asked) for asked in (False, True)}
EVENTS = {asked: _events(asked) for asked in (False, True)}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers every path; the list of models as vLLM does, so that a gateway takes it for its engine."""
    if scope["path"] == "/v1/models":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": MODELS})
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    request = orjson.loads(body) if body else {}
    asked, stream = bool(request.get("return_token_ids")), bool(request.get("stream"))
    content_type = b"text/event-stream; charset=utf-8" if stream else b"application/json"
    id = b"chatcmpl-" + dict(scope["headers"]).get(b"x-request-id", b"0")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
    if not stream:
        await send({"type": "http.response.body", "body": WHOLE[asked].replace(b"chatcmpl-0", id)})
        return
    for event in EVENTS[asked]:
        await send({"type": "http.response.body", "body": event.replace(b"chatcmpl-0", id), "more_body": True})
        await asyncio.sleep(PACE_S)
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False, lifespan="off")
