"""What the trainers of TRL 1.12 compute, the last that has PPO and BCO: in a process of its own, beside 1.16.

    python -m tests.learner.older_trl ADAPTER FILE

`PLACE`, where it is installed, has to come first on the path of that process. FILE gets a dictionary: `bco` of what its
trainer makes of each of `CASES` on the tiny model with ADAPTER, `ppo` of each of `RUNS` what its trainer had sampled,
scored and worked out when it went backward, read off the frame that called.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.learner.conftest import VOCABULARY, tiny
from tests.learner.trainers import CASES, MAX_LENGTH, config, cut, dataset, tokenizer, trained

PLACE = Path(sys.prefix) / "oracles"
VERSION = "1.12.0"

KL_COEFFICIENT = 0.2
PENALTY = 1.5
"""Taken off the score of an answer that is cut off."""

RUNS: dict[str, dict[str, Any]] = {
    # As long as they may be, each: in 1.12 an answer that ends before has one more state, past its end, with the score.
    "whole": {"gamma": 1.0, "lam": 0.95},
    "discounted": {"gamma": 0.9, "lam": 0.5},
    # That changes nothing where no value is foretold and nothing is discounted.
    "ragged": {"gamma": 1.0, "lam": 1.0, "stop_token": "eos", "missing_eos_penalty": PENALTY},
}
ANSWERS = 8
LENGTH = 12
KEPT = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns", "padding_mask")
"""Of the trainer's, about all answers; scores have the penalty taken off, advantages are whitened."""


def bco(adapter: str, place: Path) -> dict[str, Any]:
    """Loss, δ and the gradient of each trained weight, by case."""
    from peft import PeftModel
    from trl.experimental.bco import BCOConfig, BCOTrainer  # type: ignore[import-not-found]

    found = {}
    for case, labelled in CASES.items():
        model = PeftModel.from_pretrained(tiny(), adapter, is_trainable=True).eval()
        trainer = BCOTrainer(
            model=model,
            ref_model=tiny(),
            args=config(BCOConfig, place, max_length=MAX_LENGTH),
            train_dataset=dataset({"prompt": "t2", "completion": " t3 t1", "label": True}),
            processing_class=tokenizer(),
        )
        batch = trainer.data_collator(
            [
                {
                    "completion_input_ids": row.prompt + row.completion,
                    "completion_attention_mask": [1] * len(row),
                    "completion_labels": [-100] * len(row.prompt) + row.completion,
                    "label": up,
                }
                for row, up in ((cut(row), up) for row, up in labelled)
            ]
        )
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        slopes = {name: parameter.grad for name, parameter in trained(model).items()}
        found[case] = {"loss": loss.item(), "delta": trainer.running.mean, "beta": trainer.beta, "slopes": slopes}
    return found


def ppo(options: dict[str, Any], place: Path) -> dict[str, Any]:
    """One update in three passes over its own samples of the tiny model, in fp64, with a large step after each."""
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    def scalar(seed: int) -> Any:
        made = tiny().config
        made.num_labels = 1
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(made).double().eval()

    value, padding = scalar(3), VOCABULARY  # a padding token that is never sampled
    if options.get("stop_token"):
        torch.nn.init.zeros_(value.score.weight)
    prompts = dataset(*({"input_ids": [2 + i, 11]} for i in range(ANSWERS)))
    trainer = PPOTrainer(
        args=config(
            PPOConfig,
            place,
            per_device_train_batch_size=ANSWERS,
            local_rollout_forward_batch_size=ANSWERS,
            num_mini_batches=1,
            num_ppo_epochs=3,
            total_episodes=ANSWERS,
            num_sample_generations=0,
            save_strategy="no",
            response_length=LENGTH,
            temperature=1.0,
            learning_rate=0.02,
            kl_coef=KL_COEFFICIENT,
            vf_coef=1.0,
            **options,
        ),
        processing_class=tokenizer(padding),
        model=tiny(torch.float64, seed=1),
        ref_model=tiny(torch.float64, seed=2),
        reward_model=scalar(4),
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts,
    )
    found: dict[str, Any] = {"steps": []}
    backward = trainer.accelerator.backward

    def read(loss: torch.Tensor) -> None:
        known = sys._getframe(1).f_locals
        slopes = torch.autograd.grad(loss, [known["new_logprobs"], known["vpred"]], retain_graph=True)
        found.update({name: known[name].clone() for name in KEPT} | {"ended": known["contain_eos_token"].clone()})
        found["steps"].append(
            {
                "rows": torch.as_tensor(known["micro_batch_inds"]),
                "policy": known["new_logprobs"].detach(),
                "values": known["vpred"].detach(),
                "policy_loss": known["pg_loss"].item(),
                "value_loss": known["vf_loss"].item(),
                "policy_slopes": slopes[0],
                "value_slopes": slopes[1],
            }
        )
        backward(loss)

    trainer.accelerator.backward = read
    trainer.train()
    return found


def main(adapter: str, file: str) -> None:
    with mock.patch("trl.import_utils.is_vllm_available", return_value=False):  # it takes longer than all of this
        import trl
    assert trl.__version__ == VERSION, trl.__version__
    with tempfile.TemporaryDirectory() as place:
        runs = {name: ppo(options, Path(place)) for name, options in RUNS.items()}
        torch.save({"bco": bco(adapter, Path(place)), "ppo": runs}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
