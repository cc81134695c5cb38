"""Norms and gated layers in one operation are what transformers computes, and nothing else is replaced."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from learner import fused
from tests.learner.conftest import tiny

IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])


def frozen(dtype: torch.dtype, on: bool) -> Any:
    model = tiny(dtype).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.weight.copy_(torch.linspace(0.5, 2, len(module.weight)))
    if on:
        fused.install(model)
    return model


def read(model: Any, embedded: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states, and what their squares' sum says to the embedded tokens."""
    embedded = embedded.detach().clone().requires_grad_()
    states = model.base_model(inputs_embeds=embedded).last_hidden_state
    return states, torch.autograd.grad(states.float().square().sum(), embedded)[0]


def test_it_is_transformers_forward_and_gradient() -> None:
    ours, theirs = frozen(torch.float32, True), frozen(torch.float32, False)
    embedded = theirs.get_input_embeddings()(IDS)
    for mine, other in zip(read(ours, embedded), read(theirs, embedded), strict=True):
        assert not torch.equal(other, torch.zeros_like(other))
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_in_bf16_it_is_as_near_to_fp32_as_transformers_is() -> None:
    torch.manual_seed(0)
    norm, x, slope = LlamaRMSNorm(64).requires_grad_(False), torch.randn(300, 64), torch.randn(300, 64)
    norm.weight.copy_(torch.randn(64))
    norm.bfloat16()
    x, slope = (each.bfloat16() for each in (x, slope))

    def error(mine: Any, dtype: torch.dtype) -> list[Tensor]:
        point = x.to(dtype).requires_grad_()
        y = mine(norm.to(dtype), point)
        return [y.detach().double(), torch.autograd.grad(y, point, slope.to(dtype))[0].double()]

    exact = error(fused.norm, torch.float64)
    theirs, ours = error(LlamaRMSNorm.forward, torch.bfloat16), error(fused.norm, torch.bfloat16)
    for true, other, mine in zip(exact, theirs, ours, strict=True):
        assert 0 < (mine - true).abs().mean() <= (other - true).abs().mean()


def test_finite_differences_agree() -> None:
    x, gate, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(5, dtype=torch.float64)

    def norm(x: Tensor) -> Any:
        return fused._Norm.apply(x, weight, 1e-2)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(fused._Gated.apply, (gate, up))


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_values_are_the_same(quiet: Any) -> None:
    model = frozen(torch.bfloat16, True)
    embedded = model.get_input_embeddings()(IDS)
    with quiet():
        states = model.base_model(inputs_embeds=embedded).last_hidden_state
    assert torch.equal(states, read(model, embedded)[0])


def test_what_goes_in_is_not_written_to() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, gate, up = (torch.randn(3, 4, dtype=dtype) for _ in range(3))
        before = [each.clone() for each in (x, gate, up)]
        fused._Norm.apply(x, torch.ones(4, dtype=dtype), 1e-6)  # type: ignore[no-untyped-call]
        fused._Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        assert all(torch.equal(*each) for each in zip(before, (x, gate, up), strict=True))


@pytest.mark.parametrize("alike", [LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm])
def test_norms_that_compute_as_llamas_are_recognized(alike: Any) -> None:
    assert fused.alike(alike(4), LlamaRMSNorm)


@pytest.mark.parametrize("alike", [LlamaMLP, Qwen2MLP, Qwen3MLP, MistralMLP])
def test_gated_layers_that_compute_as_llamas_are_recognized(alike: Any) -> None:
    assert fused.alike(alike(tiny().config), LlamaMLP)


def test_other_modules_are_left_alone() -> None:
    class Trained(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return torch.zeros_like(hidden_states)

    model = tiny()
    for layer in model.base_model.layers:
        layer.input_layernorm = Trained(16)
        layer.post_attention_layernorm = GemmaRMSNorm(16)
        layer.mlp.act_fn = torch.nn.GELU()
    fused.install(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["model.norm"]
