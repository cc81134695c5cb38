"""LoRA's linear layer as one operation: it computes in the model's dtype and its weights stay in fp32.

peft casts the layer's input to the adapter's dtype, multiplies in fp32 and adds the two results in further passes. Here
A and B are cast instead, which are small, and B A x is added in place to W x. What is kept for backward is the input,
which q, k and v share, and A x. peft still makes, saves, loads and switches adapters; only `forward` is replaced, and
only where it is plain LoRA with one adapter active: anything else goes peft's own way.

In fp32 and fp64 this is what peft computes, to rounding. In bf16 A and B are rounded, to what vLLM serves them as, too;
their gradients are summed over tokens in fp32 inside one multiplication, and rounded once before they are added to the
fp32 gradient.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def install(model: Any) -> None:
    """Let every plain LoRA layer in `model` compute as described above."""
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is torch.nn.Linear:
            module.__class__ = FusedLinear


class FusedLinear(Linear):  # type: ignore[misc]
    """peft's layer with another forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._only_adapter(x)
        if name is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        fused: Tensor = _Fused.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return fused

    def _only_adapter(self, x: Tensor) -> str | None:
        """The active adapter, where there is one, it is plain and it computes in the base's dtype."""
        if self.disable_adapters or self.merged or torch.is_autocast_enabled(x.device.type):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or x.dtype != self.get_base_layer().weight.dtype:
            return None
        name: str = active[0]
        dropout = self.lora_dropout[name]
        plain = name not in self.lora_variant and not self.lora_bias[name] and not self.fan_in_fan_out
        return name if plain and (isinstance(dropout, torch.nn.Identity) or not self.training) else None


class _Fused(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ; W is frozen. Shapes: x … × in, W out × in, A rank × in, B out × rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low_a, low_b = a.to(x.dtype), (b * scale).to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ low_a.t()  # tokens × rank
        y = functional.linear(rows, weight, bias).addmm_(inner, low_b.t())
        ctx.save_for_backward(x, weight, low_a, low_b, inner)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low_a, low_b, inner = ctx.saved_tensors
        dy = outputs[0].reshape(-1, weight.shape[0])
        d_inner = dy @ low_b
        dx = (dy @ weight).addmm_(d_inner, low_a).view(x.shape) if ctx.needs_input_grad[0] else None
        da = (d_inner.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
        # In this order the small side comes first, which is twice as fast on a CPU.
        db = (inner.t() @ dy).t().to(ctx.dtypes[1], memory_format=torch.contiguous_format).mul_(ctx.scale)
        return dx, None, None, da, db, None
