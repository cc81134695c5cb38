"""What may be learned from, and the reason for the rest."""

import math
from typing import Any

import pytest

from learner.admission import HELD_OUT, admit, one_tenth
from tests.learner.conftest import VOCABULARY, Letters, respond
from thumbwheel.events import Choice, Sampling


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
        ({"choices": choice(logprobs=[-1.0, -math.inf])}, "not a number"),
        ({"choices": choice(logprobs=[-1.0, math.inf])}, "not a number"),
        ({"choices": choice(logprobs=[-1.0, 0.3])}, "a log-prob is 0.3, and none is above 0"),
        ({"choices": choice(token_ids=[4, VOCABULARY])}, f"token id {VOCABULARY} is outside"),
        ({"choices": choice(token_ids=[4, -1])}, "token id -1 is outside"),
        ({"prompt_token_ids": [[2, 99]]}, "token id 99 is outside"),
        ({"choices": choice(prompt_index=1)}, "no prompt token ids"),
    ],
)
def test_what_must_not_be_learned_says_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(problem(**changes))


def test_a_log_prob_may_be_zero_give_or_take_a_rounding() -> None:
    assert problem(choices=choice(logprobs=[0.0, 1e-6])) is None


def says(text: str, decoded: str = "hello there", **changes: Any) -> str | None:
    """The problem of an answer of which this text was recorded, while its tokens say something."""
    named = {name: changes.pop(name) for name in ("finish_reason", "tool_calls") if name in changes}
    spoken = respond("a", choices=choice(text=text, **named), **changes)
    (answer,) = admit(spoken, VOCABULARY, lambda prompt: False, lambda ids: decoded)
    return answer.problem


STOP = {"finish_reason": "stop", "sampling": Sampling(stop=["there"])}


@pytest.mark.parametrize(
    ("text", "decoded", "changes"),
    [
        ("hello there", "hello there", {}),
        ("", "hello there", {}),
        (" hello  there\n", "hello there", {}),
        ("hello", "hello there", STOP),
        ("hello", "hello there", {"finish_reason": "stop", "request": {"stop_token_ids": [9]}}),
        ("there", "I greet them. </think> hello there", {}),
        ("hello", "hello \ufffd", {"finish_reason": "length"}),
        ("hello \ufffd", "hello", {"finish_reason": "length"}),
        ("\ufffd", "x", {}),
        ("calls", "<tool>calls</tool>", {"tool_calls": [{"id": "1"}]}),
        ("calls", "calls <tool>", {"request": {"tools": [{"type": "function"}]}}),
        ("<s>hello", "hello", {"request": {"skip_special_tokens": False}}),
    ],
)
def test_sound_texts_are_admitted(text: str, decoded: str, changes: dict[str, Any]) -> None:
    assert says(text, decoded, **changes) is None


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("goodbye", {}),
        ("goodbye", STOP),
        ("hello", {"finish_reason": "stop"}),
        ("hello", {"finish_reason": "length", "sampling": Sampling(stop=["there"])}),
        ("hello there!", {}),
        ("HELLO THERE", {}),
    ],
)
def test_tokens_that_do_not_say_what_was_recorded_were_made_by_another_tokenizer(
    text: str, changes: dict[str, Any]
) -> None:
    assert "the tokenizer has changed" in str(says(text, **changes))


def test_an_end_token_that_is_not_marked_as_special_is_no_change() -> None:
    spoken = respond("a", choices=choice(text="d", finish_reason="stop", token_ids=[5, 6]))
    assert [a.problem for a in admit(spoken, VOCABULARY, lambda prompt: False, Letters().decode)] == [None]


def test_a_held_out_prompt_whose_answer_was_made_by_another_tokenizer_measures_nothing() -> None:
    spoken = respond("a", choices=choice(text="hello"))
    (answer,) = admit(spoken, VOCABULARY, lambda prompt: True, Letters().decode)
    assert "the tokenizer has changed" in str(answer.problem)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "cd"),
        ({"choices": choice(text="cd", tool_calls=[{"id": "1"}])}, None),
        ({"choices": choice(text="d")}, None),  # the end of what was sampled: reasoning went before
        ({"choices": choice(text="")}, None),
        ({"endpoint": "completions"}, None),
        ({"request": {"continue_final_message": True}}, None),
        ({"request": {"add_generation_prompt": False}}, None),
        ({"choices": choice(text="xy")}, None),
    ],
)
def test_only_a_whole_turn_of_text_may_be_replaced_by_another(changes: dict[str, Any], text: str | None) -> None:
    spoken = respond("a", **{"choices": choice(text="cd"), **changes})
    (answer,) = admit(spoken, VOCABULARY, lambda prompt: False, Letters().decode)
    assert answer.text == text


def test_held_out_prompts_are_not_learned() -> None:
    (answer,) = admit(respond("a", [7, 7]), VOCABULARY, lambda prompt: prompt == [7, 7])
    assert answer.problem == HELD_OUT


def test_a_tenth_of_the_prompts_is_held_out_always_the_same() -> None:
    prompts = [[i, i + 1, 3] for i in range(4000)]
    kept = [prompt for prompt in prompts if one_tenth(prompt)]
    assert 320 < len(kept) < 480
    assert kept == [prompt for prompt in prompts if one_tenth(list(prompt))]
