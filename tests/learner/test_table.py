"""Words about figures, in the table and in the documentation."""

import json
import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from learner.algorithms import ALGORITHMS
from learner.once import Divergence, LeftOut, Outcome
from learner.table import FIGURES, as_json, of_outcome
from thumbwheel.settings import FreshSettings, LearnerSettings, PPOSettings, RewardSettings

DOCUMENTED = (Path(__file__).parents[2] / "docs/learner.md").read_text()

OUTCOME = Outcome(
    log="log",
    algorithm="ppo",
    ups=1,
    downs=2,
    pairs=0,
    unreadable=0,
    figures={"loss": 0.5, "explained": math.nan, "unheard_of": 1.0},
    grad_norm=1.0,
    steps=1,
    tokens=10,
    seconds=2.0,
    tokens_per_second=5.0,
    peak_bytes=2**30,
    peak_device_bytes=2**31,
    left_out=[LeftOut(["f1"], "why \x1b[2J not")],
    reward=None,
    kl=Divergence(0.1, math.inf, 0.01, 8, 0.95, 4.0),
)


@pytest.mark.parametrize("name", [*ALGORITHMS, *FIGURES])
def test_every_algorithm_and_every_figure_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCUMENTED


@pytest.mark.parametrize("section", [LearnerSettings, FreshSettings, RewardSettings, PPOSettings])
def test_every_setting_is_documented(section: type[BaseModel]) -> None:
    fields = set(section.model_fields) - {"fresh", "reward", "ppo"}
    assert {name for name in fields if f"`{name}`" not in DOCUMENTED} == set()


def test_what_is_no_number_is_null_in_json() -> None:
    found = json.loads(as_json(OUTCOME))
    assert found["figures"] == {"loss": 0.5, "explained": None, "unheard_of": 1.0}
    assert found["kl"]["upper"] is None
    assert found["kl"]["inside"] is False


def test_the_table_shows_what_it_was_given_and_steers_no_terminal() -> None:
    shown = of_outcome(OUTCOME)
    for words in ("from 1 up, 2 down", "unheard_of", "nan", "5 ", "2 ", "GPU memory", "inf", "outside of the budget"):
        assert words in shown
    assert "why \xb7[2J not" in shown
    assert "\x1b[2J" not in shown
