"""What the gateway asks of vLLM beside what the client asked, and how it takes that out of the answer again.

vLLM sends `null` for log-probs and token ids that nobody asked for, so taking them out is setting them to null: keys
and their order stay. One kind of streamed chunk is there only because ids or log-probs were asked for: `strip_chunk`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Endpoint = Literal["chat.completions", "completions"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Injected:
    """What was added to the request, to be taken out of the answer."""

    logprobs: bool = False
    token_ids: bool = False


def inject(
    endpoint: Endpoint, request: Json, engine_model: str, stop_token_ids: Sequence[int] = ()
) -> tuple[Json, Injected]:
    """The request to forward, and what was added to it that has to come out of the answer again.

    The tokens of `stop_token_ids` end an answer beside those that the client named; as with the model's own end token,
    `ignore_eos` turns them off.

    Nothing else is added where that would change what the client gets: `echo` (the echoed text goes missing, and prompt
    log-probs are computed), beam search and prompt embeddings (they have no sampled log-probs), and mistakes that
    vLLM answers with 400 (`top_logprobs` without `logprobs`).
    """
    forwarded = {**request, "model": engine_model}
    named = request.get("stop_token_ids") or []
    if stop_token_ids and isinstance(named, list) and not request.get("ignore_eos"):
        forwarded["stop_token_ids"] = [*named, *stop_token_ids]
    if request.get("echo") or request.get("use_beam_search") or request.get("prompt_embeds"):
        return forwarded, Injected()
    asked = request.get("logprobs")
    mistaken = request.get("logprob_token_ids") or (endpoint == "chat.completions" and request.get("top_logprobs"))
    injected = Injected(
        logprobs=not mistaken and (not asked if endpoint == "chat.completions" else asked is None),
        token_ids=not request.get("return_token_ids"),
    )
    if injected.token_ids:
        forwarded["return_token_ids"] = True
    if injected.logprobs and endpoint == "chat.completions":
        forwarded |= {"logprobs": True, "top_logprobs": 0}
    elif injected.logprobs:
        forwarded["logprobs"] = 0
    return forwarded, injected


def strip_answer(answer: Json, injected: Injected) -> None:
    """Take out of a whole answer, in place, what the client did not ask for."""
    for choice in answer["choices"]:
        _strip_choice(choice, injected)
    if injected.token_ids and "prompt_token_ids" in answer:
        answer["prompt_token_ids"] = None


def strip_chunk(chunk: Json, injected: Injected) -> bool:
    """As `strip_answer` for one streamed chunk; false where vLLM would not have sent the chunk at all.

    That is a chat chunk with an empty delta before the end: a tool parser holds its text back, and vLLM sends the
    chunk for its ids or log-probs alone (`chat_completion_stream_generator` in vLLM 0.32).
    """
    choices = chunk["choices"]
    if injected.logprobs and injected.token_ids and len(choices) == 1:
        (choice,) = choices
        if choice.get("delta") == {} and choice.get("finish_reason") is None:
            return False
    strip_answer(chunk, injected)
    return True


def _strip_choice(choice: Json, injected: Injected) -> None:
    if injected.logprobs:
        choice["logprobs"] = None
    if injected.token_ids:
        for key in ("token_ids", "prompt_token_ids"):
            if key in choice:
                choice[key] = None
