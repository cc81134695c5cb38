"""The sampler on a real socket: what it asks for, what it refuses to take for an answer, and its patience."""

import asyncio
import copy
from typing import Any

import pytest

from guardrails import sampler as module
from guardrails.sampler import Sampler, SamplingError
from guardrails.suite import Question
from tests.guardrails.upstream import CHAT, Upstream, running

QUESTION = Question("Hi?", 8, 1.0, 3)


def policy(version: str) -> str:
    return f"policy@{version}"


async def test_it_asks_a_pinned_version_for_tokens_and_log_probs() -> None:
    async with running(Upstream()) as gateway, Sampler(gateway.url, policy, "tw-key") as sampler:
        answer = await sampler.answer("v1", QUESTION)
    (body,) = gateway.bodies
    assert body["model"] == "policy@v1"
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (1.0, 8, 3)
    assert body["store"] is False, "what the guardrails ask is not the users' traffic"
    assert gateway.keys == ["Bearer tw-key"]
    assert (answer.token_ids, answer.logprobs, answer.ended) == ([10, 11, 2], [-0.5, -1.5, -0.1], True)
    assert answer.content_length == 2, "the stop token is no content"


async def test_scores_are_those_of_the_completions_tokens_and_of_no_other() -> None:
    def reply(body: dict[str, Any]) -> Any:
        rows = [None, *({str(i): {"logprob": -i / 10}, "99": {"logprob": -9.0}} for i in body["prompt"][1:])]
        return {"choices": [{"prompt_logprobs": rows}]}

    async with running(Upstream(reply=reply)) as gateway, Sampler(gateway.url, policy) as sampler:
        assert await sampler.score("base", [5, 6], [7, 8]) == [-0.7, -0.8]
    assert gateway.bodies[0]["temperature"] == 1.0, "processed log-probs depend on the temperature"


@pytest.mark.parametrize("status", module.RETRY_STATUSES)
async def test_a_gateway_that_is_away_is_asked_again(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(Upstream(faults=[status])) as gateway, Sampler(gateway.url, policy) as sampler:
        assert (await sampler.answer("v1", QUESTION)).text == "Hi there"
    assert len(gateway.bodies) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_a_refusal_is_final_and_says_why(status: int) -> None:
    async with running(Upstream(faults=[status])) as gateway, Sampler(gateway.url, policy) as sampler:
        with pytest.raises(SamplingError, match=rf"policy@v1 said {status}: .*not now"):
            await sampler.answer("v1", QUESTION)
    assert len(gateway.bodies) == 1


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    async with Sampler("http://127.0.0.1:9", policy) as sampler:
        with pytest.raises(SamplingError, match="ClientConnector"):
            await sampler.answer("v1", QUESTION)


async def test_another_versions_answer_is_no_evidence() -> None:
    async with (
        running(Upstream(digest="sha256:other")) as gateway,
        Sampler(gateway.url, policy, digests={"v1": "sha256:v1"}) as sampler,
    ):
        with pytest.raises(SamplingError, match="served v1 as sha256:other, but sha256:v1 is to be evaluated"):
            await sampler.answer("v1", QUESTION)
        gateway.digest = None
        with pytest.raises(SamplingError, match="served v1 as None"):
            await sampler.answer("v1", QUESTION)
        gateway.digest = "sha256:v1"
        assert (await sampler.answer("v1", QUESTION)).text


def broken(change: str) -> Any:
    reply = copy.deepcopy(CHAT)
    choice: Any = reply["choices"]
    match change:
        case "no ids":
            choice[0]["token_ids"] = None
        case "no log-probs":
            choice[0]["logprobs"] = None
        case "one id short":
            choice[0]["token_ids"].pop()
        case "missing log-prob":
            choice[0]["logprobs"]["content"][1]["logprob"] = -9999.0
        case "no choice":
            choice.clear()
    return reply


@pytest.mark.parametrize("change", ["no ids", "no log-probs", "one id short", "missing log-prob", "no choice"])
async def test_an_answer_without_all_its_log_probs_is_refused(change: str) -> None:
    async with (
        running(Upstream(reply=lambda body: broken(change))) as gateway,
        Sampler(gateway.url, policy) as sampler,
    ):
        with pytest.raises(SamplingError, match="log-probs"):
            await sampler.answer("v1", QUESTION)


@pytest.mark.parametrize("row", [None, {}, {"8": {"logprob": -9999.0}}])
async def test_a_score_without_all_its_log_probs_is_refused(row: Any) -> None:
    reply = {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -1.0}}, row]}]}
    async with (
        running(Upstream(reply=lambda body: reply)) as gateway,
        Sampler(gateway.url, policy) as sampler,
    ):
        with pytest.raises(SamplingError, match="prompt"):
            await sampler.score("v1", [6], [7, 8])


async def test_no_more_requests_are_under_way_than_allowed() -> None:
    now, most = 0, 0

    class Slow(Upstream):
        async def handle(self, request: Any) -> Any:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.02)
            now -= 1
            return await super().handle(request)

    async with running(Slow()) as gateway, Sampler(gateway.url, policy, concurrency=3) as sampler:
        await asyncio.gather(*(sampler.answer("v1", QUESTION) for _ in range(12)))
    assert most == 3
