"""The last layer leaves out what nobody reads, and nothing else changes."""

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from learner import attention, tail
from learner.logprobs import Row, completion_hidden
from tests.learner.conftest import tiny

ROWS = [Row([2, 3, 4, 5], [6, 7]), Row([2, 3, 4, 5], [8]), Row([9], [10, 11, 12])]


def model(short: bool, dtype: torch.dtype = torch.float64) -> Any:
    made = tiny(dtype)
    attention.install(made)
    if short:
        tail.install(made)
    return made


def test_hidden_states_and_gradients_are_those_of_the_whole_layer() -> None:
    ours, theirs = model(short=True), model(short=False)
    assert tail.installed(ours)
    assert not tail.installed(theirs)
    found = []
    for each in (ours, theirs):
        hidden = completion_hidden(each, ROWS)
        loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
        found.append([hidden, *torch.autograd.grad(loss, list(each.base_model.parameters()))])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)  # transformers' norms compute in fp32


def test_its_feed_forward_part_reads_the_wanted_positions_alone() -> None:
    ours = model(short=True)
    seen: list[int] = []
    for layer in ours.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    completion_hidden(ours, ROWS)
    # A prompt that two answers share is read once: 4 + 1 + 0 and 1 + 2 tokens; 2, 1 and 3 are predicted.
    assert seen == [8] * (len(seen) - 1) + [6]


def test_without_wanted_positions_it_is_transformers_own() -> None:
    ids = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
    assert torch.equal(model(short=True)(ids).logits, model(short=False)(ids).logits)


def test_other_layers_and_other_attention_are_left_alone() -> None:
    class Other(LlamaDecoderLayer):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
            return hidden_states

    made = model(short=False)
    made.base_model.layers[-1].__class__ = Other
    tail.install(made)
    assert not tail.installed(made)
    bare = tiny()
    tail.install(bare)
    assert not tail.installed(bare), "it needs attention by tiles"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpointing_keeps_it(dtype: torch.dtype) -> None:
    from learner.activations import checkpointing

    made = model(short=True, dtype=dtype)
    expected = completion_hidden(made, ROWS)
    checkpointing(made, on=True)
    again = completion_hidden(made, ROWS)
    assert torch.equal(again, expected)
    assert again.requires_grad
    checkpointing(made, on=False)
    assert tail.installed(made)
