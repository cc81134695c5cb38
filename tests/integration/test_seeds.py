"""Requests with a seed, more of them than a batch holds: vLLM's CPU engine has ended over them."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.engine


def test_long_prompts_with_seeds_that_do_not_fit_into_one_batch_are_answered(engine_url: str, engine_base: str) -> None:
    def ask(i: int) -> httpx.Response:
        prompt = [1000 + i, *range(2000, 2450)]  # no two share a prefix, which would be read once
        body = {"model": engine_base, "prompt": prompt, "max_tokens": 4, "n": 2, "temperature": 1.0, "seed": i}
        return httpx.post(f"{engine_url}/v1/completions", json=body, timeout=300)

    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(ask, range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert all(len(answer.json()["choices"]) == 2 for answer in answers)
    assert httpx.get(f"{engine_url}/health", timeout=60).status_code == 200
