"""Linear layers with LoRA as one operation: it computes in the model's dtype and its weights stay in fp32.

peft casts the layer's input to the adapter's dtype, multiplies in fp32 and adds the two results in further passes. Here
A and B are cast instead, which are small, and B A x is added in place to W x. Layers that read the same input (q, k and
v; gate and up) go together (`project`): their As are one matrix, and backward adds up one gradient of the input. What
is kept for backward is the input, and A x. peft still makes, saves, loads and switches adapters; only `forward` is
replaced, and only where it is plain LoRA with one adapter active: anything else goes peft's own way.

In fp32 and fp64 this is what peft computes, to rounding. In bf16 A and B are rounded, to what vLLM serves them as, too;
their gradients are summed over tokens in fp32 inside one multiplication, and rounded once before they are added to the
fp32 gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_Part = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]
"""Of one layer: W, bias, and where it has an adapter A, B and the scale."""


def install(model: Any) -> None:
    """Let every plain LoRA layer in `model` compute as described above."""
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is torch.nn.Linear:
            module.__class__ = FusedLinear


def project(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """What each of some linear layers makes of x, … × in; as one operation where all of them are plain."""
    parts = [_part(layer, x) for layer in layers]
    if None in parts:
        return tuple(layer(x) for layer in layers)
    made: tuple[Tensor, ...] = _Fused.apply(x, *(each for part in parts if part for each in part))  # type: ignore[no-untyped-call]
    return made


def _part(layer: Any, x: Tensor) -> _Part | None:
    """What a plain layer computes with; None for one that has to be called."""
    if layer._forward_hooks or layer._forward_pre_hooks or torch.is_autocast_enabled(x.device.type):
        return None
    if type(layer) is torch.nn.Linear:
        return None if layer.weight.requires_grad else (layer.weight, layer.bias, None, None, 1.0)
    if not isinstance(layer, FusedLinear) or layer.merged:
        return None
    base = _part(layer.get_base_layer(), x)
    if base is None or layer.disable_adapters:
        return base
    name = layer.only_adapter(x)
    if name is None:
        return None
    return (*base[:2], layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


class FusedLinear(Linear):  # type: ignore[misc]
    """peft's layer with another forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part = None if args or kwargs else _part(self, x)
        if part is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        fused: tuple[Tensor] = _Fused.apply(x, *part)  # type: ignore[no-untyped-call]
        return fused[0]

    def only_adapter(self, x: Tensor) -> str | None:
        """The active adapter, where there is one, it is plain and it computes in the base's dtype."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or x.dtype != self.get_base_layer().weight.dtype:
            return None
        name: str = active[0]
        dropout = self.lora_dropout[name]
        plain = name not in self.lora_variant and not self.lora_bias[name] and not self.fan_in_fan_out
        return name if plain and (isinstance(dropout, torch.nn.Identity) or not self.training) else None


class _Fused(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ for each of some layers, A and B or none; W is frozen.

    Shapes: x … × in, W out × in, A rank × in, B out × rank. Where there is no adapter its rank is 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        parts: list[_Part] = [flat[i : i + 5] for i in range(0, len(flat), 5)]
        rows = x.reshape(-1, x.shape[-1])
        low_as = [x.new_empty(0, rows.shape[1]) if a is None else a.to(x.dtype) for _, _, a, _, _ in parts]
        low_bs = [x.new_empty(len(w), 0) if b is None else (b * s).to(x.dtype) for w, _, _, b, s in parts]
        ctx.ranks = [len(low_a) for low_a in low_as]
        low_a = torch.cat(low_as) if len(low_as) > 1 else low_as[0]
        inner = rows @ low_a.t()  # tokens × all ranks
        results = []
        for (weight, bias, *_), low_b, own in zip(parts, low_bs, torch.split(inner, ctx.ranks, 1), strict=True):
            y = functional.linear(rows, weight, bias)
            results.append((y.addmm_(own, low_b.t()) if low_b.shape[1] else y).view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, low_a, inner, *low_bs, *(weight for weight, *_ in parts))
        ctx.scales = [scale for *_, scale in parts]
        ctx.dtypes = [None if a is None or b is None else (a.dtype, b.dtype) for _, _, a, b, _ in parts]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, low_a, inner, *rest = ctx.saved_tensors
        low_bs, weights = rest[: len(slopes)], rest[len(slopes) :]
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in slopes]
        d_inner = torch.cat([dy @ low_b for dy, low_b in zip(dys, low_bs, strict=True)], 1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            dx = dx.addmm_(d_inner, low_a).view(x.shape)
        das = torch.split(d_inner.t() @ x.reshape(-1, x.shape[-1]), ctx.ranks)
        result: list[Tensor | None] = [dx]
        for dy, own, da, dtypes, scale in zip(
            dys, torch.split(inner, ctx.ranks, 1), das, ctx.dtypes, ctx.scales, strict=True
        ):
            result += [None, None, None, None, None]
            if dtypes is not None:
                # In this order the small side comes first, which is twice as fast on a CPU.
                db = (own.t() @ dy).t().to(dtypes[1], memory_format=torch.contiguous_format).mul_(scale)
                result[-3:-1] = da.to(dtypes[0]), db
        return tuple(result)
