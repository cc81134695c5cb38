"""Real adapters for tests: random LoRA weights on the test's model, with probes, in a store and on a log."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from thumbwheel.events import (
    BASE,
    AdapterPromoted,
    CandidateApproved,
    CandidateSubmitted,
    EvaluationReported,
    Event,
)
from thumbwheel.log import Log, message_of
from thumbwheel.manifest import KLBound, LearnedFrom, Manifest, Probe
from thumbwheel.store import CONFIG, WEIGHTS, Adapter, AdapterStore, fingerprint

PROBES = (
    (
        "What is the capital of France?",
        "The capital of France is Paris. It lies on the river Seine and is known for its art.",
    ),
    ("How do I boil an egg?", "Put the egg into boiling water, wait for eight minutes, and cool it under cold water."),
    ("Tell me about the sea.", "The sea covers most of the earth. It is deep, salty, and full of life of many kinds."),
)
"""Questions, each with an answer that is scored; about 60 tokens in all."""


@lru_cache(1)
def load_model(model: Path) -> tuple[Any, Any]:
    """The model in bfloat16, as the engine serves it, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(
        model
    )


def make_adapter(
    store: AdapterStore, model: Path, version: str, seed: int = 0, strength: float = 0.06, rank: int = 8
) -> Adapter:
    """An adapter with random weights, on the real model; `strength` is the standard deviation of lora_B."""
    import torch
    from peft import LoraConfig, get_peft_model

    base, tokenizer = load_model(model)
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "down_proj"]
    policy = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    try:
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=strength)
        probes = [_probe(policy, tokenizer, question, answer) for question, answer in PROBES]
        return store.write(version, manifest(version, fingerprint(model), probes), policy.save_pretrained)
    finally:
        policy.unload()


def _probe(policy: Any, tokenizer: Any, question: str, answer: str) -> Probe:
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    completion = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        candidate = logprobs(policy, prompt, completion)
        with policy.disable_adapter():
            base = logprobs(policy, prompt, completion)
    return Probe(
        prompt_token_ids=prompt, completion_token_ids=completion, candidate_logprobs=candidate, base_logprobs=base
    )


def logprobs(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """log p(completion | prompt) token by token, nats, at temperature 1."""
    import torch

    ids = torch.tensor([prompt + completion])
    logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].float()  # (completion tokens, vocabulary)
    picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])
    return [float(value) for value in picked[:, 0]]


def tiny_adapter(store: AdapterStore, version: str, base_model: str, rank: int = 8, moved: float = 1.0) -> Adapter:
    """An adapter of one small tensor with made-up probes, `moved` nats from the base: enough for an engine stub."""
    probe = Probe(
        prompt_token_ids=[1, 2],
        completion_token_ids=list(range(40)),
        candidate_logprobs=[-2.0 + moved] * 40,
        base_logprobs=[-2.0] * 40,
    )

    def save(directory: Path) -> None:
        config = {"peft_type": "LORA", "r": rank, "bias": "none", "target_modules": ["q_proj"]}
        (directory / CONFIG).write_text(json.dumps(config))
        save_file({"q_proj.lora_A.weight": np.zeros((rank, 4), np.float32)}, directory / WEIGHTS)

    return store.write(version, manifest(version, base_model, [probe]), save)


def manifest(version: str, base_model: str, probes: list[Probe]) -> Manifest:
    """A manifest that says nothing but what a proof needs."""
    return Manifest(
        version=version,
        base_model=base_model,
        created=0.0,
        algorithm="random",
        learned_from=LearnedFrom(ups=0, downs=0, feedback_ids=[]),
        kl=KLBound(mean=0.0, upper=0.0, per_token=0.0, n=0, budget=4.0),
        probes=probes,
    )


def append(log: Log, *events: Event) -> None:
    """Put events onto a log."""
    for event in events:
        log.append(event.topic, [message_of(event)])


def submitted(adapter: Adapter, parent: str = BASE) -> CandidateSubmitted:
    """The learner's word that a version is in the store."""
    return CandidateSubmitted(
        source="test",
        version=adapter.version,
        digest=adapter.digest,
        parent=parent,
        algorithm="random",
        learned_from=0,
        kl_upper=0.0,
    )


def decided(adapter: Adapter, previous: str = BASE) -> tuple[Event, ...]:
    """A passing report, an approval and the promotion of a version that was submitted."""
    version, digest = adapter.version, adapter.digest
    return (
        EvaluationReported(source="test", version=version, digest=digest, verdict="pass", checks=[]),
        CandidateApproved(source="test", version=version, digest=digest, actor="test", reason="test"),
        AdapterPromoted(source="test", version=version, digest=digest, previous=previous, actor="test"),
    )
