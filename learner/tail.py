"""The last decoder layer, past its attention's mixing only at the positions that somebody reads.

Every position's keys and values are needed there; what the layer makes of the others is not. In a chat most positions
are the prompt's, and for them this leaves out the layer's output projection and its feed-forward part.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from learner import attention, fused


class Tail(LlamaDecoderLayer):  # type: ignore[misc]
    """transformers' layer with another forward."""

    def forward(self, hidden_states: Tensor, wanted: Tensor | None = None, **options: Any) -> Any:
        """1 × tokens × width → 1 × wanted positions × width; all of them where none is named."""
        if wanted is None:
            return super().forward(hidden_states, **options)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), only=wanted, **options)
        chosen = torch.index_select(hidden_states, 1, wanted) + attended
        return chosen + self.mlp(self.post_attention_layernorm(chosen))


def install(model: Any) -> None:
    """Let the last layer compute as described above, in a model that attends by tiles and is made as Llama is."""
    layers = getattr(model.base_model, "layers", None)
    if not attention.installed(model) or not layers:
        return
    if fused.alike(layers[-1], LlamaDecoderLayer) and fused.alike(layers[-1].self_attn, LlamaAttention):
        layers[-1].__class__ = Tail


def installed(model: Any) -> bool:
    """Whether the model takes `wanted` positions and gives the hidden states of no others."""
    return any(type(module) is Tail for module in model.modules())
