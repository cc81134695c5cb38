"""The learner's intake as a process that may be killed: what it has counted lies in its buffer.

python -m tests.faults.consumer DATA        settings from the environment, as `thumbwheel learn` would have them
"""

import sys
from pathlib import Path

from learner.buffer import Buffer
from learner.intake import Intake
from thumbwheel.daemon import Daemon, configure_logging
from thumbwheel.log import open_log
from thumbwheel.settings import load

VOCABULARY = 100_000


def buffer(data: Path, identity: str) -> Buffer:
    """The buffer of the run."""
    return Buffer(data / "buffer.sqlite", VOCABULARY, lambda prompt: False, identity)


def main(data: Path) -> None:
    """Take in until told to stop."""
    configure_logging("consumer")
    log = open_log(load())
    intake: list[Intake] = []

    def step() -> bool:
        if not intake:
            intake.append(Intake(log, buffer(data, log.identity)))
        return intake[0].poll()

    Daemon(0).run(step, 0.05, 2.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
