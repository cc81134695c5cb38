"""The policy: a frozen base model with one LoRA adapter. The reference is the same model with the adapter disabled.

The base computes in bf16; the adapter's weights are fp32, since an update is smaller than what bf16 can hold. The
reference is therefore always the bare base model, never the version that training started from.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from learner import attention, fused, lora, tail
from learner.logprobs import check_output_layer
from learner.ranks import device
from thumbwheel.errors import AdapterError, SettingsError
from thumbwheel.settings import Settings
from thumbwheel.store import Adapter, fingerprint

logger = logging.getLogger(__name__)

KERNELS = "192"
"""How many kernels oneDNN keeps, one for each shape that it has met. What the layers of two parts need at a time fits
in; 512 took 160 MB more and saved no time."""


class Policy:
    """One model in memory, one adapter in it. Made with the adapter that `start` gives it; starts from the base."""

    def __init__(self, base: Any, settings: Settings, base_fingerprint: str) -> None:
        """`base` is a causal language model of transformers; it is frozen and altered in place.

        Raises SettingsError where a stop token is outside its vocabulary.
        """
        check_output_layer(base.config)
        self.base_fingerprint = base_fingerprint
        self.vocabulary: int = base.get_output_embeddings().weight.shape[0]
        ends = base.generation_config.eos_token_id
        chosen = settings.engine.stop_token_ids
        if unknown := [id for id in chosen if id >= self.vocabulary]:
            raise SettingsError(f"[engine] stop_token_ids: the model has {self.vocabulary} tokens and no {unknown[0]}")
        self.stop = frozenset([*(ends if isinstance(ends, list) else [] if ends is None else [ends]), *chosen])
        self._settings = settings
        self._base = base.eval().requires_grad_(False)
        attention.install(base)
        fused.install(base)
        tail.install(base)
        self._peft: Any = None
        self.start(None)

    @classmethod
    def load(cls, settings: Settings) -> "Policy":
        """Read the base model that `[engine] model` names. Raises SettingsError where it cannot be read."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)  # read when torch first multiplies
        path = settings.path(settings.engine.model)
        identity = fingerprint(path)
        try:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot load the base model at {path} ([engine] model): {error}") from error
        return cls(base.to(device(settings.learner.device)), settings, identity)

    @property
    def width(self) -> int:
        """Of a hidden state."""
        width: int = self._base.get_output_embeddings().weight.shape[1]
        return width

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._base.device
        return device

    @property
    def model(self) -> Any:
        """The causal language model, adapter included."""
        return self._base

    def start(self, parent: Adapter | None) -> None:
        """Make the adapter that of `parent`, or a new one (which changes nothing yet) for the base model.

        Raises AdapterError where the parent was trained on another base model.
        """
        if self._peft is not None:
            self._peft.unload()
        if parent is None:
            self._peft = self._new()
            lora.install(self._base)
            return
        if parent.manifest.base_model != self.base_fingerprint:
            raise AdapterError(
                f"{parent.version} was trained on the base model {parent.manifest.base_model}, and [engine] model is "
                f"{self.base_fingerprint}: point [engine] model at its base model, or roll back to `base`"
            )
        self._peft = PeftModel.from_pretrained(self._base, parent.path, is_trainable=True)
        lora.install(self._base)
        rank = self._peft.peft_config["default"].r
        if rank != self._settings.learner.rank:
            logger.warning("%s has rank %d; [learner] rank counts when training starts from base", parent.version, rank)

    def _new(self) -> Any:
        chosen = self._settings.learner
        config = LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.lora_alpha,
            target_modules=chosen.target_modules,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            try:
                return get_peft_model(self._base, config)
            except ValueError as error:
                raise SettingsError(f"[learner] target_modules: {error}") from error

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the model is the reference."""
        with self._peft.disable_adapter():
            yield

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained: the adapter's matrices, in an order that does not change."""
        return [parameter for _, parameter in self._named()]

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._peft.named_parameters() if "lora_" in name]

    def weights(self) -> dict[str, Tensor]:
        """A copy of the adapter's matrices by name."""
        return {name: parameter.detach().clone() for name, parameter in self._named()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor], scale: float = 1.0) -> None:
        """Put matrices back that `weights` returned, with the adapter's effect multiplied by `scale`.

        B is scaled and A is not: the product BA is what counts. Raises AdapterError where names or shapes differ.
        """
        named = dict(self._named())
        if {name: tuple(p.shape) for name, p in named.items()} != {n: tuple(w.shape) for n, w in weights.items()}:
            raise AdapterError("the saved weights are of another shape: [learner] rank or target_modules has changed")
        for name, parameter in named.items():
            parameter.copy_(weights[name] * scale if "lora_B" in name else weights[name])

    def save(self, directory: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors as vLLM reads them, without paths of this machine."""
        self._peft.peft_config["default"].base_model_name_or_path = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")  # of the hub; we name no hub
            self._peft.save_pretrained(str(directory), save_embedding_layers=False)
