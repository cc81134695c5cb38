"""What may be learned from, and the reason for the rest."""

import math
from typing import Any

import pytest

from learner.admission import HELD_OUT, admit, one_tenth
from tests.learner.conftest import VOCABULARY, respond
from thumbwheel.events import Choice


def problem(**changes: Any) -> str | None:
    (answer,) = admit(respond("a", **changes), VOCABULARY, lambda prompt: False)
    return answer.problem


def choice(**changes: Any) -> list[Choice]:
    return [Choice(index=0, **{"token_ids": [4, 5], "logprobs": [-1.0, -1.0], **changes})]


def test_a_sound_answer_is_admitted() -> None:
    assert problem() is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"untrainable": "the reasoning is withheld"}, "untrainable: the reasoning"),
        ({"outcome": "client_disconnected"}, "client_disconnected"),
        ({"prompt_token_ids": []}, "no prompt token ids"),
        ({"choices": choice(token_ids=[], logprobs=[])}, "empty"),
        ({"choices": choice(logprobs=[-1.0])}, "1 log-probs for 2 tokens"),
        ({"choices": choice(logprobs=[-1.0, None])}, "not a number"),
        ({"choices": choice(logprobs=[-1.0, math.nan])}, "not a number"),
        ({"choices": choice(logprobs=[-1.0, -9999.0])}, "missing"),
        ({"choices": choice(token_ids=[4, VOCABULARY])}, f"token id {VOCABULARY} is outside"),
        ({"choices": choice(token_ids=[4, -1])}, "token id -1 is outside"),
        ({"prompt_token_ids": [[2, 99]]}, "token id 99 is outside"),
        ({"choices": choice(prompt_index=1)}, "no prompt token ids"),
    ],
)
def test_what_must_not_be_learned_says_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(problem(**changes))


def test_held_out_prompts_are_not_learned() -> None:
    (answer,) = admit(respond("a", [7, 7]), VOCABULARY, lambda prompt: prompt == [7, 7])
    assert answer.problem == HELD_OUT


def test_a_tenth_of_the_prompts_is_held_out_always_the_same() -> None:
    prompts = [[i, i + 1, 3] for i in range(4000)]
    kept = [prompt for prompt in prompts if one_tenth(prompt)]
    assert 320 < len(kept) < 480
    assert kept == [prompt for prompt in prompts if one_tenth(list(prompt))]
