"""The forwarder's process, kept running for as long as the gateway runs (see `thumbwheel/log/kafka/forwarder.py`).

A process of its own: whatever the cluster does, and however hard Kafka's client works, no request waits for it.
"""

import asyncio
import logging
import sys
import time
from pathlib import Path

from prometheus_client import Counter

from thumbwheel import process

logger = logging.getLogger(__name__)

restarts = Counter("thumbwheel_gateway_forwarder_restarts", "Times that the forwarder ended and was started again")

POLL_S = 0.2
AGAIN_S, LONGEST_AGAIN_S = 1.0, 30.0
"""Pauses before it is started again; they grow while it ends at once."""
GRACE_S = 10.0


class ForwarderProcess:
    """Starts it, starts it again, and ends it last: it still has to carry the gateway's leave."""

    def __init__(self, config: Path | None) -> None:
        self._argv = [sys.executable, "-m", "thumbwheel.cli", *(["--config", str(config)] if config else []), "forward"]

    async def run(self) -> None:
        """Until cancelled."""
        pause, started = 0.0, time.monotonic()
        child = process.start(self._argv)
        try:
            while True:
                await asyncio.sleep(POLL_S)
                if (code := child.poll()) is not None:
                    lived = time.monotonic() - started
                    pause = AGAIN_S if lived > LONGEST_AGAIN_S else min(max(AGAIN_S, 2 * pause), LONGEST_AGAIN_S)
                    logger.error("the forwarder ended with %d; it is started again in %g s", code, pause)
                    restarts.inc()
                    await asyncio.sleep(pause)
                    started = time.monotonic()
                    child = process.start(self._argv)
        finally:
            process.stop(child, GRACE_S)
