"""The demo's app: a stock OpenAI client, its users, and how many of their requests failed."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import openai

from thumbwheel.demo.loop import Loop
from thumbwheel.demo.users import Answer, population

MAX_TOKENS = 96
CLIENTS = 24
SWAP_CLIENTS = 8


@dataclass
class Traffic:
    """The app: a stock OpenAI client, and how many of its requests failed."""

    loop: Loop
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.loop.url}/v1", api_key=self.loop.key(key), max_retries=0, timeout=300
        )

    async def ask(
        self, client: openai.AsyncOpenAI, question: str, user: str, model: str = "policy", store: bool = False
    ) -> Answer | None:
        """One chat. None where it failed, which is counted."""
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=MAX_TOKENS,
                temperature=1.0,
                user=user,
                store=store,
            )
        except openai.OpenAIError as error:
            self.failed += 1
            self.errors.append(str(error))
            return None
        answer = raw.parse()
        choice = answer.choices[0]
        return Answer(
            response_id=answer.id,
            question=question,
            text=choice.message.content or "",
            finish_reason=choice.finish_reason,
            tokens=answer.usage.completion_tokens if answer.usage else 0,
            version=raw.headers["x-thumbwheel-version"],
        )

    async def ask_all(self, asked: Sequence[str], tick: Callable[[], None], key: str, model: str) -> list[Answer]:
        """Held-out questions, kept off the log: nothing is learned from them."""
        gate = asyncio.Semaphore(CLIENTS)
        async with self.client(key) as client:

            async def one(question: str) -> Answer | None:
                async with gate:
                    answer = await self.ask(client, question, "evaluation", model)
                tick()
                return answer

            return [answer for answer in await asyncio.gather(*map(one, asked)) if answer is not None]

    async def chat_and_vote(self, asked: Iterator[str], votes: int, tick: Callable[[], None]) -> tuple[int, int]:
        """Users chat and vote; they take their questions from `asked`. The ups and downs.

        They go on until `votes` votes are in and a tenth of those are ups: a learner needs both in every batch.
        """
        chance = random.Random(3)
        users = population(40, seed=3)
        given = {"up": 0, "down": 0}
        async with self.client("app") as client:

            async def one_user_after_another() -> None:
                while sum(given.values()) < votes or 10 * given["up"] < votes:
                    question = next(asked)
                    user = chance.choice(users)
                    answer = await self.ask(client, question, user.name, store=True)
                    rating = user.vote(answer, chance) if answer is not None else None
                    if answer is None or rating is None:
                        continue
                    given[rating] += 1
                    body = {"response_id": answer.response_id, "rating": rating, "user": user.name}
                    try:
                        await client.post("/feedback", cast_to=object, body=body)
                    except openai.OpenAIError as error:
                        self.failed += 1
                        self.errors.append(str(error))
                    tick()

            await asyncio.gather(*(one_user_after_another() for _ in range(CLIENTS)))
        return given["up"], given["down"]

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncIterator[list[tuple[float, str]]]:
        """Constant load, half of it streaming: (when a request began, which version served it), growing."""
        served: list[tuple[float, str]] = []
        enough = asyncio.Event()
        async with self.client("app") as client:

            async def run(stream: bool) -> None:
                while not enough.is_set():
                    began = time.time()
                    try:
                        raw = await client.chat.completions.with_raw_response.create(
                            model="policy",
                            messages=[{"role": "user", "content": "How are you today?"}],
                            max_tokens=16,
                            stream=stream,
                            store=False,
                        )
                        parsed = raw.parse()
                        if isinstance(parsed, openai.AsyncStream):
                            async for _ in parsed:
                                pass
                        served.append((began, raw.headers["x-thumbwheel-version"]))
                    except openai.OpenAIError as error:
                        self.failed += 1
                        self.errors.append(str(error))

            group = [asyncio.create_task(run(stream=number % 2 == 0)) for number in range(SWAP_CLIENTS)]
            try:
                yield served
            finally:
                enough.set()
                await asyncio.gather(*group)
