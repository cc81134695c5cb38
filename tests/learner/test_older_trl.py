"""BCO and PPO against the last trainers of TRL that have them, which run in a process of their own (older_trl.py)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner import bco, ppo
from learner.policy import Policy
from tests.learner.older_trl import KL_COEFFICIENT, PENALTY, PLACE, RUNS
from tests.learner.trainers import CASES, cut, policy, scored, trained
from tests.unavailable import unavailable
from thumbwheel.settings import EngineSettings, LearnerSettings, Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ours(tiny_dir: Path) -> Policy:
    learner = LearnerSettings(target_modules=["o_proj", "down_proj"])
    return policy(Settings(engine=EngineSettings(model=tiny_dir), learner=learner))


@pytest.fixture(scope="module")
def theirs(ours: Policy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What that process found."""
    if not PLACE.exists():
        unavailable("needs an older TRL beside the one of the extra dev: make setup")
    place = tmp_path_factory.mktemp("older")
    ours.save(place / "adapter")
    path = os.pathsep.join([str(PLACE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.learner.older_trl", str(place / "adapter"), str(place / "found")]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(place / "found")


@pytest.mark.parametrize("case", CASES)
def test_bco_is_their_loss_and_their_gradient(ours: Policy, theirs: Any, case: str) -> None:
    expected = theirs["bco"][case]
    rows, ups = [cut(row) for row, _ in CASES[case]], torch.tensor([up for _, up in CASES[case]])
    weights = torch.ones(len(rows))
    loss = bco.losses(*scored(ours, rows), ups, weights, expected["beta"], expected["delta"]).mean()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    named = trained(ours.model)
    assert named.keys() == expected["slopes"].keys()
    slopes = torch.autograd.grad(loss, list(named.values()))
    mine, other = (torch.cat([each.flatten() for each in side]) for side in (slopes, expected["slopes"].values()))
    assert (mine - other).norm() <= 1e-5 * other.norm()


def test_the_midpoint_is_their_shift_where_the_classes_are_of_one_size(ours: Policy, theirs: Any) -> None:
    """Theirs is the mean of all rows."""
    rows, ups = [row for row, _ in CASES["two"]], torch.tensor([up for _, up in CASES["two"]])
    expected = theirs["bco"]["two"]
    midpoint = bco.midpoint(*scored(ours, rows), ups, torch.ones(2), expected["beta"])
    assert midpoint == pytest.approx(expected["delta"], rel=1e-5)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("run", RUNS)
def test_ppos_rewards_and_advantages_are_theirs(theirs: Any, run: str) -> None:
    found, options = theirs["ppo"][run], RUNS[run]
    mask, ended = ~found["padding_mask"], found["ended"]
    penalty = PENALTY if run == "ragged" else 0.0
    scores = found["scores"] + penalty * ~ended
    rewards = ppo.token_rewards(scores, found["logprobs"], found["ref_logprobs"], mask, KL_COEFFICIENT, ended, penalty)
    close(rewards.sum(-1), found["rewards"].sum(-1))
    if run == "ragged":  # there the score is one token later
        assert 0 < ended.sum() < len(ended)
    else:
        close(rewards, found["rewards"])
    estimates, returns = ppo.advantages(rewards, found["values"], mask, options["gamma"], options["lam"])
    close(torch.where(mask, returns, 0.0), torch.where(mask, found["returns"], 0.0))
    # Their variance is that of a sample.
    count = mask.sum()
    close(ppo.whiten(estimates, mask) * ((count - 1) / count).sqrt(), found["advantages"])


def slope(of: Tensor, at: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(of, at)
    return gradient


@pytest.mark.parametrize("run", RUNS)
def test_ppos_losses_and_gradients_are_theirs(theirs: Any, run: str) -> None:
    found = theirs["ppo"][run]
    assert len(found["steps"]) == 3
    for step in found["steps"]:
        rows = step["rows"]
        mask = ~found["padding_mask"][rows]
        ours, values = step["policy"].requires_grad_(), step["values"].requires_grad_()
        loss = ppo.policy_losses(ours, found["logprobs"][rows], found["advantages"][rows], mask).sum() / mask.sum()
        assert loss.item() == pytest.approx(step["policy_loss"], rel=1e-6, abs=1e-9)
        close(slope(loss, ours), step["policy_slopes"])
        if run != "ragged":  # there one state an answer is more
            each = ppo.value_losses(values, found["values"][rows], found["returns"][rows], mask)
            value_loss = each.sum() / mask.sum()
            assert value_loss.item() == pytest.approx(step["value_loss"], rel=1e-6)
            close(slope(value_loss, values), step["value_slopes"])
    change = (step["policy"] - found["logprobs"][rows]).exp()[mask] - 1
    of_values = (step["values"] - found["values"][rows])[mask]
    for moved in (change.abs(), of_values.abs()):  # in the last pass some are clipped, so that this is compared, too
        assert (moved > ppo.CLIP).any()
        assert (moved < ppo.CLIP).any()
