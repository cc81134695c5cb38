"""Which algorithms there are, by the names that `[learner] algorithm` takes."""

from learner.algorithm import Algorithm
from learner.bco import BCO
from learner.dpo import DPO
from learner.grpo import GRPO, GSPO
from learner.kto import KTO
from learner.ppo import PPO, LoggedPPO
from thumbwheel.errors import SettingsError
from thumbwheel.settings import LearnerSettings

ALGORITHMS: dict[str, type[Algorithm]] = {
    "kto": KTO,
    "bco": BCO,
    "dpo": DPO,
    "ppo": PPO,
    "ppo-logged": LoggedPPO,
    "grpo": GRPO,
    "gspo": GSPO,
}


def find(settings: LearnerSettings) -> type[Algorithm]:
    """The one that is set. Raises SettingsError where there is none of that name."""
    if settings.algorithm not in ALGORITHMS:
        raise SettingsError(f"[learner] algorithm is {settings.algorithm!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[settings.algorithm]


def make(settings: LearnerSettings, width: int) -> Algorithm:
    """As `find`, for a model with hidden states of this width."""
    return find(settings)(settings, width)
