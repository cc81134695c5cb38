"""Answers of the base model and of an adapter in one batch: neither may change the other."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.adapters import make_adapter
from tests.launch import unload
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.engine

QUESTIONS = ("What is a river?", "How do plants grow?", "Tell me about bread.", "Why is the sky blue?")


def sample(url: str, model: str, question: str) -> tuple[list[int], list[int], np.ndarray]:
    """Prompt ids, sampled ids and their log-probs."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": 40, "logprobs": True, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status().json()
    choice = answer["choices"][0]
    logprobs = np.array([entry["logprob"] for entry in choice["logprobs"]["content"]])
    return answer["prompt_token_ids"], choice["token_ids"], logprobs


def score(url: str, model: str, prompt: list[int], completion: list[int]) -> np.ndarray:
    body = {"model": model, "prompt": [*prompt, *completion], "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    entries = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
    return np.array([entry[str(token)]["logprob"] for entry, token in zip(entries, completion, strict=True)])


def test_base_answers_are_the_base_models_own_beside_a_strong_adapter(
    engine_url: str, engine_base: str, model_dir: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(AdapterStore(tmp_path), model_dir, "v1", seed=5, strength=0.2)
    name = "mixed@v1"
    loaded = httpx.post(
        f"{engine_url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(adapter.path)}, timeout=60
    )
    assert loaded.status_code == 200, loaded.text
    try:
        with ThreadPoolExecutor(8) as clients:
            asked = [(model, question) for question in QUESTIONS for model in (engine_base, name)]
            sampled = list(clients.map(lambda one: sample(engine_url, *one), asked))
        gaps = {engine_base: list[float](), name: list[float]()}
        for (model, _), (prompt, completion, logprobs) in zip(asked, sampled, strict=True):
            gaps[model] += np.abs(logprobs - score(engine_url, model, prompt, completion)).tolist()
    finally:
        unload(engine_url, name)
    assert np.mean(gaps[engine_base]) < 0.1
    assert np.mean(gaps[name]) < 0.1
