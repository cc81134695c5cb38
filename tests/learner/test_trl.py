"""Losses and gradients against TRL 1.16: its own trainers, on the same tokens, the same tiny model and settings.

TRL runs its collator, its padded forward passes and its loss; ours are the learner's forward passes, bucket by bucket,
and the functions under test. TRL 1.16 has no PPO and no BCO trainer: BCO is compared with its pairwise form in DPO
here, and both with older trainers in test_older_trl.py.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from learner import bco, dpo, grpo, kto, reward
from learner.logprobs import Row, completion_hidden, token_logprobs
from learner.policy import Policy
from tests.learner.conftest import tiny
from tests.learner.trainers import CASES, MAX_LENGTH, ROWS, config, cut, dataset, policy, scored, tokenizer, trained
from tests.unavailable import unavailable
from thumbwheel.settings import Settings

# Warnings are TRL's own, of the engine that it could use among others.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More than one only wait for each other over a model this small, for most of the time where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trl() -> Any:
    """What of TRL is compared with. Without vLLM, whose import takes longer than all of this."""
    if importlib.util.find_spec("trl") is None:
        unavailable("needs TRL: install the extra dev")
    with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
        import trl

        names = [f"{kind}{part}" for kind in ("KTO", "DPO", "Reward", "GRPO") for part in ("Config", "Trainer")]
        return SimpleNamespace(**{name: getattr(trl, name) for name in names})


@pytest.fixture(scope="module", name="tokenizer")
def made_tokenizer() -> Any:
    return tokenizer()


@pytest.fixture
def ours(settings: Settings) -> Policy:
    return policy(settings)


@pytest.fixture
def theirs(settings: Settings, tmp_path: Path) -> Any:
    """The adapter as it is saved, on a model of its own that computes as peft and transformers do."""
    from peft import PeftModel

    policy(settings).save(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"), is_trainable=True).eval()


def agree(loss: Tensor, model: Any, expected: Tensor, their_model: Any, scale: float | None = None) -> None:
    """Both losses, and both gradients as one long vector, to 1e-5 of their size (`scale` for a loss that cancels)."""
    ours, theirs = trained(model), trained(their_model)
    assert ours.keys() == theirs.keys()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5 * scale if scale else 1e-12)
    mine, other = (
        torch.cat([part.flatten() for part in torch.autograd.grad(value, list(named.values()))])
        for value, named in ((loss, ours), (expected, theirs))
    )
    assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(trl: Any, tokenizer: Any, ours: Policy, theirs: Any, tmp_path: Path, kind: str, case: str) -> None:
    rows, ups = [row for row, _ in CASES[case]], torch.tensor([up for _, up in CASES[case]])
    trainer = trl.KTOTrainer(
        model=theirs,
        ref_model=tiny(),
        args=config(
            trl.KTOConfig, tmp_path, loss_type=kind, desirable_weight=1.3, undesirable_weight=0.9, max_length=MAX_LENGTH
        ),
        train_dataset=dataset({"prompt": "t2", "completion": " t3 t1", "label": True}),
        processing_class=tokenizer,
    )
    pairs = kto.mismatched([cut(row) for row in rows])
    if len(pairs) < len(rows):  # TRL needs one a row: give it what it would take itself
        pairs = [Row(row.prompt, rows[i - 1].completion) for i, row in enumerate(rows)]
    batch = [
        {"prompt_ids": row.prompt, "completion_ids": row.completion, "label": up}
        | ({"KL_completion_ids": pair.completion} if kind == "kto" else {})
        for row, pair, up in zip(rows, pairs, ups.tolist(), strict=True)
    ]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(batch))

    z0 = 0.0
    if kind == "kto":
        with torch.no_grad():
            z0 = kto.estimate_z0(*scored(ours, [cut(pair) for pair in pairs]))
        assert trainer._metrics["eval"]["kl"] == [pytest.approx(max(z0, 0), rel=1e-5, abs=1e-6)]
    weights = torch.where(ups, 1.3, 0.9)
    each = kto.losses(*scored(ours, [cut(row) for row in rows]), ups, weights, trainer.beta, z0)
    agree(each.sum() / len(rows), ours.model, expected, theirs)


PAIRS = {
    "five": [
        (prompt.prompt, row.completion, prompt.completion)
        for (prompt, _), (row, _) in zip(ROWS, ROWS[::-1], strict=True)
    ],
    "one": [([2, 3], [4, 5, 1], [6, 1])],
    "one prompt": [([2, 3], [4, 5, 1], [6, 1]), ([2, 3], [4, 5, 1], [7, 8, 9, 1]), ([2, 3], [10, 1], [6, 1])],
    "one token": [([2, 3], [4], [5]), ([6], [7], [8, 9, 10, 1]), ([11], [12, 13, 1], [14])],
    "cut off": [([2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [5, 1]), ([6, 7], [8, 9, 10, 11, 12, 13, 14], [4] * 9)],
}


def preference_trainer(trl: Any, tokenizer: Any, theirs: Any, place: Path, kind: str, **options: Any) -> Any:
    return trl.DPOTrainer(
        model=theirs,
        ref_model=tiny(),
        args=config(trl.DPOConfig, place, loss_type=[kind], max_length=MAX_LENGTH, **options),
        train_dataset=dataset({"prompt": "t2", "chosen": " t3 t1", "rejected": " t4 t1"}),
        processing_class=tokenizer,
    )


def sides(case: str) -> tuple[list[Row], list[Row]]:
    chosen = [cut(Row(prompt, answer)) for prompt, answer, _ in PAIRS[case]]
    return chosen, [cut(Row(prompt, answer)) for prompt, _, answer in PAIRS[case]]


def pairs_batch(case: str) -> list[dict[str, Any]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, pair, strict=True)) for pair in PAIRS[case]]


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("kind", ["sigmoid", "robust", "ipo"])
def test_dpo(trl: Any, tokenizer: Any, ours: Policy, theirs: Any, tmp_path: Path, kind: str, case: str) -> None:
    trainer = preference_trainer(trl, tokenizer, theirs, tmp_path, kind, label_smoothing=0.2, beta=0.2)
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(pairs_batch(case)))

    chosen, rejected = sides(case)
    policy, reference = scored(ours, chosen + rejected)
    (better, worse), weights = (policy - reference).chunk(2), torch.ones(len(chosen))
    if kind == "sigmoid":
        each = dpo.sigmoid(better, worse, weights, 0.2)
    elif kind == "robust":
        each = dpo.robust(better, worse, weights, 0.2, flipped=0.2)
    else:
        lengths = [torch.tensor([len(row.completion) for row in side]) for side in (chosen, rejected)]
        each = dpo.ipo(better, worse, lengths[0], lengths[1], weights, 0.2)
    agree(each.mean(), ours.model, expected, theirs)


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("delta", [0.0, 0.3, -0.2])
def test_bco(trl: Any, tokenizer: Any, ours: Policy, theirs: Any, tmp_path: Path, delta: float, case: str) -> None:
    """`bco_pair` has no δ; a reference whose log-probs are all larger by δ/β has the same effect."""
    trainer = preference_trainer(trl, tokenizer, theirs, tmp_path, "bco_pair")
    trainer.precompute_ref_logps = True
    chosen, rejected = sides(case)
    policy, reference = scored(ours, chosen + rejected)
    shifted = (reference + delta / trainer.beta).chunk(2)
    batch = [
        pair | {"ref_chosen_logps": shifted[0][i].item(), "ref_rejected_logps": shifted[1][i].item()}
        for i, pair in enumerate(pairs_batch(case))
    ]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(batch))

    ups = torch.tensor([True] * len(chosen) + [False] * len(rejected))
    each = bco.losses(policy, reference, ups, torch.ones(len(ups)), trainer.beta, delta)
    agree(each.sum() / len(chosen), ours.model, expected, theirs)


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("centre", [0.01, None])
def test_the_reward_models_pair_loss(trl: Any, tokenizer: Any, tmp_path: Path, centre: float | None, case: str) -> None:
    from transformers import LlamaForSequenceClassification

    made = tiny().config
    made.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(made).eval()
    their_model = LlamaForSequenceClassification(made).eval()
    their_model.load_state_dict(model.state_dict())
    trainer = trl.RewardTrainer(
        model=their_model,
        args=config(trl.RewardConfig, tmp_path, center_rewards_coefficient=centre),
        train_dataset=dataset({"chosen": "t2 t3 t1", "rejected": "t2 t4 t1"}),
        processing_class=tokenizer,
    )
    batch = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected} for prompt, chosen, rejected in PAIRS[case]
    ]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(batch))

    def scores(side: str) -> Tensor:
        return torch.cat([model(input_ids=torch.tensor([row[side]])).logits[:, 0] for row in batch])

    weights = torch.ones(len(batch))
    each = reward.pair_losses(scores("chosen_ids"), scores("rejected_ids"), weights, centre or 0.0)
    agree(each.mean(), model, expected, their_model)


GROUPS = {
    "two groups": (3, [[4, 5, 1], [6, 1], [7, 8, 9, 1], [10, 1], [11, 12, 1], [13, 14, 15, 1]]),
    "one group": (3, [[4, 5, 1], [6, 1], [7, 8, 9, 1]]),
    "one answer": (1, [[4, 5, 1]]),
    "one token": (2, [[4], [5], [6], [7, 8, 9, 1]]),
    "cut off": (2, [[4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15], [16, 1], [17, 18, 19, 20, 21, 22]]),
    "twice the same": (4, [[4, 5, 1], [4, 5, 1], [6, 7, 1], [6, 7, 1]]),
}


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("kind", ["defaults", "on policy", "penalty", "paper", "gspo"])
def test_grpo(trl: Any, tokenizer: Any, ours: Policy, theirs: Any, tmp_path: Path, kind: str, case: str) -> None:
    size, completions = GROUPS[case]
    rows = [Row([2, 3] if i < size else [20], completion) for i, completion in enumerate(completions)]
    groups = torch.tensor([i // size for i in range(len(rows))])
    rewards = torch.linspace(-1, 1, len(rows)).sin().tolist()
    if case == "twice the same":
        rewards = [0.1, 0.1, 0.7, 0.7]
    options: dict[str, Any] = {"loss_type": "grpo"} if kind in ("paper", "gspo") else {}
    if kind == "gspo":
        options |= {"epsilon": grpo.SEQUENCE_LOW, "epsilon_high": grpo.SEQUENCE_HIGH}
        options |= {"importance_sampling_level": "sequence"}
    trainer = trl.GRPOTrainer(
        model=theirs,
        reward_funcs=lambda completions, **_: rewards,
        rollout_func=lambda *_: {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(completion) for completion in completions],
        },
        args=config(trl.GRPOConfig, tmp_path, num_generations=2, per_device_train_batch_size=2, **options),
        train_dataset=dataset({"prompt": "t2"}),
        processing_class=tokenizer,
    )
    trainer.num_generations_eval = size
    inputs = trainer._prepare_inputs([{"prompt": "t2"}] * len(rows))
    advantages = grpo.advantages(torch.tensor(rewards), groups)
    torch.testing.assert_close(advantages, inputs["advantages"], rtol=1e-5, atol=1e-6)

    lengths = [len(row.completion) for row in rows]
    targets = torch.tensor([id for row in rows for id in row.completion])

    def padded(values: Tensor) -> Tensor:
        return pad_sequence(list(torch.split(values, lengths)), batch_first=True)

    policy = padded(token_logprobs(ours.model, completion_hidden(ours.model, rows), targets))
    mask = padded(torch.ones(len(targets))).bool()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(policy.shape, generator=generator)
    old = policy.detach() + noise * (2e-4 if kind == "gspo" else 0.2)  # some ratios beyond the clip, some inside
    reference = policy.detach() + noise.roll(1, 0) * 0.3
    if kind == "on policy":
        old = policy.detach()
    else:
        inputs["old_per_token_logps"] = old
    if kind == "penalty":
        trainer.beta, inputs["ref_per_token_logps"] = 0.04, reference
    expected = trainer.compute_loss(trainer.model, inputs)

    if kind == "gspo":
        loss = grpo.sequence_losses(policy, old, advantages, mask).mean()
    else:
        penalty: dict[str, Any] = {"reference": reference, "beta": 0.04} if kind == "penalty" else {}
        each = grpo.token_losses(policy, old, advantages, mask, **penalty)
        loss = (each.sum(-1) / mask.sum(-1)).mean() if kind == "paper" else each.sum() / mask.sum()
    agree(loss, ours.model, expected, theirs, scale=1.0)
