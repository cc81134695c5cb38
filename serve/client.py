"""A small async client of the engine's admin and scoring wire: health, models, load, unload, score.

vLLM's HTTP wire is steadier than its Python entry points, so this is all of vLLM that the gateway knows, beside the
two endpoints that it passes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from thumbwheel.errors import ThumbwheelError

ADMIN_TIMEOUT_S = 10.0


class EngineError(ThumbwheelError):
    """The engine did not do what it was asked."""

    exit_code = 6


class EngineUnreachable(EngineError):
    """The engine is down or starting: the same request may succeed later."""


class EngineBusy(EngineUnreachable):
    """The engine took the request and did not answer in time."""


class EngineRefused(EngineError):
    """The engine answered with an error: the same request will fail again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Model:
    """An entry of `/v1/models`: the base model has no parent, an adapter has the base model's name."""

    id: str
    parent: str | None


class EngineClient:
    """Use as an async context manager. All methods raise EngineUnreachable or EngineRefused."""

    def __init__(self, url: Callable[[], str], timeout_s: float) -> None:
        """`url` is asked at each request (a restarted engine may be elsewhere); `timeout_s` bounds loads and scores."""
        self._url = url
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        # No keep-alive: the engine closes idle connections after 5 s, and a POST that meets the closing is lost.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def health(self) -> None:
        """Return when the engine says that it can serve."""
        await self._call("GET", "/health", None, ADMIN_TIMEOUT_S)

    async def models(self) -> list[Model]:
        """What the engine serves: the base model under its names, and the loaded adapters."""
        answer = orjson.loads(await self._call("GET", "/v1/models", None, ADMIN_TIMEOUT_S))
        return [Model(entry["id"], entry.get("parent")) for entry in answer["data"]]

    async def load(self, name: str, path: Path) -> None:
        """Load the adapter at the absolute `path` under `name`; on return it is loaded.

        A name that is loaded already is left as it is: versions are immutable, and what it serves is proved anyway.
        """
        try:
            await self._call(
                "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, self._timeout_s
            )
        except EngineRefused as error:
            if error.status != 400 or "already been loaded" not in str(error):
                raise

    async def unload(self, name: str) -> None:
        """Forget the name; requests that run on it finish. A name that is not loaded is no error."""
        try:
            await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, ADMIN_TIMEOUT_S)
        except EngineRefused as error:
            if error.status != 404:
                raise

    async def score(self, model: str, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """log p(completion | prompt) token by token, nats, as long as `completion`; the model's own, at temperature 1.

        vLLM computes prompt log-probs from the raw logits whatever `--logprobs-mode` and sampling parameters say, and
        skips the prefix cache for them, so this never reads what another adapter left there.
        """
        body = {"model": model, "prompt": [*prompt, *completion], "max_tokens": 1, "prompt_logprobs": 0}
        content = await self._call("POST", "/v1/completions", body, self._timeout_s)
        try:
            positions = orjson.loads(content)["choices"][0]["prompt_logprobs"][len(prompt) :]
            return [float(at[str(token)]["logprob"]) for at, token in zip(positions, completion, strict=True)]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineRefused(f"the engine's answer holds no prompt log-probs ({error!r})", 502) from error

    async def warm(self, model: str) -> None:
        """Send real requests to both endpoints: the first ones compile and allocate, for 20 s on a CPU."""
        body = {"model": model, "max_tokens": 8, "n": 2}
        messages = [{"role": "user", "content": "Hello"}]
        await self._call("POST", "/v1/completions", {**body, "prompt": "Hello"}, self._timeout_s)
        try:
            await self._call("POST", "/v1/chat/completions", {**body, "messages": messages}, self._timeout_s)
        except EngineRefused as error:
            if error.status != 400:  # a model without a chat template serves completions alone
                raise

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> bytes:
        data = None if body is None else orjson.dumps(body)
        headers = {"content-type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._url() + path, data=data, headers=headers, timeout=timeout
            ) as answer:
                content = await answer.read()
                if answer.status >= 400:
                    raise EngineRefused(f"the engine answered {answer.status}: {_message(content)}", answer.status)
                return content
        except TimeoutError as error:
            raise EngineBusy(f"the engine did not answer {path} within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(f"the engine at {self._url()} cannot be reached: {error}") from error


def _message(content: bytes) -> str:
    """The message of an error in OpenAI's shape, else the body as it is, cut to 500 characters."""
    try:
        return str(orjson.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:500]
