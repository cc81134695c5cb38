"""The guardrails through a real gateway and a real vLLM: a sane adapter passes, a wrecked one fails and says why."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guardrails.daemon import evaluate_once
from serve.routing import Route, Table
from tests.adapters import make_adapter
from tests.serving import Gateway
from thumbwheel.events import BASE, EvaluationReported
from thumbwheel.settings import GuardrailSettings
from thumbwheel.store import AdapterStore

pytestmark = pytest.mark.engine

SUITE = """
name: short
samples:
  max_tokens: 24
  prompts:
    - Why is the sea salty?
    - How do I boil rice?
    - What is a lake?
    - Tell me a joke.
    - Why do cats purr?
    - How do I sleep well?
    - What is bread?
    - Describe a forest.
checks:
  kl_budget: {limit: 6.0}
  served_equals_trained:
  length_drift: {min_ratio: 0.3, max_ratio: 3.0}
  sense_kept: {limit: 1.5}
  empty_answers: {limit: 0.5}
  required_patterns: {max_tokens: 12, rules: [{prompt: "What is the capital city of Japan?", pattern: Tokyo}]}
"""


@contextmanager
def evaluated(
    gateway: Gateway, engine: str, engine_base: str, model: Path, strength: float, served_as: str | None = None
) -> Iterator[EvaluationReported]:
    """The report on an adapter of that strength; `served_as` is what the engine serves under its name instead."""
    settings = gateway.settings
    (settings.data / "short.yaml").write_text(SUITE)
    (settings.data / "evaluator.key").write_text(gateway.evaluator_key)
    guardrails = GuardrailSettings(gateway=gateway.url, suites=[str(settings.data / "short.yaml")], concurrency=8)
    settings = settings.model_copy(update={"guardrails": guardrails})
    adapter = make_adapter(AdapterStore(settings.path(settings.store.path)), model, "v1", strength=strength)
    name = f"guardrails-test-{settings.data.name}"
    _post(engine, "load", {"lora_name": name, "lora_path": str(adapter.path)})
    try:
        base = Route(BASE, adapter.manifest.base_model, engine_base)
        candidate = Route("v1", adapter.digest, served_as or name)
        gateway.router.table = Table(champion=base, proved={BASE: base, "v1": candidate})
        yield evaluate_once(settings, "v1")
    finally:
        _post(engine, "unload", {"lora_name": name})


def test_a_sane_adapter_passes(real_gateway: Gateway, engine_url: str, engine_base: str, model_dir: Path) -> None:
    with evaluated(real_gateway, engine_url, engine_base, model_dir, strength=0.005) as report:
        found = {check.name: check for check in report.checks}
        assert report.verdict == "pass", report
        estimate = found["kl_budget"].estimate
        assert estimate is not None
        assert -1.0 < estimate < 3.0
    assert real_gateway.exchanges() == [], "what the guardrails ask is not kept for the learner"


def test_a_wrecked_adapter_fails_and_says_why(
    real_gateway: Gateway, engine_url: str, engine_base: str, model_dir: Path
) -> None:
    with evaluated(real_gateway, engine_url, engine_base, model_dir, strength=0.5) as report:
        failed = {check.name: check for check in report.checks if check.verdict == "fail"}
        assert report.verdict == "fail"
        assert "claim is refuted" in failed["kl_budget"].why
        assert "no longer make sense" in failed["sense_kept"].why
        assert "without /Tokyo/" in failed["required_patterns"].why


def test_the_base_model_under_a_candidates_name_is_found_out(
    real_gateway: Gateway, engine_url: str, engine_base: str, model_dir: Path
) -> None:
    with evaluated(real_gateway, engine_url, engine_base, model_dir, 0.05, served_as=engine_base) as report:
        (served,) = [check for check in report.checks if check.name == "served_equals_trained"]
        assert served.verdict == "fail", served


def _post(engine: str, verb: str, body: dict[str, str]) -> None:
    request = urllib.request.Request(
        f"{engine}/v1/{verb}_lora_adapter", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
