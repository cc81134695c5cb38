"""Clients that ask and vote through gateways which may die at any moment, and keep what they were told."""

import asyncio
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import orjson

from tests.launch import GatewayProcess

CLIENTS = 16
RETRY_S = 0.1


@dataclass(frozen=True)
class Vote:
    """An acknowledged vote: the event's id, the response that it is about, and which vote on that response it was."""

    id: str
    response_id: str
    user: str
    number: int


@dataclass
class Told:
    """What gateways acknowledged, and what clients had to live with."""

    responses: list[str] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    refused: int = 0


class Crowd:
    """Sends `responses` chats and `votes` votes at least, and goes on until `enough` is set."""

    def __init__(self, gateways: Sequence[GatewayProcess], responses: int, votes: int, seed: int) -> None:
        self._gateways = gateways
        self._responses = responses
        self._votes = votes
        self._random = random.Random(seed)
        self.told = Told()
        self.enough = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether the numbers that were asked for are reached."""
        return len(self.told.responses) >= self._responses and len(self.told.votes) >= self._votes

    async def run(self) -> None:
        """Until the numbers are reached and `enough` is set."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            await asyncio.gather(*(self._live(session) for _ in range(CLIENTS)))

    async def _live(self, session: aiohttp.ClientSession) -> None:
        while not (self.done and self.enough.is_set()):
            gateway = self._random.choice(self._gateways)
            response_id = await self._ask(session, gateway)
            if response_id is None:
                await asyncio.sleep(RETRY_S)
                continue
            self.told.responses.append(response_id)
            # The votes on one response are an order: one after the other, all but the first where that one went.
            for number in range(self._random.choice((0, 0, 0, 1, 1, 2))):
                gateway = await self._vote(session, gateway, response_id, number)

    async def _ask(self, session: aiohttp.ClientSession, gateway: GatewayProcess) -> str | None:
        """A chat; its id where the whole answer came. Nobody asks twice: an answer that broke off is no answer."""
        stream = self._random.random() < 0.1
        body = {"model": "policy", "messages": [{"role": "user", "content": "Hello ✓"}], "stream": stream}
        headers = {"Authorization": f"Bearer {gateway.key}"}
        try:
            async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        if answer.status != 200:
            self.told.refused += 1
            return None
        if not stream:
            return str(orjson.loads(content)["id"])
        events = content.split(b"\n\n")
        if b"data: [DONE]" not in events:
            return None
        return str(orjson.loads(events[0].removeprefix(b"data: "))["id"])

    async def _vote(
        self, session: aiohttp.ClientSession, gateway: GatewayProcess, response_id: str, number: int
    ) -> GatewayProcess:
        """Send a vote again, under one Idempotency-Key, until somebody has it; returns who. The first vote on a
        response goes to any gateway that lives: the same vote may then wait in two of them."""
        user = f"user-{uuid.uuid4().hex[:12]}"
        again = uuid.uuid4().hex
        body = {"response_id": response_id, "rating": "up", "user": user, "metadata": {"number": number}}
        while True:
            headers = {"Authorization": f"Bearer {gateway.key}", "Idempotency-Key": again}
            try:
                async with session.post(f"{gateway.url}/v1/feedback", json=body, headers=headers) as answer:
                    if answer.status == 202:
                        id = str((await answer.json())["id"])
                        self.told.votes.append(Vote(id, response_id, user, number))
                        return gateway
                    assert answer.status >= 500, await answer.text()
                    self.told.refused += 1
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            if number == 0:
                gateway = self._random.choice(self._gateways)
            await asyncio.sleep(RETRY_S)
