"""The learner daemon: `thumbwheel learn`. Nothing heavy is imported before it runs."""

import fcntl
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from thumbwheel.daemon import Daemon, configure_logging
from thumbwheel.errors import SettingsError, ThumbwheelError
from thumbwheel.log import open_log

if TYPE_CHECKING:
    from thumbwheel.settings import Settings


def run(settings: "Settings") -> None:
    """Learn from votes until SIGTERM or SIGINT, which end it within seconds and lose nothing.

    Raises SettingsError for settings that cannot work, ThumbwheelError where another learner has the same data.
    """
    configure_logging("learner")
    check(settings)
    if int(os.environ.get("RANK", "0")):
        _follow(settings)
        return
    place = settings.path(Path("learner"))
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ThumbwheelError(f"another learner is running on {place}: there may be one") from error

    from learner import ranks
    from learner.loop import Learner
    from learner.policy import Policy

    daemon = Daemon(settings.learner.metrics_port)
    log = open_log(settings)
    learner: Learner | None = None
    try:
        processes = ranks.join()
        policy = Policy.load(settings)

        def step() -> bool:
            nonlocal learner
            if learner is None:  # its start reads the log, and the daemon waits for that
                learner = Learner(settings, log, policy, daemon.should_exit, processes)
            return learner.step()

        daemon.run(step, settings.learner.poll_s)
    finally:
        if learner is not None:
            learner.close()
        log.close()
        os.close(lock)


def _follow(settings: "Settings") -> None:
    """Share the updates of the process that `torchrun` gave rank 0, and leave with it."""
    from learner import ranks
    from learner.algorithms import make
    from learner.compute import follow
    from learner.policy import Policy

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    processes = ranks.join()
    policy = Policy.load(settings)
    follow(policy, make(settings.learner, policy.width), processes)


def check(settings: "Settings") -> None:
    """Raise SettingsError where an adapter of these settings could not be served or learned."""
    rank, served = settings.learner.rank, settings.engine.max_lora_rank
    if rank > served:
        raise SettingsError(
            f"[learner] rank is {rank}, but the engine serves adapters up to rank {served}: lower it, or raise "
            "[engine] max_lora_rank"
        )
