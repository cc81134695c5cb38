"""What may be learned from. Pure: one response in, its answers out, each with the reason why not if there is one."""

import hashlib
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from thumbwheel.events import Choice, ResponseGenerated

HELD_OUT = "its prompt is held out to measure KL"
MISSING_LOGPROB = -9000.0
"""vLLM writes −9999 where it has no log-prob."""
CERTAIN = 1e-3
"""A log-prob above this is none: no rounding makes it from the 0 of a token that is certain."""

Decode = Callable[[list[int]], str]
"""What token ids say, special tokens left out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a response: token ids with their recorded log-probs, and why it must not be learned from (None: it
    may). `ended` says whether it ended by itself. `text` is the answer where a text is all that it is, else None.
    """

    choice_index: int
    prompt: list[int]
    completion: list[int]
    behaviour: list[float]
    ended: bool
    text: str | None
    problem: str | None


def admit(
    response: ResponseGenerated, vocabulary: int, held_out: Callable[[list[int]], bool], decode: Decode | None = None
) -> list[Answer]:
    """The answers of a response, each admitted or not. `vocabulary` is the number of tokens that the model knows.

    With `decode`, an answer has to say what was recorded of it.
    """
    return [_admit_choice(response, choice, vocabulary, held_out, decode) for choice in response.choices]


def _admit_choice(
    response: ResponseGenerated,
    choice: Choice,
    vocabulary: int,
    held_out: Callable[[list[int]], bool],
    decode: Decode | None,
) -> Answer:
    prompts = response.prompt_token_ids
    prompt = prompts[choice.prompt_index] if 0 <= choice.prompt_index < len(prompts) else []
    problem = _response_problem(response) or _ids_problem(prompt, choice, vocabulary)
    text = None
    if problem is None and decode is not None:
        decoded = decode(choice.token_ids)
        problem = _text_problem(response, choice, decoded, decode)
        text = choice.text if _is_text(response, choice, decoded) else None
    if problem is None and held_out(prompt):
        problem = HELD_OUT
    behaviour = [p for p in choice.logprobs if p is not None]
    ended = choice.finish_reason in ("stop", "tool_calls")
    return Answer(choice.index, prompt, choice.token_ids, behaviour, ended, text, problem)


def _response_problem(response: ResponseGenerated) -> str | None:
    if response.outcome != "completed":
        return f"the response ended as {response.outcome}"
    if response.untrainable is not None:
        return f"marked untrainable: {response.untrainable}"
    return None


def _ids_problem(prompt: list[int], choice: Choice, vocabulary: int) -> str | None:
    if not prompt:
        return "no prompt token ids were recorded"
    if not choice.token_ids:
        return "the completion is empty"
    if len(choice.logprobs) != len(choice.token_ids):
        return f"{len(choice.logprobs)} log-probs for {len(choice.token_ids)} tokens"
    if any(p is None or not math.isfinite(p) or p <= MISSING_LOGPROB for p in choice.logprobs):
        return "a log-prob is missing or not a number"
    positive = next((p for p in choice.logprobs if p is not None and p > CERTAIN), None)
    if positive is not None:
        return f"a log-prob is {positive:g}, and none is above 0: they are something else"
    strange = next((id for id in (*prompt, *choice.token_ids) if not 0 <= id < vocabulary), None)
    if strange is not None:
        return f"token id {strange} is outside the vocabulary of {vocabulary}: another base model sampled it"
    return None


def _text_problem(response: ResponseGenerated, choice: Choice, decoded: str, decode: Decode) -> str | None:
    """Whether the tokens say something else than the text that was recorded; in doubt they do not.

    Not looked at: answers without text, with tool calls or where tools were offered (a parser may hold text back), and
    those of which the request kept the special tokens. White space and broken characters are passed over. A text may
    be the end of what was sampled (its reasoning went before), or its beginning where a stop string cut it off.
    """
    request = response.request
    if choice.tool_calls or request.get("tools") or request.get("skip_special_tokens") is False:
        return None
    recorded = _bare(choice.text)
    if _bare(decoded).endswith(recorded):
        return None
    if choice.finish_reason == "stop":
        if (response.sampling.stop or request.get("stop_token_ids")) and _bare(decoded).startswith(recorded):
            return None
        if _bare(decode(choice.token_ids[:-1])).endswith(recorded):  # an end token that is not marked as special
            return None
    return f"the tokenizer has changed: the tokens say {_short(decoded)}, and {_short(choice.text)} was recorded"


def _is_text(response: ResponseGenerated, choice: Choice, decoded: str) -> bool:
    """Whether the answer is the assistant's whole turn and nothing but text, so that another text could replace it."""
    request = response.request
    return (
        response.endpoint == "chat.completions"
        and not choice.tool_calls
        and not request.get("continue_final_message")
        and request.get("add_generation_prompt") is not False
        and bool(_bare(choice.text))
        and _bare(decoded).startswith(_bare(choice.text))
    )


def _bare(text: str) -> str:
    """Without white space, and without U+FFFD: what is left of a character that was cut in two."""
    return "".join(text.replace("\ufffd", "").split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def one_tenth(prompt: list[int]) -> bool:
    """Whether a prompt falls into the tenth that is kept for measuring: by its hash, so always the same ones."""
    return hashlib.sha256(array("q", prompt).tobytes()).digest()[0] < 26  # 26/256, a tenth
