"""What a forward pass keeps for backward, and recomputing it instead where memory asks for that.

Checkpointing keeps each layer's input and computes the layer again in backward: a third more work. transformers does it
only for a model in training mode, which turns dropout on; here the mode is left alone.
"""

from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from learner.logprobs import BLOCK, Row, completion_hidden

PROBE = 64
"""Tokens of the forward pass by which a model is measured."""
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")

_measured: "WeakKeyDictionary[Any, float]" = WeakKeyDictionary()


def checkpointing(model: Any, on: bool) -> None:
    """Recompute each decoder layer of a transformers model in backward, or keep what it needs. Idempotent."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.__dict__.pop("forward", None)
            if on:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def needs_checkpointing(model: Any, tokens: int) -> bool:
    """Whether a forward pass over `tokens` tokens would keep more than what is free; half of that is left to the rest.

    The model is measured once, by a pass over a few tokens, with checkpointing off (it is left off).
    """
    if model not in _measured:
        checkpointing(model, on=False)
        _measured[model] = kept(model, PROBE) / PROBE
    logits = 3 * 4 * min(BLOCK, int(model.get_output_embeddings().weight.shape[0]))
    return tokens * (_measured[model] + logits) > free(model.device) / 2


def kept(model: Any, tokens: int) -> int:
    """Bytes that a forward pass over one row keeps for backward, the model's weights not among them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = completion_hidden(model, [Row([0] * tokens, [0])])
    del alive
    return sum(sizes.values())


def free(device: torch.device) -> float:
    """Bytes that may still be used: of a GPU, or of this process's machine and cgroups. Infinite where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    left = [float("inf")]
    if (PROC / "meminfo").exists():
        left.append(_numbers(PROC / "meminfo")["MemAvailable:"] * 1024)
    if (PROC / "self/cgroup").exists():
        for line in (PROC / "self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = CGROUPS / line.removeprefix("0::/")
                groups = [own, *own.parents][: len(own.relative_to(CGROUPS).parts) + 1]
                left += [each for each in map(_unused, groups) if each is not None]
    return min(left)


def _unused(cgroup: Path) -> float | None:
    """Of a cgroup's limit; cached files count as unused. None where it has no limit."""
    limit = cgroup / "memory.max"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return None
    used = int((cgroup / "memory.current").read_text())
    return float(int(most) - used + _numbers(cgroup / "memory.stat")["inactive_file"])


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}
