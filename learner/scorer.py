"""What gives an answer its score: the frozen base with a LoRA adapter of its own, and a linear head.

    s(x, y) = w · h     h: the last hidden state (after the final norm) at the answer's last token

The adapter is not one of peft's: while a score is computed, hooks on the base's linear layers add (α / r) B A x to what
they give, and the policy's adapter is disabled. So the policy is not touched by it, and it costs nothing while it is
not used. The base computes in its own type; adapter, head and scores are fp32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learner.logprobs import Row, buckets, completion_hidden
from learner.policy import Policy
from thumbwheel.errors import AdapterError, SettingsError

HEAD = "head.weight"


class Scorer:
    """Scores rows with parameters of its own. New ones give every answer the score 0."""

    def __init__(
        self, policy: Policy, rank: int, alpha: float, target_modules: Sequence[str], generator: torch.Generator
    ) -> None:
        """`target_modules` are linear layers of the base by the ends of their names, as peft reads them.

        Raises SettingsError where one is of another kind, or there are none.
        """
        self.policy = policy
        self._scale = alpha / rank
        self._layers = _linear_layers(policy.model, target_modules)
        self._parameters: dict[str, torch.nn.Parameter] = {}
        device = policy.device
        for name, layer in self._layers.items():
            bound = layer.in_features**-0.5  # A as peft makes it: uniform, B zero
            a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            self._parameters[f"{name}.lora_A"] = torch.nn.Parameter(a.to(device))
            self._parameters[f"{name}.lora_B"] = torch.nn.Parameter(torch.zeros(layer.out_features, rank).to(device))
        self._parameters[HEAD] = torch.nn.Parameter(torch.zeros(policy.width, device=device))

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained: the adapter's matrices and the head, in an order that does not change."""
        return list(self._parameters.values())

    def weights(self) -> dict[str, Tensor]:
        """A copy of the parameters by name, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put back what `weights` returned. Raises AdapterError where names or shapes differ."""
        if {n: p.shape for n, p in self._parameters.items()} != {n: w.shape for n, w in weights.items()}:
            raise AdapterError("the reward model's weights are of another shape than the base model's layers")
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """The score of each row, fp32, with gradients; one forward pass for all of them, so give it a bucket."""
        # What predicts the token after the last, whatever that is, is the last one's hidden state.
        ends = torch.tensor([len(row.completion) + 1 for row in rows]).cumsum(0) - 1
        with self.policy.reference(), self._hooked():
            hidden = completion_hidden(self.policy.model, [Row(row.prompt, [*row.completion, 0]) for row in rows])
        return hidden[ends.to(hidden.device)].float() @ self._parameters[HEAD]

    @torch.no_grad()
    def score(self, rows: Sequence[Row], progress: Callable[[int], None] = lambda _: None) -> Tensor:
        """The score of each row, on the CPU. `progress` is called with the number of rows just read."""
        scores = torch.zeros(len(rows))
        for bucket in buckets(rows):
            scores[bucket] = self([rows[i] for i in bucket]).cpu()
            progress(len(bucket))
        return scores

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                a, b = (self._parameters[f"{name}.lora_{which}"] for which in "AB")
                handle = layer.register_forward_hook(_Adds(a, b, self._scale))
                stack.callback(handle.remove)
            yield


class _Adds:
    """A forward hook that adds an adapter's part to what a linear layer gives."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, layer: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        inner = functional.linear(x, self.a.to(x.dtype))
        return output + self.scale * functional.linear(inner, self.b.to(x.dtype))


def _linear_layers(model: Any, target_modules: Sequence[str]) -> dict[str, torch.nn.Linear]:
    # peft hides the base's layer under `base_layer` of its own; the name is the one that the layer has without peft.
    found = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
    layers: dict[str, torch.nn.Linear] = {}
    for name, module in found.items():
        if any(name == target or name.endswith(f".{target}") for target in target_modules):
            if not isinstance(module, torch.nn.Linear):
                raise SettingsError(
                    f"[learner] target_modules: {name} is a {type(module).__name__}; the reward model adapts linear "
                    "layers alone"
                )
            layers[name] = module
    if not layers:
        raise SettingsError(f"[learner] target_modules: the base model has none of {', '.join(target_modules)}")
    return layers
