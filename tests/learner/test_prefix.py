"""What all prompts begin with is read once an update, and no number is another for that."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner import attention, compute, prefix
from learner.algorithm import Algorithm
from learner.compute import Compute
from learner.logprobs import Row, completion_hidden
from learner.policy import Policy
from learner.prefix import PAYS, Prefix, beginning
from tests.learner.conftest import move, tiny
from tests.learner.making import SYSTEM, VARIANTS, Made, change, examples_for
from thumbwheel.settings import LearnerSettings, Settings


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 80))
def test_the_beginning_is_the_longest_that_leaves_each_prompt_a_token(rests: list[list[int]], same: int) -> None:
    prompts = [[7] * same + rest for rest in rests]
    found = beginning(prompts)
    distinct = {tuple(prompt) for prompt in prompts}
    if not found:
        longest = next(
            i for i in range(90) if i + 1 >= min(map(len, prompts)) or len({p[: i + 1] for p in distinct}) > 1
        )
        assert longest * (len(distinct) - 1) < PAYS
        return
    assert all(prompt[: len(found)] == found for prompt in prompts)
    assert len(found) * (len(distinct) - 1) >= PAYS
    more = {prompt[: len(found) + 1] for prompt in distinct}
    assert len(more) > 1 or min(map(len, prompts)) == len(found) + 1


def test_one_prompt_is_no_beginning() -> None:
    assert beginning([[3] * 500] * 9) == []


@pytest.mark.parametrize("chosen", [["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj"]])
def test_rows_read_after_their_beginning_are_rows_read_whole(settings: Settings, chosen: list[str]) -> None:
    """In fp64: hidden states, and the gradient of every weight, in two parts that both come after it."""
    settings = settings.model_copy(update={"learner": change(settings.learner, target_modules=chosen)})
    policy = Policy(tiny(torch.float64), settings, "sha256:test")
    for parameter in policy.parameters():
        parameter.data = parameter.data.double()
    move(policy, 0.3)
    rows = [Row([*SYSTEM, 2, 3], [4, 5, 1]), Row([*SYSTEM, 6], [9]), Row([*SYSTEM, 2, 3], [8, 9, 1])]
    whole = completion_hidden(policy.model, rows)
    slope = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64).view_as(whole)
    expected = torch.autograd.grad((whole * slope).sum(), policy.parameters())

    read = Prefix(policy.model, SYSTEM)
    assert read.length == len(SYSTEM)
    total = [torch.zeros_like(parameter) for parameter in policy.parameters()]
    back = [torch.zeros_like(leaf) for leaf in read.leaves]
    at = 0
    for part in (rows[:2], rows[2:]):
        hidden = completion_hidden(policy.model, part, read)
        its = slice(at, at := at + len(hidden))
        torch.testing.assert_close(hidden, whole[its], rtol=0, atol=1e-12)
        slopes = torch.autograd.grad((hidden * slope[its]).sum(), [*policy.parameters(), *read.leaves])
        for sum_, more in zip([*total, *back], slopes, strict=True):
            sum_ += more
    for sum_, last in zip(total, read.gradient(back, policy.parameters()), strict=True):
        sum_ += 0 if last is None else last
    for mine, other in zip(total, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_a_model_that_attends_through_transformers_interface_reads_it_once_too() -> None:
    """Qwen3 norms queries and keys, so that its layers stay its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).double().eval()
    attention.install(model)
    assert attention.installed(model)
    assert not any("forward" in vars(layer.self_attn) for layer in model.model.layers)
    rows = [Row([*SYSTEM, 2, 3], [4, 5, 1]), Row([*SYSTEM, 6], [9, 1])]
    weights = list(model.parameters())
    found = []
    for prefix_ in (None, Prefix(model, SYSTEM)):
        hidden = completion_hidden(model, rows, prefix_)
        slope = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
        leaves = [] if prefix_ is None else prefix_.leaves
        slopes = torch.autograd.grad((hidden * slope).sum(), [*weights, *leaves], allow_unused=True)
        last = (None,) * len(weights) if prefix_ is None else prefix_.gradient(slopes[len(weights) :], weights)
        sums = [sum(x for x in both if x is not None) for both in zip(slopes[: len(weights)], last, strict=True)]
        found.append([hidden, *(each for each in sums if isinstance(each, torch.Tensor))])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)  # its norms go through fp32


def test_tiles_after_a_beginning_are_shorter_by_what_keeps_their_keys_aligned() -> None:
    (made,) = attention.spans([[300, 20]], known=23)
    assert [tile.stop - tile.start for tile in made.tiles] == [121, 128, 71]
    assert all((23 + tile.stop - made.start) % attention.ALIGN == 0 for tile in made.tiles[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_is_the_same_with_its_beginning_read_once(
    settings: Settings, variant: str, recomputing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every algorithm, with and without activations that are computed again."""
    monkeypatch.setattr(compute, "needs_checkpointing", lambda model, tokens: recomputing)
    monkeypatch.setattr(compute, "PART_TOKENS", 8)
    learner: LearnerSettings = change(settings.learner, fresh={"epochs": 1, "minibatches": 1}, **VARIANTS[variant])
    policy = Policy(tiny(), settings, "sha256:test")
    lengths: list[int] = []

    class Seen(Prefix):
        def __init__(self, model: Any, ids: list[int]) -> None:
            super().__init__(model, ids)
            lengths.append(self.length)

    monkeypatch.setattr(compute, "Prefix", Seen)
    found = []
    for pays in (10**9, 1):
        monkeypatch.setattr(prefix, "PAYS", pays)
        policy.start(None)
        made = Made(policy, learner)
        for _ in range(2):  # the second with an adapter that changes something
            made.trainer.update(examples_for(made, SYSTEM))
        found.append(policy.weights())
        assert bool(lengths) == (pays == 1)
    assert set(lengths) == {len(SYSTEM)}
    for name, weights in found[1].items():
        torch.testing.assert_close(weights, found[0][name], rtol=0, atol=2e-5, msg=name)


def test_a_beginning_is_read_once_however_many_parts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "READ_TOKENS", 1)
    policy = Policy(tiny(), settings, "sha256:test")
    seen: list[int] = []
    policy.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    rows = [Row([*SYSTEM, i], [4, 5, 1]) for i in range(2, 8)]
    Compute(policy, Algorithm(LearnerSettings(), policy.width)).read(rows)
    assert sorted(seen) == [1 + 2] * 6 + [len(SYSTEM)]
