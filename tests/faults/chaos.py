"""What is killed, and when: brokers, gateways, forwarders, the consumer."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.launch import GatewayProcess
from thumbwheel.demo.broker import Broker


class ConsumerProcess:
    """`tests.faults.consumer`, started again whenever it was killed."""

    def __init__(self, data: Path, environment: dict[str, str]) -> None:
        self._data = data
        self._environment = {**os.environ, **environment}
        self.output = data / "consumer.log"

    def start(self) -> None:
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.consumer", str(self._data)],
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        self.kill()


def forwarder_of(gateway: GatewayProcess) -> int | None:
    """The pid of a gateway's forwarder, where it is running now."""
    children = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children")
    with suppress(OSError):
        for pid in children.read_text().split():
            if b"forward" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return int(pid)
    return None


class Chaos:
    """Kills until it has killed `kills` times, each kind in turn so that none is forgotten, the next one at random."""

    def __init__(
        self,
        brokers: Sequence[Broker],
        gateways: Sequence[GatewayProcess],
        consumer: ConsumerProcess,
        kills: int,
        pause_s: float,
        seed: int,
    ) -> None:
        """Of several brokers one is killed for good, of a single one none: it comes back each time."""
        self._brokers = list(brokers)
        self._gateways = gateways
        self._consumer = consumer
        self._kills = kills
        self._pause_s = pause_s
        self._random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.most_waiting = 0

    async def run(self, say: Callable[[str], None]) -> None:
        """Until all kills are done."""
        kinds = {"broker": self._broker, "gateway": self._gateway, "forwarder": self._forwarder, "consumer": self._eat}
        await asyncio.sleep(2)
        await self._stop_the_clock(say)
        while self.killed.total() < self._kills:
            least = min(self.killed[kind] for kind in kinds)
            kind = self._random.choice([kind for kind in kinds if self.killed[kind] <= least])
            if not await kinds[kind]():
                kinds.pop(kind)
                continue
            self.killed[kind] += 1
            say(f"killed {kind}, {self.killed.total()} of {self._kills}")
            await asyncio.sleep(self._random.uniform(0.5, 4.0))

    async def _broker(self) -> bool:
        if len(self._brokers) > 1:
            if self.killed["broker"]:
                return False
            self._brokers.pop(self._random.randrange(len(self._brokers))).signal(signal.SIGKILL)
            return True
        (broker,) = self._brokers
        broker.signal(signal.SIGKILL)
        await asyncio.sleep(self._random.uniform(0.0, 3.0))
        broker.start()
        await self._until(broker.ready)
        return True

    async def _gateway(self) -> bool:
        gateway = self._random.choice(self._gateways)
        gateway.process.kill()
        await asyncio.to_thread(gateway.process.wait)
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        gateway.start()
        await self._until(lambda: gateway.get("/readyz")[0] == 200)
        return True

    async def _forwarder(self) -> bool:
        gateway = self._random.choice(self._gateways)
        await self._until(lambda: forwarder_of(gateway) is not None)
        pid = forwarder_of(gateway)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return True

    async def _eat(self) -> bool:
        self._consumer.kill()
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        self._consumer.start()
        return True

    async def _stop_the_clock(self, say: Callable[[str], None]) -> None:
        """SIGSTOP: connections stay open and nothing answers, until more waits than may be on its way at once."""
        for broker in self._brokers:
            broker.signal(signal.SIGSTOP)
        say(f"all brokers are paused for {self._pause_s:g} s")
        await asyncio.sleep(self._pause_s)
        for broker in self._brokers:
            broker.signal(signal.SIGCONT)
        say("the brokers go on")

    @staticmethod
    async def _until(there: Callable[[], bool], patience_s: float = 120.0) -> None:
        deadline = time.monotonic() + patience_s
        while not await asyncio.to_thread(there):
            assert time.monotonic() < deadline, "what was killed did not come back"
            await asyncio.sleep(0.1)
