"""The fused layer is peft's layer, and everything that is not plain goes peft's own way."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor

from learner import lora
from tests.learner.conftest import tiny

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])


def adapted(dtype: torch.dtype = torch.float64, fused: bool = True, **options: Any) -> Any:
    """The tiny model with an adapter that is far from zero, and the same one whichever way it computes."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": MODULES, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(tiny(dtype), config)
    if dtype == torch.float64:
        model.double()
    fill(model)
    if fused:
        lora.install(model)
    return model.eval()


def fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(model: Any, loss: Tensor) -> Iterator[tuple[str, Tensor]]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_it_is_pefts_forward_and_gradient(dtype: torch.dtype, error: float) -> None:
    ours, theirs = adapted(dtype), adapted(dtype, fused=False)
    a, b = ours(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(a, b, rtol=error, atol=error)
    for (name, mine), (other_name, other) in zip(
        gradients(ours, a.square().sum()), gradients(theirs, b.square().sum()), strict=True
    ):
        assert name == other_name
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=error, atol=error * other.abs().max().item())


def test_finite_differences_agree() -> None:
    x, weight, bias, a, b = (
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for each in (x, a, b):
        each.requires_grad_()

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Any:
        return lora._Fused.apply(x, weight, bias, a, b, 1.5)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(fused, (x, a, b))


def test_layers_that_read_the_same_go_together_adapted_or_not() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    weights = [torch.randn(out, 5, dtype=torch.float64) for out in (4, 6, 3)]
    bias = torch.randn(6, dtype=torch.float64)
    a, b, c, d = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (4, 2), (1, 5), (3, 1)))
    for each in (x, a, b, c, d):
        each.requires_grad_()

    def together(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        parts = (weights[0], None, a, b, 1.5), (weights[1], bias, None, None, 1.0), (weights[2], None, c, d, 0.5)
        return lora._Fused.apply(x, *(each for part in parts for each in part))  # type: ignore[no-untyped-call]

    found = together(x, a, b, c, d)
    torch.testing.assert_close(found[0], x @ weights[0].t() + 1.5 * x @ a.t() @ b.t())
    torch.testing.assert_close(found[1], x @ weights[1].t() + bias)
    torch.testing.assert_close(found[2], x @ weights[2].t() + 0.5 * x @ c.t() @ d.t())
    assert torch.autograd.gradcheck(together, (x, a, b, c, d))


def test_a_layer_that_something_is_hooked_on_is_called() -> None:
    def itself(layer: Any) -> Any:
        return layer

    for which in (itself, Linear.get_base_layer):
        model = adapted()
        attention = model.base_model.model.model.layers[0].self_attn
        layers = (attention.q_proj, attention.k_proj)
        x = torch.randn(3, layers[0].in_features, dtype=torch.float64)
        before = lora.project(x, layers)
        hooked: Any = which(layers[1])
        hooked.register_forward_hook(lambda *seen: seen[-1] + 1)
        after = lora.project(x, layers)
        torch.testing.assert_close(after[0], before[0])
        torch.testing.assert_close(after[1], before[1] + 1)


def test_a_bias_of_the_base_counts_and_the_base_is_not_written_to() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(5, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"]))
    fill(model)
    x = torch.randn(4, 5)
    expected = model(x)
    lora.install(model)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.base_model.model[0].base_layer.bias, before["0.bias"])
    assert torch.equal(model.base_model.model[0].base_layer.weight, before["0.weight"])


def test_weights_and_gradients_are_fp32_over_a_bf16_base() -> None:
    model = adapted(torch.bfloat16)
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    named = dict(gradients(model, logits.float().sum()))
    assert {each.dtype for each in named.values()} == {torch.float32}
    assert all(each.is_contiguous() for each in named.values())


def test_bf16_is_as_near_to_fp32_as_pefts_is() -> None:
    """Forward and gradient, with an adapter whose share in a layer's output is about a tenth."""

    def run(dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor]:
        model = adapted(torch.bfloat16, fused=fused, lora_alpha=1.5)  # the base's weights are rounded in all three
        model.to(dtype)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        fill(model)
        ids = torch.randint(2, 32, (64, 24), generator=torch.Generator().manual_seed(0))
        logprobs = model(ids).logits.float().log_softmax(-1)
        return logprobs.detach(), torch.cat([g.flatten() for _, g in gradients(model, logprobs[..., 3].sum())])

    exact, ours, theirs = run(torch.float32, False), run(torch.bfloat16, True), run(torch.bfloat16, False)
    for truth, mine, other in zip(exact, ours, theirs, strict=True):
        assert 0 < (mine - truth).norm() < 1.15 * (other - truth).norm()


def test_disabled_it_is_the_base() -> None:
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny(torch.float64)(IDS).logits)
    assert not torch.equal(model(IDS).logits, tiny(torch.float64)(IDS).logits)


def test_the_active_adapter_counts_and_two_at_once_go_pefts_way() -> None:
    ours, theirs = adapted(), adapted(fused=False)
    for model in (ours, theirs):
        model.add_adapter("second", LoraConfig(r=2, target_modules=MODULES, task_type="CAUSAL_LM"))
        model.double()
        fill(model)
    lora.install(ours)
    seen = []
    for names in (["default"], ["second"], ["default", "second"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(names)
        seen.append(ours(IDS).logits)
        torch.testing.assert_close(seen[-1], theirs(IDS).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(seen[0], seen[1])


def test_what_is_not_plain_lora_goes_pefts_way() -> None:
    ours, theirs = adapted(use_dora=True), adapted(fused=False, use_dora=True)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-12)


def test_dropout_is_pefts_while_training_and_nothing_after() -> None:
    ours, theirs = adapted(lora_dropout=0.5), adapted(fused=False, lora_dropout=0.5)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-12)
    logits = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        logits.append(model.train()(IDS).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
    assert not torch.allclose(logits[0], ours.eval()(IDS).logits)


def test_autocast_is_pefts() -> None:
    ours, theirs = adapted(torch.float32), adapted(torch.float32, fused=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_without_gradient_and_in_inference_mode_it_is_the_same() -> None:
    model = adapted()
    expected = model(IDS).logits
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(IDS).logits, expected)


def test_pefts_class_is_left_alone() -> None:
    adapted()
    assert Linear.forward is not lora.FusedLinear.forward
    assert type(adapted(fused=False).base_model.model.model.layers[0].self_attn.q_proj) is Linear
