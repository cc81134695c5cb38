"""From a request and what the engine answered to a `ResponseGenerated` event. Pure: no I/O, no clock.

An exchange is recorded as it was sampled: `token_ids` and `logprobs` are complete even where the client saw less (a
tool parser that holds text back, a stop string that is cut off). `untrainable` says why the learner must leave it.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from serve.injection import Endpoint, Json
from thumbwheel.events import Choice, Sampling

MISSING = -9999.0
"""What vLLM puts where it has no log-prob (and -inf)."""

RESHAPING = (
    "structured_outputs",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "ignore_eos",
    "thinking_token_budget",
    "watermarking",
    "use_beam_search",
    "prompt_embeds",
    "echo",
)
"""Fields under which the sampled distribution is not the policy's own, or the ids do not come with the answer."""


@dataclass(slots=True)
class Sampled:
    """One choice while it arrives."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tool_calls: dict[int, Json] = field(default_factory=dict)
    finish_reason: str | None = None

    def call(self, delta: Json) -> None:
        """Add a streamed part of a tool call: the name comes once, the arguments in pieces."""
        call = self.tool_calls.setdefault(
            delta.get("index", 0), {"id": None, "type": "function", "function": {"name": None, "arguments": ""}}
        )
        function = delta.get("function") or {}
        call["id"] = delta.get("id") or call["id"]
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        call["function"]["arguments"] += function.get("arguments") or ""


class Capture:
    """Gathers one exchange: feed it the whole answer, or each streamed chunk, before anything is stripped from it."""

    def __init__(self, endpoint: Endpoint, request: Json) -> None:
        self.sampling = effective_sampling(endpoint, request)
        self.error: str | None = None
        self._chat = endpoint == "chat.completions"
        self._request = request
        self._prompts: dict[int, list[int]] = {}
        self._choices: dict[int, Sampled] = {}

    def answer(self, answer: Json) -> None:
        """Take a whole answer."""
        for choice in answer["choices"]:
            sampled = self._add(choice, answer)
            message = choice["message"] if self._chat else choice
            sampled.text.append(message.get("content" if self._chat else "text") or "")
            sampled.tool_calls.update(enumerate(message.get("tool_calls") or ()))

    def chunk(self, chunk: Json) -> None:
        """Take one streamed chunk. An error event is noted in `error`."""
        if "error" in chunk:
            self.error = str(chunk["error"].get("message"))
            return
        for choice in chunk["choices"]:
            sampled = self._add(choice, chunk)
            delta = choice["delta"] if self._chat else choice
            sampled.text.append(delta.get("content" if self._chat else "text") or "")
            for call in delta.get("tool_calls") or ():
                sampled.call(call)

    def _add(self, choice: Json, whole: Json) -> Sampled:
        index = choice["index"]
        sampled = self._choices.setdefault(index, Sampled())
        sampled.token_ids += choice.get("token_ids") or ()
        sampled.logprobs += _logprobs(choice.get("logprobs"))
        sampled.finish_reason = choice.get("finish_reason") or sampled.finish_reason
        prompt = (whole if self._chat else choice).get("prompt_token_ids")
        if prompt:
            self._prompts[index // self.sampling.n] = prompt
        return sampled

    @property
    def started(self) -> bool:
        """Whether anything was sampled yet."""
        return any(sampled.token_ids or any(sampled.text) for sampled in self._choices.values())

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens the prompts have, and how many were sampled."""
        sampled = sum(len(choice.token_ids) for choice in self._choices.values())
        return sum(map(len, self._prompts.values())), sampled

    def prompt_token_ids(self) -> list[list[int]]:
        return [self._prompts[index] for index in sorted(self._prompts)]

    def choices(self) -> list[Choice]:
        return [
            Choice(
                index=index,
                prompt_index=0 if self._chat else index // self.sampling.n,
                text="".join(sampled.text),
                tool_calls=[sampled.tool_calls[i] for i in sorted(sampled.tool_calls)] or None,
                finish_reason=sampled.finish_reason,
                token_ids=sampled.token_ids,
                logprobs=sampled.logprobs,
            )
            for index, sampled in sorted(self._choices.items())
        ]

    def untrainable(self, outcome: str) -> str | None:
        """Why the learner must not use the exchange; None where it may."""
        if outcome != "completed":
            return f"outcome: {outcome}"
        if reason := reshaped(self._request):
            return reason
        if not self._prompts or not self._choices:
            return "token ids are missing"
        for sampled in self._choices.values():
            if not sampled.token_ids or len(sampled.token_ids) != len(sampled.logprobs):
                return "token ids or log-probs are missing"
        return None


def effective_sampling(endpoint: Endpoint, request: Json) -> Sampling:
    """The sampling parameters in force: the client's, else vLLM's defaults (`--generation-config vllm`).

    What vLLM would refuse gives the defaults: it matters only for an exchange that never reached it.
    """
    given: Json = {name: request[name] for name in Sampling.model_fields if request.get(name) is not None}
    limit = given.get("max_tokens", 16 if endpoint == "completions" else None)
    if endpoint == "chat.completions":
        limit = request.get("max_completion_tokens") or limit
    stop = given.get("stop", [])
    try:
        return Sampling.model_validate(
            {**given, "max_tokens": limit, "stop": [stop] if isinstance(stop, str) else stop}
        )
    except ValidationError:
        return Sampling()


def reshaped(request: Json) -> str | None:
    """Why the recorded log-probs are not the bare policy's own (a grammar, a mask); None where they are."""
    for name in RESHAPING:
        if request.get(name):
            return f"{name} was set"
    if (request.get("response_format") or {}).get("type", "text") != "text":
        return "structured output: response_format was set"
    if request.get("tool_choice") == "required" or isinstance(request.get("tool_choice"), dict):
        return "structured output: tool_choice forced a call"
    if any((tool.get("function") or {}).get("strict") for tool in request.get("tools") or ()):
        return "structured output: a tool is strict"
    if request.get("include_reasoning") is False:
        return "include_reasoning withholds token ids"
    if any(_has_media(message) for message in request.get("messages") or ()):
        return "the prompt has parts that are not text"
    return None


def _has_media(message: Json) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in content)


def _logprobs(value: Any) -> list[float | None]:
    """The sampled tokens' log-probs out of a chat choice's `logprobs`, or a completion's."""
    if not value:
        return []
    found = value["token_logprobs"] if "token_logprobs" in value else [e["logprob"] for e in value["content"] or ()]
    return [None if logprob is None or logprob <= MISSING else logprob for logprob in found]
