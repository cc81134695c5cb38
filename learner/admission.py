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


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a response: token ids, and why it must not be learned from (None: it may)."""

    choice_index: int
    prompt: list[int]
    completion: list[int]
    problem: str | None


def admit(response: ResponseGenerated, vocabulary: int, held_out: Callable[[list[int]], bool]) -> list[Answer]:
    """The answers of a response, each admitted or not. `vocabulary` is the number of tokens that the model knows."""
    return [_admit_choice(response, choice, vocabulary, held_out) for choice in response.choices]


def _admit_choice(
    response: ResponseGenerated, choice: Choice, vocabulary: int, held_out: Callable[[list[int]], bool]
) -> Answer:
    prompts = response.prompt_token_ids
    prompt = prompts[choice.prompt_index] if 0 <= choice.prompt_index < len(prompts) else []
    problem = _response_problem(response) or _ids_problem(prompt, choice, vocabulary)
    if problem is None and held_out(prompt):
        problem = HELD_OUT
    return Answer(choice.index, prompt, choice.token_ids, problem)


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
    strange = next((id for id in (*prompt, *choice.token_ids) if not 0 <= id < vocabulary), None)
    if strange is not None:
        return f"token id {strange} is outside the vocabulary of {vocabulary}: another base model sampled it"
    return None


def one_tenth(prompt: list[int]) -> bool:
    """Whether a prompt falls into the tenth that is kept for measuring: by its hash, so always the same ones."""
    return hashlib.sha256(array("q", prompt).tobytes()).digest()[0] < 26  # 26/256, a tenth
