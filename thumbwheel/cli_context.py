"""What the commands share: the settings, the log that they name, the option for scripts, and how printing ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from thumbwheel.log import Log
    from thumbwheel.rollout import Rollout
    from thumbwheel.settings import Settings

as_json = click.option("--json", "json_", is_flag=True, help="Print JSON, for scripts.")


class Context:
    """The settings, read when a command first asks for them."""

    def __init__(self, config: Path | None) -> None:
        self.config = config

    @property
    def settings(self) -> Settings:
        from thumbwheel.settings import load

        return load(self.config)

    def log(self, settings: Settings) -> Log:
        """The log that the settings name; it is closed when the command ends."""
        from thumbwheel.log import open_log

        log = open_log(settings)
        click.get_current_context().call_on_close(log.close)
        return log

    def rollout(self, log: Log) -> Rollout:
        from thumbwheel.reader import RolloutFollower

        follower = RolloutFollower(log)
        follower.poll()
        return follower.state


pass_context = click.make_pass_decorator(Context)


def known_topic(topic: str) -> None:
    """Raises UsageError where the log has no such topic."""
    from thumbwheel.log.copy import ALL

    if topic not in ALL:
        raise click.UsageError(f"no topic {topic}; there are {', '.join(ALL)}")


@contextlib.contextmanager
def until_closed() -> Iterator[None]:
    """Ctrl-C and a reader that went away (`| head`) end a command that prints in good order."""
    try:
        yield
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes nowhere
