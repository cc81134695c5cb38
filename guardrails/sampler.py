"""An asynchronous client of the gateway: answers of a pinned version, and log-probs that a version gives to tokens.

Any client with a key of scope `evaluator` could do the same: the guardrails see what users see, by the same door.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import aiohttp

from guardrails.answers import Answer
from guardrails.suite import Question
from thumbwheel.errors import ThumbwheelError

logger = logging.getLogger(__name__)

RETRY_STATUSES = (429, 502, 503, 504)
PATIENCE_S = 60.0
"""How long one request is tried again while the gateway is away or busy."""
MISSING = -9000.0
"""vLLM writes -9999.0 for a log-prob that it does not have."""


class SamplingError(ThumbwheelError):
    """The gateway did not give what a check needs; the evaluation has no result and may be tried again."""

    exit_code = 6


class Sampler:
    """Bounded concurrency, retries while the gateway is away. Use as `async with`."""

    def __init__(
        self,
        url: str,
        model: Callable[[str], str],
        key: str = "",
        digests: Mapping[str, str] | None = None,
        concurrency: int = 16,
    ) -> None:
        """`model` maps a version to the model name to ask for.

        `digests` holds what each version must be: every response has to say so in `x-thumbwheel-digest`. None asks for
        no such header: for an engine without a gateway.
        """
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._digests = digests
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> "Sampler":
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300),
            connector=aiohttp.TCPConnector(limit=self._concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def answer(self, version: str, question: Question) -> Answer:
        """One answer of `version`, with its tokens and the log-probs that they were sampled with."""
        body = await self._post(
            "/v1/chat/completions",
            version,
            {
                "messages": [{"role": "user", "content": question.prompt}],
                "temperature": question.temperature,
                "max_tokens": question.max_tokens,
                "seed": question.seed,
                "logprobs": True,
                "top_logprobs": 0,
                "return_token_ids": True,
                "store": False,
            },
        )
        try:
            choice = body["choices"][0]
            answer = Answer(
                prompt=question.prompt,
                text=choice["message"]["content"] or "",
                prompt_token_ids=body["prompt_token_ids"],
                token_ids=choice["token_ids"],
                logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
                ended=choice["finish_reason"] == "stop",
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SamplingError(f"{self._url} answered without token ids or log-probs: {error!r}") from error
        if len(answer.token_ids) != len(answer.logprobs) or min(answer.logprobs, default=MISSING) <= MISSING:
            raise SamplingError(f"{self._url} answered with missing log-probs for {version}")
        return answer

    async def score(self, version: str, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """The log-probs that `version` gives to the completion's tokens after the prompt's, at temperature 1."""
        token_ids = [*prompt, *completion]
        body = await self._post(
            "/v1/completions",
            version,
            {"prompt": token_ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "store": False},
        )
        try:
            entries = body["choices"][0]["prompt_logprobs"]
            scores = [
                float(entries[position][str(token_ids[position])]["logprob"])
                for position in range(len(prompt), len(token_ids))
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SamplingError(f"{self._url} scored a prompt without prompt_logprobs: {error!r}") from error
        if min(scores, default=0.0) <= MISSING:
            raise SamplingError(f"{self._url} scored a prompt with missing log-probs for {version}")
        return scores

    async def _post(self, path: str, version: str, body: dict[str, Any]) -> Any:
        body = {"model": self._model(version), **body}
        async with self._slots:
            start, wait = time.monotonic(), 0.25
            while True:
                try:
                    async with self._session.post(self._url + path, json=body) as response:
                        if response.status == 200:
                            self._check_digest(version, response.headers.get("x-thumbwheel-digest"))
                            return await response.json()
                        problem = f"{response.status}: {(await response.text())[:300]}"
                        again = response.status in RETRY_STATUSES
                except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                    problem, again = f"{type(error).__name__}: {error}", True
                if not again or time.monotonic() - start + wait > PATIENCE_S:
                    raise SamplingError(f"{self._url}{path} for {body['model']} said {problem}")
                logger.info("%s for %s said %s; trying again in %.1f s", path, body["model"], problem, wait)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(8.0, wait * 2)

    def _check_digest(self, version: str, served: str | None) -> None:
        if self._digests is not None and served != self._digests[version]:
            raise SamplingError(
                f"{self._url} served {version} as {served}, but {self._digests[version]} is to be evaluated: "
                "its answers say nothing about this candidate"
            )
