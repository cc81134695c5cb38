"""What all rows of an update begin with, most often the system's words: read once, and not once a row.

Attention is causal, so all that the tokens after it see of it is each layer's keys and values. They are kept, and rows
are read from where they differ. An update's rows are taken in parts; each part yields slopes of these keys and values,
and their sum goes back through the beginning once, at the end. That is the gradient of all rows read whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner import attention

PAYS = 64
"""Tokens that have to be saved: reading a few alone costs a pass over all weights."""


def beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, where reading it once pays; never the whole of one: its last token predicts."""
    distinct = {tuple(prompt) for prompt in prompts}
    first, last = min(distinct), max(distinct)  # in their order all others lie between these
    longest = min(map(len, distinct)) - 1
    same = next((i for i in range(longest) if first[i] != last[i]), longest)
    return list(first[:same]) if same * (len(distinct) - 1) >= PAYS else []


class Prefix:
    """Keys and values of some tokens, layer by layer, in a model that attends by tiles; with gradient if that is on."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        kept: dict[int, attention.Seen] = {}
        model.base_model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.arange(len(ids), device=model.device)[None],
            attention_mask=torch.ones(1, 1, 1, 1),
            use_cache=False,
            spans=attention.spans([[len(ids)]], model.dtype),
            keep=kept,
        )
        seen = [
            tuple(each.detach().requires_grad_(each.requires_grad) for each in kept[layer]) for layer in sorted(kept)
        ]
        self.length = len(ids)
        self.layers: list[attention.Seen] = [(key, value) for key, value in seen]
        self.leaves = [each for layer in self.layers for each in layer if each.requires_grad]
        """Those of `layers` that depend on what is trained: the rows' slopes are to be taken of them."""
        self._read = [each for layer in sorted(kept) for each in kept[layer] if each.requires_grad]

    def gradient(self, slopes: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of `parameters`, from the slopes of the `leaves`; can be had once."""
        back = [slope.to(read.dtype) for read, slope in zip(self._read, slopes, strict=True)]
        return torch.autograd.grad(self._read, parameters, back, allow_unused=True)
