"""RMS norm and SwiGLU as one operation each: fewer passes over memory, and backward keeps what went in, no more.

A norm (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019) keeps its input in the model's dtype and one
number a token, where eager transformers keeps two copies in fp32. A gated layer (Shazeer, "GLU Variants Improve
Transformer", 2020) keeps gate and up and computes silu(gate) again.

For CPUs, where these layers are bound by memory. Installed on modules whose `forward` is, instruction by instruction,
that of transformers' Llama (Qwen and Mistral have it, too); any other module is left alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from learner import lora
from learner.scratch import room

ROWS = 256
"""Tokens that a norm's backward takes at a time: for Llama's small ones what it works with fits in a core's cache."""


def install(model: Any) -> None:
    """Let norms and gated layers in `model` compute as described above, if it is on a CPU."""
    from transformers.activations import SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    if model.device.type != "cpu":
        return
    for module in model.modules():
        if alike(module, LlamaRMSNorm):
            module.forward = partial(norm, module)
        elif alike(module, LlamaMLP) and isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation):
            module.forward = partial(gated, module)


def norm(module: Any, x: Tensor) -> Tensor:
    """LlamaRMSNorm's forward, … × width; its weight must be frozen."""
    result: Tensor = _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return result


def gated(module: Any, x: Tensor) -> Tensor:
    """LlamaMLP's forward, … × width."""
    gate, up = lora.project(x, (module.gate_proj, module.up_proj))
    result: Tensor = module.down_proj(_Gated.apply(gate, up))  # type: ignore[no-untyped-call]
    return result


def alike(module: Any, other: type[torch.nn.Module]) -> bool:
    """Whether a module's `forward` has been compiled to the code of another class's."""
    own = getattr(type(module).forward, "__code__", None)
    code = other.forward.__code__
    return own is not None and all(
        getattr(own, f"co_{x}") == getattr(code, f"co_{x}") for x in ("code", "consts", "names")
    )


def _wide(x: Tensor, number: int) -> Tensor:
    """A copy in fp32, or in fp64, in the room of this number."""
    return room(number, x.shape, torch.promote_types(x.dtype, torch.float32)).copy_(x)


class _Norm(torch.autograd.Function):
    """y = w x / √(mean x² + ε), … × width, in fp32 and rounded once; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x, 0)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.empty_like(x).copy_(wide.mul_(inverse).mul_(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        by_row = [each.reshape(-1, each.shape[-1]).split(ROWS) for each in (dx, outputs[0], x, inverse)]
        for result, dy, rows, scale in zip(*by_row, strict=True):
            slope, wide = _wide(dy, 0).mul_(weight), _wide(rows, 1)
            product = torch.mul(slope, wide, out=room(2, wide.shape, wide.dtype))
            along = product.sum(-1, keepdim=True).mul_(scale**3).div_(x.shape[-1])
            result.copy_(slope.mul_(scale).addcmul_(wide, along, value=-1))
        return dx, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) · up, element by element."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_silu = torch.mul(outputs[0], up, out=room(0, up.shape, up.dtype))
        d_gate = torch.ops.aten.silu_backward(d_silu, gate)
        return d_gate, functional.silu(gate).mul_(outputs[0])
