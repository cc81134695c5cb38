"""One process of several that `torchrun` starts: an update by each algorithm, whose weights the first one writes."""

import sys
from pathlib import Path

import torch

from learner import ranks
from learner.compute import follow
from learner.policy import Policy
from tests.learner.conftest import tiny
from tests.learner.making import SYSTEM, VARIANTS, Made, change, examples_for
from thumbwheel.settings import Settings


def updated(settings: Settings, variant: str, processes: ranks.Ranks) -> dict[str, torch.Tensor] | None:
    """The adapter's weights on rank 0, after an update and one on prompts that begin alike; None elsewhere."""
    policy = Policy(tiny(), settings, "sha256:test")
    made = Made(policy, change(settings.learner, **VARIANTS[variant]), processes)
    if processes.rank:
        follow(policy, made.algorithm, processes)
        return None
    for system in ((), SYSTEM):
        made.trainer.update(examples_for(made, system))
    made.compute.dismiss()
    return policy.weights()


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = Settings.model_validate_json(sys.argv[1])
    processes = ranks.join()
    results = {variant: updated(settings, variant, processes) for variant in VARIANTS}
    if not processes.rank:
        torch.save(results, Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
