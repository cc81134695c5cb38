"""Fresh answers: sampled under the adapter as it is in the learner's memory now, at temperature 1, nothing cut off.

`Memory` lets the model in memory sample: exactly the policy. `Engine` gives the adapter to a vLLM, which is many times
faster, computes with other kernels and may serve something else altogether: `check_served` compares what it sampled
from with what the learner makes of the same tokens.
"""

import asyncio
import json
import logging
import math
import shutil
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import aiohttp
import torch
from torch import Tensor

from learner.logprobs import Row
from learner.policy import Policy
from learner.sampler import sample
from thumbwheel.errors import AdapterError, ThumbwheelError
from thumbwheel.store import fingerprint

logger = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int], None]
"""Called with the number of answers that are done since the last call, 0 among them; what it raises ends the work."""

BATCH = 64
"""How many answers the model in memory samples side by side."""
CONCURRENCY = 32
"""Requests that the engine has at a time, each for all answers to one prompt."""
PAUSES_S = (0.5, 2.0)
"""Before a request that failed is sent again: a reset connection or a 5xx may pass."""
TIMEOUT_S = 600.0
UNLOAD_TIMEOUT_S = 10.0
TICK_S = 0.2
"""Between two calls of `progress` while nothing is done: how late a stop is heard."""
MISSING = -9000.0
"""vLLM writes -9999.0 for a log-prob that it does not have."""
ROUNDING = 1e-4
"""How far above 0 a log-prob may be that is 0."""
PREFIX = "fresh-"
LOAD, UNLOAD, COMPLETIONS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"

LIMIT = 0.25
"""Largest mean difference between the engine's log-probs and the learner's, nats a token; 0.03 to 0.07 is usual in
bf16."""
APART = 0.1
"""Root mean square difference of policy and reference, nats a token, from which noise does not explain it."""
EVIDENCE = 0.6
"""Square root of the summed squares of it: 6 standard deviations of the noise, of which half decides."""


class FreshError(ThumbwheelError):
    """The engine of `[learner.fresh]` did not give what was asked of it; nothing was learned, and it may be retried."""

    exit_code = 6


class _Refused(FreshError):
    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


@dataclass(frozen=True, slots=True)
class Fresh:
    """One answer. `ended`: by its end token, which it holds, not cut off at the most tokens allowed (or where the
    engine's context ends).

    `behaviour` are the log-probs of its tokens as the engine reports them, nats; None where the model in memory
    sampled.
    """

    row: Row
    ended: bool
    behaviour: list[float] | None


class Source(Protocol):
    """Where fresh answers come from."""

    def answers(
        self, prompts: Sequence[list[int]], n: int, max_tokens: int, progress: Progress = lambda _: None
    ) -> list[list[Fresh]]:
        """For each prompt, in their order, n answers of 1 to `max_tokens` tokens."""
        ...


class Memory:
    """The model in memory, in batches of prompts of like length."""

    def __init__(self, policy: Policy, generator: torch.Generator) -> None:
        self._policy = policy
        self._generator = generator

    def answers(
        self, prompts: Sequence[list[int]], n: int, max_tokens: int, progress: Progress = lambda _: None
    ) -> list[list[Fresh]]:
        """See `Source`. The same state of the generator gives the same answers."""
        found: list[list[Fresh]] = [[] for _ in prompts]
        longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        owners = [i for i in longest_first for _ in range(n)]
        for start in range(0, len(owners), BATCH):
            part = owners[start : start + BATCH]
            for i, row in zip(part, self._batch([prompts[i] for i in part], max_tokens, progress), strict=True):
                found[i].append(Fresh(row, row.completion[-1] in self._policy.stop, None))
        return found

    def _batch(self, prompts: list[list[int]], max_tokens: int, progress: Progress) -> list[Row]:
        policy = self._policy
        shares = _shares(len(prompts), max_tokens)
        rows = sample(policy.model, prompts, max_tokens, policy.stop, self._generator, lambda _: progress(next(shares)))
        progress(sum(shares))
        return rows


def _shares(answers: int, steps: int) -> Iterator[int]:
    """What each step of sampling counts for: as many answers in all as there are."""
    return (answers * (step + 1) // steps - answers * step // steps for step in range(steps))


class Engine:
    """A vLLM at `[learner.fresh] engine` that loads adapters at run time and sees the learner's files.

    Each call saves the adapter under a name and a path that were never used before: vLLM keys its prefix cache by them.
    The name is unloaded when the call ends, however it ends; the files go with the next call, since vLLM may read them
    again. What a killed learner left in the directory is unloaded and deleted in the same way.
    """

    def __init__(self, url: str, policy: Policy, directory: Path) -> None:
        """`directory` is this source's alone; it is made when it is needed."""
        self._url = url.rstrip("/")
        self._policy = policy
        self._directory = directory.absolute()
        self._loaded = {place.name for place in self._places()}  # names that the engine may still know

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unload and delete what is left."""
        if self._loaded:
            asyncio.run(self._clear())
        self._delete(self._places())

    def answers(
        self, prompts: Sequence[list[int]], n: int, max_tokens: int, progress: Progress = lambda _: None
    ) -> list[list[Fresh]]:
        """See `Source`. Raises FreshError where the engine does not give them, AdapterError where it cannot serve the
        adapter."""
        earlier = self._places()
        place = self._directory / f"{PREFIX}{uuid.uuid4().hex}"
        self._policy.save(place)
        try:
            return asyncio.run(self._answers(place, prompts, n, max_tokens, progress))
        finally:
            self._delete(earlier)

    async def _answers(
        self, place: Path, prompts: Sequence[list[int]], n: int, max_tokens: int, progress: Progress
    ) -> list[list[Fresh]]:
        slots = asyncio.Semaphore(CONCURRENCY)

        async def ask(prompt: list[int]) -> list[Fresh]:
            async with slots:
                return await self._ask(session, place.name, prompt, n, max_tokens)

        async with _session() as session:
            try:
                await _all([self._load(session, place)], progress, 0)
                return await _all([ask(prompt) for prompt in prompts], progress, n)
            finally:
                await self._unload(session)

    async def _load(self, session: aiohttp.ClientSession, place: Path) -> None:
        await self._check_base(session)
        self._loaded.add(place.name)
        try:
            await self._call(session, "POST", LOAD, {"lora_name": place.name, "lora_path": str(place)})
        except _Refused as error:
            if "already been loaded" in error.said:  # by a first try whose answer was lost: nobody else has this name
                return
            raise self._not_loaded(error, place) from error

    def _not_loaded(self, error: _Refused, place: Path) -> ThumbwheelError:
        if error.status == 404 and "adapter" not in error.said:
            return FreshError(
                f"the engine at {self._url} ([learner.fresh] engine) does not load adapters at run time: start vLLM "
                "with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        if "LoRA is not enabled" in error.said:
            return FreshError(
                f"the engine at {self._url} ([learner.fresh] engine) serves no adapters: start vLLM with --enable-lora"
            )
        if error.status == 404:
            return FreshError(
                f"the engine at {self._url} ([learner.fresh] engine) finds no adapter at {place}: it has to see the "
                f"learner's files under the same path ({error.said})"
            )
        if "max_lora_rank" in error.said:
            return AdapterError(
                f"the engine at {self._url} ([learner.fresh] engine) cannot serve [learner] rank: {error.said} Lower "
                "[learner] rank, or start vLLM with a higher --max-lora-rank"
            )
        return AdapterError(
            f"the engine at {self._url} ([learner.fresh] engine) does not take the adapter that is being trained: "
            f"{error.said}"
        )

    async def _check_base(self, session: aiohttp.ClientSession) -> None:
        """Where the engine's base model can be seen from here, it has to be the policy's."""
        content = await self._call(session, "GET", "/v1/models")
        try:
            roots = {card["root"] for card in json.loads(content)["data"] if card.get("parent") is None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FreshError(
                f"{self._url} ([learner.fresh] engine) does not answer as vLLM does: /v1/models lists no models "
                f"({error!r})"
            ) from error
        for root in roots:
            self._check_root(root)

    def _check_root(self, root: str) -> None:
        if Path(root).is_dir() and fingerprint(Path(root)) != self._policy.base_fingerprint:
            raise AdapterError(
                f"the engine at {self._url} ([learner.fresh] engine) serves {root}, which is another base model than "
                "the learner's: start it with the model that [engine] model names"
            )

    async def _ask(
        self, session: aiohttp.ClientSession, name: str, prompt: list[int], n: int, max_tokens: int
    ) -> list[Fresh]:
        # Without a seed: one in each request makes vLLM sample row by row, and the CPU build (0.32) ends when it has to
        # take up such a request's prompt in parts (gpu_model_runner.py, `gen.get_offset()`).
        body = {
            "model": name,
            "prompt": prompt,
            "n": n,
            "max_tokens": max_tokens,
            "temperature": 1,
            # What is not named here may come from the model's generation_config.json.
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "ignore_eos": True,
            "stop_token_ids": sorted(self._policy.stop),  # as the model in memory ends, and no other end
            "add_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        content = await self._call(session, "POST", COMPLETIONS, body)
        try:
            answer = json.loads(content)
            served, choices = answer["model"], answer["choices"]
            if served != name or len(choices) != n:
                raise ValueError(f"{len(choices)} answers of {served}, where {n} of {name} were asked for")
            return [self._fresh(prompt, choice) for choice in choices]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FreshError(
                f"the engine at {self._url} ([learner.fresh] engine) gave what cannot be learned from: "
                f"{error if isinstance(error, ValueError) else repr(error)}"
            ) from error

    def _fresh(self, prompt: list[int], choice: dict[str, Any]) -> Fresh:
        """Raises ValueError that says what is wrong with the answer, or whatever an answer of another form leads to."""
        reason, ids = choice["finish_reason"], choice.get("token_ids")
        behaviour = (choice.get("logprobs") or {}).get("token_logprobs")
        if reason not in ("stop", "length"):
            raise ValueError(f"an answer that ended by {reason!r}")
        if ids is None or behaviour is None:
            raise ValueError(f"an answer without {'token ids' if ids is None else 'log-probs'}")
        if not ids or len(ids) != len(behaviour):
            raise ValueError(f"an answer of {len(ids)} tokens with {len(behaviour)} log-probs")
        if choice.get("prompt_token_ids") != prompt:
            raise ValueError("an answer to another prompt than the one that was sent")
        if unknown := [id for id in ids if not 0 <= id < self._policy.vocabulary]:
            raise ValueError(f"the token {unknown[0]}, where the policy knows {self._policy.vocabulary}")
        if wrong := [value for value in behaviour if not MISSING < (math.nan if value is None else value) <= ROUNDING]:
            raise ValueError(f"a log-prob of {wrong[0]}")
        if reason == "stop" and ids[-1] not in self._policy.stop:
            raise ValueError(f"an answer that stops at the token {ids[-1]}, which ends no answer of the policy")
        return Fresh(Row(prompt, ids), reason == "stop", behaviour)

    async def _call(
        self, session: aiohttp.ClientSession, method: str, path: str, body: dict[str, Any] | None = None
    ) -> bytes:
        where = f"the engine at {self._url} ([learner.fresh] engine)"
        for pause in (*PAUSES_S, None):
            try:
                async with session.request(method, self._url + path, json=body) as answer:
                    content = await answer.read()
                if answer.status < 400:
                    return content
                said = _message(content)
                problem: FreshError = _Refused(f"{where} answered {answer.status}: {said}", answer.status, said)
                # A load that fails with 500 is vLLM's word on the adapter.
                again = answer.status > 500 or (answer.status == 500 and path != LOAD)
            except TimeoutError as error:
                raise FreshError(f"{where} did not answer {path} in time: does it hang?") from error
            except (aiohttp.ClientError, OSError) as error:
                problem, again = (
                    FreshError(
                        f"{where} cannot be reached: {error}. Start it, or leave the setting empty: then the learner "
                        "samples by itself"
                    ),
                    True,
                )
            if not again or pause is None:
                break
            logger.warning("%s; asking again in %g s", problem, pause)
            await asyncio.sleep(pause)
        raise problem

    async def _unload(self, session: aiohttp.ClientSession) -> None:
        """Make the engine forget every name that it may know from here. What fails is left for the next time."""
        timeout = aiohttp.ClientTimeout(total=UNLOAD_TIMEOUT_S)
        for name in sorted(self._loaded):
            try:
                async with session.post(self._url + UNLOAD, json={"lora_name": name}, timeout=timeout) as answer:
                    if answer.status not in (200, 404):
                        raise OSError(f"{answer.status}: {_message(await answer.read())}")
            except (aiohttp.ClientError, OSError) as error:
                logger.warning("the engine at %s still holds %s: %s", self._url, name, error)
                return
            self._loaded.discard(name)

    async def _clear(self) -> None:
        async with _session() as session:
            await self._unload(session)

    def _places(self) -> list[Path]:
        return list(self._directory.glob(f"{PREFIX}*"))

    def _delete(self, places: Sequence[Path]) -> None:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def _session() -> aiohttp.ClientSession:
    # No keep-alive: vLLM closes idle connections after 5 s, and a POST that meets the closing is lost.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, sock_connect=10),
    )


async def _all(works: Sequence[Coroutine[Any, Any, T]], progress: Progress, worth: int) -> list[T]:
    """The results, in order. The first that fails, or `progress` when it raises, ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            progress(worth * len(done))
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _message(content: bytes) -> str:
    """The message of an error in OpenAI's shape, else the body as it is, cut to 500 characters."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:500]


def check_served(
    fresh: Sequence[Fresh],
    policy_logprobs: Sequence[Tensor | Sequence[float]],
    reference_logprobs: Sequence[Tensor | Sequence[float]],
) -> float:
    """Mean absolute difference between the engine's log-probs and the policy's, nats a token; 0 where no engine was.

    The others are the learner's own log-probs of each answer's tokens, nats. Raises FreshError where the engine's are
    further from the policy's than `LIMIT`, or, as far as policy and reference can be told apart, nearer to the
    reference's: s is nearer to p than to r when Σ(s − p)² < Σ(s − r)², which noise of standard deviation σ turns round
    only if it reaches √Σ(p − r)² / 2 (σ is about 0.1; hence `EVIDENCE`). Temperature 1 without truncation: raw and
    processed log-probs are the same.
    """
    chosen = [i for i, one in enumerate(fresh) if one.behaviour is not None]
    if not chosen:
        return 0.0
    served = _joined([fresh[i].behaviour or [] for i in chosen])
    policy, reference = (_joined([each[i] for i in chosen]) for each in (policy_logprobs, reference_logprobs))
    distance = (served - policy).abs().mean().item()
    moved = (policy - reference).square()
    told_apart = moved.mean().sqrt() >= APART and moved.sum().sqrt() >= EVIDENCE
    nearer = (served - policy).square().sum() < (served - reference).square().sum()
    if not distance <= LIMIT or (told_apart and not nearer):
        raise FreshError(
            "the engine does not serve the adapter that is being trained: over "
            f"{len(served)} tokens its log-probs are {distance:.3f} nats a token from the policy's (at most {LIMIT}) "
            f"and {(served - reference).abs().mean().item():.3f} from the reference's. Is the vLLM at "
            "[learner.fresh] engine started with the model that [engine] model names, unquantised, with --enable-lora?"
        )
    return distance


def _joined(parts: Sequence[Tensor | Sequence[float]]) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=torch.float64, device="cpu").detach() for part in parts])
