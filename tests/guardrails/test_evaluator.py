"""The evaluator: what it asks of whom, how often, and the identity of its report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guardrails import suite
from guardrails.cache import AnswerCache
from guardrails.evaluator import evaluate, evaluator_key, report
from guardrails.sampler import Sampler
from tests.guardrails.evidence import manifest
from tests.guardrails.upstream import CHAT, Upstream, running
from thumbwheel.errors import SettingsError
from thumbwheel.settings import Settings
from thumbwheel.store import Adapter

SUITE = suite.parse(
    """
name: small
samples: {prompts: [a, b, c], max_tokens: 8}
checks:
  kl_budget:
  length_drift:
  required_patterns: {rules: [{prompt: d, pattern: hi}]}
"""
)
OTHER = SUITE.model_copy(update={"name": "other"})


def adapter(version: str = "v1") -> Adapter:
    return Adapter(version, Path("/nowhere"), f"sha256:{version}", manifest())


def reply(body: dict[str, Any]) -> Any:
    if "messages" in body:
        return CHAT
    return {"choices": [{"prompt_logprobs": [None, *({str(i): {"logprob": -1.0}} for i in body["prompt"][1:])]}]}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    cache = AnswerCache(tmp_path / "cache.sqlite")
    yield cache
    cache.close()


async def test_the_reference_is_asked_once_for_all_candidates(cache: AnswerCache) -> None:
    async with running(Upstream(reply=reply)) as gateway, Sampler(gateway.url, lambda v: v) as sampler:
        first = await evaluate(sampler, [SUITE], adapter("v1"), cache)
        await evaluate(sampler, [SUITE], adapter("v2"), cache)
        asked = [body["model"] for body in gateway.bodies if "messages" in body]
        scored = [body["model"] for body in gateway.bodies if "messages" not in body]
    assert asked == ["base"] * 4 + ["v1"] * 4 + ["v2"] * 4
    assert scored == ["base"] * 6, "candidates' answers are scored under the reference"
    assert [check.name for check in first] == ["kl_budget", "length_drift", "required_patterns"]
    assert first[0].estimate == pytest.approx(-2.1 + 3.0)


async def test_a_version_that_was_sampled_before_a_crash_is_not_sampled_again(cache: AnswerCache) -> None:
    async with running(Upstream(reply=reply)) as gateway, Sampler(gateway.url, lambda v: v) as sampler:
        first = await evaluate(sampler, [SUITE], adapter(), cache)
        before = len([body for body in gateway.bodies if "messages" in body])
        assert await evaluate(sampler, [SUITE], adapter(), cache) == first
        assert len([body for body in gateway.bodies if "messages" in body]) == before


async def test_checks_of_several_suites_are_told_apart(cache: AnswerCache) -> None:
    async with running(Upstream(reply=reply)) as gateway, Sampler(gateway.url, lambda v: v) as sampler:
        found = await evaluate(sampler, [SUITE, OTHER], adapter(), cache)
    assert [check.name for check in found][2:4] == ["small/required_patterns", "other/kl_budget"]


def test_a_reports_id_follows_from_version_digest_and_suites() -> None:
    one = report("v1", "sha256:a", [SUITE], [])
    assert report("v1", "sha256:a", [SUITE], []).id == one.id
    changed = SUITE.model_copy(update={"confidence": 0.9})
    others = [
        report("v2", "sha256:a", [SUITE], []),
        report("v1", "sha256:b", [SUITE], []),
        report("v1", "sha256:a", [changed], []),
    ]
    assert len({one.id, *(other.id for other in others)}) == 4


def test_the_key_comes_from_the_environment_first_then_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THUMBWHEEL_EVALUATOR_KEY", raising=False)
    settings = Settings(data=tmp_path)
    with pytest.raises(SettingsError, match="THUMBWHEEL_EVALUATOR_KEY"):
        evaluator_key(settings)
    (tmp_path / "evaluator.key").write_text("tw-file\n")
    assert evaluator_key(settings) == "tw-file"
    monkeypatch.setenv("THUMBWHEEL_EVALUATOR_KEY", "tw-environment")
    assert evaluator_key(settings) == "tw-environment"
