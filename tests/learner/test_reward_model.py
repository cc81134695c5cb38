"""The reward model learns what votes say of answers, refuses what they do not say, and leaves the policy alone."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from learner import reward, reward_report, reward_training
from learner.examples import Pair, Thumb
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy
from learner.reward_model import NoSignal, RewardModel, fit, work
from learner.reward_training import Context, Votes, split
from learner.scorer import Scorer
from tests.learner.conftest import move, tiny
from thumbwheel.errors import AdapterError, SettingsError, ThumbwheelError
from thumbwheel.settings import LearnerSettings, RewardSettings, Settings

pytestmark = pytest.mark.slow

GOOD, BAD = 7, 8
"""The last token of answers that users like, and of those that they do not."""
PROMPTS = [[2, 3], [4, 5], [6, 2, 3]]
ROWS = [Row([2, 3], [9, 10, token]) for token in (GOOD, BAD)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chosen() -> LearnerSettings:
    fitting = RewardSettings(learning_rate=1e-2, epochs=4, batch=8, samples=16)
    return LearnerSettings(target_modules=["o_proj", "down_proj"], max_tokens=8, reward=fitting)


@pytest.fixture
def policy(settings: Settings) -> Policy:
    policy = Policy(tiny(), settings, "sha256:test")
    move(policy, 0.3)
    return policy


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(9, 32, (count,), generator=generator).tolist()


def draw(count: int, generator: torch.Generator, last: int) -> list[int]:
    return [*ids(count, generator), last]


def thumbs(count: int, seed: int = 0) -> list[Thumb]:
    """Ups on answers that end well, downs on others; lengths of 3 to 8 tokens, the same for both."""
    generator = numbers(seed)
    lengths = torch.randint(2, 8, (count,), generator=generator).tolist()
    return [
        Thumb(f"f{i}", ids(4, generator), draw(length, generator, GOOD if i % 2 else BAD), i % 2 == 1, [])
        for i, length in enumerate(lengths)
    ]


def pairs(count: int, seed: int = 1) -> list[Pair]:
    generator = numbers(seed)
    return [
        Pair(
            (f"w{i}", f"l{i}"),
            ids(4, generator),
            draw(2 + i % 4, generator, GOOD),
            draw(2 + i % 3, generator, BAD),
            "votes",
        )
        for i in range(count)
    ]


def fitted(
    policy: Policy, chosen: LearnerSettings, of: Sequence[Thumb], and_of: Sequence[Pair] = (), seed: int = 0
) -> RewardModel:
    return fit(policy, of, and_of, PROMPTS, chosen, numbers(seed))


def apart(model: RewardModel) -> float:
    good, bad = model.score(ROWS).tolist()
    return float(good - bad)


# --- what it learns ---


def test_it_learns_from_thumbs_alone(policy: Policy, chosen: LearnerSettings) -> None:
    model = fitted(policy, chosen, thumbs(160))
    assert apart(model) > 1
    seen = model.report.held_out
    assert seen.auc is not None
    assert seen.auc.low > 0.7
    assert seen.accuracy is not None
    assert seen.accuracy.estimate > 0.8
    assert seen.brier is not None
    assert seen.brier < 0.2
    assert (seen.pairs, seen.pair_accuracy) == (0, None)
    assert model.report.thumbs + seen.ups + seen.downs == 160


def test_it_learns_from_pairs_alone(policy: Policy, chosen: LearnerSettings) -> None:
    model = fitted(policy, chosen, [], pairs(100))
    assert apart(model) > 1
    seen = model.report.held_out
    assert seen.pair_accuracy is not None
    assert seen.pair_accuracy.low > 0.8
    assert (seen.ups, seen.downs, seen.auc, seen.accuracy, seen.brier) == (0, 0, None, None, None)


def test_it_learns_from_both_what_either_says(policy: Policy, chosen: LearnerSettings) -> None:
    """Thumbs tell GOOD from BAD, pairs alone tell 20 from 21: the scores know both."""
    other = [dataclasses.replace(p, chosen=[*p.chosen[:-1], 20], rejected=[*p.rejected[:-1], 21]) for p in pairs(100)]
    model = fitted(policy, chosen, thumbs(160), other)
    assert apart(model) > 0.5
    better, worse = model.score([Row([2, 3], [9, 10, token]) for token in (20, 21)]).tolist()
    assert better - worse > 0.5


def test_rewards_are_spreads_above_what_the_reference_does(policy: Policy, chosen: LearnerSettings) -> None:
    model = fitted(policy, chosen, thumbs(160))
    report = model.report
    expected = ((model.score(ROWS) - report.mean) / report.spread).clamp(-5, 5)
    assert model.rewards(ROWS).tolist() == pytest.approx(expected.tolist())
    assert report.spread > 0
    assert 0 < report.spread_within < 2 * report.spread
    assert not model.score(ROWS).requires_grad


def test_a_lavish_users_ups_are_not_his_answers_merit(policy: Policy, chosen: LearnerSettings) -> None:
    """Nothing but the user decides, and the one who likes all he gets mostly gets GOOD; the score is not taken in."""
    generator = numbers()

    def theirs(i: int, thumb: Thumb) -> Thumb:
        lavish = torch.rand((), generator=generator).item() < (0.8 if i % 2 else 0.2)
        up = torch.rand((), generator=generator).item() < (0.95 if lavish else 0.05)
        return dataclasses.replace(thumb, user="lavish" if lavish else "harsh", up=up)

    votes = [theirs(i, thumb) for i, thumb in enumerate(thumbs(400))]

    def gap(of: list[Thumb]) -> float:
        scorer = Scorer(policy, chosen.rank, chosen.lora_alpha, chosen.target_modules, numbers())
        reward_training.train(scorer, Context(of), Votes(of, []), chosen, numbers())
        good, bad = scorer.score([Row(t.prompt, [*t.completion[:-1], end]) for end in (GOOD, BAD) for t in of]).chunk(2)
        return (good - bad).mean().item()

    assert abs(gap(votes)) < 0.4 * gap([dataclasses.replace(thumb, user="") for thumb in votes])


def test_length_is_shared_between_its_effect_and_what_the_score_sees_of_it(
    policy: Policy, chosen: LearnerSettings
) -> None:
    """Only length decides. With the effect held at zero the score learns it; with it, less of it, but not nothing."""
    votes = [dataclasses.replace(thumb, up=len(thumb.completion) > 5) for thumb in thumbs(300)]

    def slope(ridge: float) -> tuple[float, float]:
        """Score, in logits, for a doubling of length; and the length effect."""
        fitting = chosen.reward.model_copy(update={"ridge": ridge})
        scorer = Scorer(policy, chosen.rank, chosen.lora_alpha, chosen.target_modules, numbers())
        context = Context(votes)
        asked = chosen.model_copy(update={"reward": fitting})
        reward_training.train(scorer, context, Votes(votes, []), asked, numbers())
        scores = scorer.score([Row(thumb.prompt, thumb.completion) for thumb in votes])
        x = torch.tensor([len(thumb.completion) for thumb in votes]).log2()
        x -= x.mean()
        return ((x @ scores) / (x @ x)).item(), context.effects.length.item()

    alone, none = slope(1e6)
    shared, effect = slope(1.0)
    assert abs(none) < 0.05
    assert effect > 0.5
    assert 0 < shared < 0.8 * alone


# --- what it refuses ---


def test_votes_that_are_noise_are_refused(policy: Policy, chosen: LearnerSettings) -> None:
    """But for the twentieth that the confidence lets through: one in five already is three times as many."""
    why = []
    for seed in range(5):
        random = torch.rand(160, generator=numbers(seed + 200)) < 0.5
        noise = [dataclasses.replace(t, up=bool(up)) for t, up in zip(thumbs(160, seed), random, strict=True)]
        try:
            fitted(policy, chosen, noise, seed=seed)
        except NoSignal as error:
            why.append(str(error))
    assert len(why) >= 4
    assert all(re.search(r"no reward: .* \d+% of cases .*Chance is 50%.* \d+ up, \d+ down", one) for one in why)


def test_pairs_that_are_noise_are_refused(policy: Policy, chosen: LearnerSettings) -> None:
    noise = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) if i % 2 else p
             for i, p in enumerate(pairs(100))]  # fmt: skip
    with pytest.raises(NoSignal, match="better answer of a pair"):
        fitted(policy, chosen, [], noise)


def test_too_few_held_out_votes_are_refused_before_anything_is_learned(policy: Policy, chosen: LearnerSettings) -> None:
    def never(done: int) -> None:
        raise AssertionError("it began")

    few = [thumb for thumb in thumbs(160) if thumb.up][:20]
    with pytest.raises(NoSignal, match=r"\d thumbs up, 0 thumbs down and 0 pairs\. It takes .*5 more thumbs down"):
        fit(policy, few, [], PROMPTS, chosen, numbers(), never)
    with pytest.raises(NoSignal, match="too few votes"):
        fit(policy, [], [], PROMPTS, chosen, numbers(), never)
    with pytest.raises(SettingsError, match="no prompts"):
        fit(policy, thumbs(160), [], [], chosen, numbers(), never)


def test_votes_that_are_all_held_out_are_refused(policy: Policy, chosen: LearnerSettings) -> None:
    _, held_out = split(thumbs(160), [], 0.2)
    with pytest.raises(NoSignal, match="nothing to learn from"):
        fitted(policy, chosen, held_out.thumbs)


def test_a_reference_whose_answers_all_score_alike_is_no_signal(
    policy: Policy, chosen: LearnerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.reward_model.sample", lambda *_: [ROWS[0]] * 16)
    with pytest.raises(NoSignal, match="tells no answer from another"):
        fitted(policy, chosen, thumbs(160))


def test_a_model_whose_numbers_are_not_finite_is_an_error(policy: Policy, chosen: LearnerSettings) -> None:
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[GOOD] = float("nan")
    with pytest.raises(ThumbwheelError, match="gradient of the reward model is not finite"):
        fitted(policy, chosen, thumbs(160))


def test_modules_that_the_reward_model_cannot_adapt_are_a_clear_error(policy: Policy) -> None:
    with pytest.raises(SettingsError, match="none of no_proj"):
        Scorer(policy, 8, 16, ["no_proj"], numbers())
    with pytest.raises(SettingsError, match="embed_tokens is a Embedding"):
        Scorer(policy, 8, 16, ["embed_tokens"], numbers())


# --- what it leaves alone ---


def test_a_fit_leaves_the_policy_as_it_was(policy: Policy, chosen: LearnerSettings) -> None:
    def figures() -> list[float]:
        with torch.no_grad():
            ours = sequence_logprobs(policy.model, ROWS)
            with policy.reference():
                return [*ours.tolist(), *sequence_logprobs(policy.model, ROWS).tolist()]

    parameters, weights, before = policy.parameters(), policy.weights(), figures()
    model = fitted(policy, chosen, thumbs(160))
    model.rewards(ROWS)
    assert figures() == before
    assert all(ours is theirs for ours, theirs in zip(policy.parameters(), parameters, strict=True))
    assert policy.weights().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.weights().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    assert sum(p.requires_grad for p in policy.model.parameters()) == len(parameters)
    assert not any(module._forward_hooks for module in policy.model.modules())


def test_a_fit_that_is_stopped_leaves_the_policy_as_it_was(policy: Policy, chosen: LearnerSettings) -> None:
    before = sequence_logprobs(policy.model, ROWS).tolist()

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(policy, thumbs(160), [], PROMPTS, chosen, numbers(), stop)
    assert sequence_logprobs(policy.model, ROWS).tolist() == before
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_scores_do_not_depend_on_the_policys_adapter(policy: Policy, chosen: LearnerSettings) -> None:
    model = fitted(policy, chosen, thumbs(160))
    scores = model.score(ROWS).tolist()
    move(policy, 1.0, seed=5)
    assert model.score(ROWS).tolist() == scores
    policy.start(None)
    assert model.score(ROWS).tolist() == scores


def test_a_new_scorer_scores_nothing_and_its_adapter_counts(policy: Policy, chosen: LearnerSettings) -> None:
    scorer = Scorer(policy, 8, 16, chosen.target_modules, numbers())
    assert scorer.score(ROWS).tolist() == [0, 0]
    weights = scorer.weights()
    weights["head.weight"] += 1
    scorer.set_weights(weights)
    bare = scorer.score(ROWS)
    with torch.no_grad(), policy.reference():
        hidden = [policy.model.base_model(torch.tensor([r.prompt + r.completion])).last_hidden_state for r in ROWS]
    assert bare.tolist() == pytest.approx([h[0, -1].sum().item() for h in hidden], abs=1e-5)
    for name in weights:
        if name.endswith("lora_B"):
            changed = {**weights, name: weights[name] + 0.1}
            scorer.set_weights(changed)
            assert not torch.allclose(scorer.score(ROWS), bare, atol=1e-4), name


def test_on_a_bf16_base_parameters_and_scores_are_fp32(settings: Settings, chosen: LearnerSettings) -> None:
    policy = Policy(tiny(torch.bfloat16), settings, "sha256:test")
    scorer = Scorer(policy, 8, 16, chosen.target_modules, numbers())
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float32}
    assert scorer(ROWS).dtype == torch.float32
    assert apart(fitted(policy, chosen, thumbs(160))) > 1


# --- how it learns ---


def test_the_same_seed_is_the_same_model_and_another_is_another(policy: Policy, chosen: LearnerSettings) -> None:
    votes = thumbs(100), pairs(40)
    first, again, other = (fitted(policy, chosen, *votes, seed=seed) for seed in (0, 0, 1))
    assert first.score(ROWS).tolist() == again.score(ROWS).tolist() != other.score(ROWS).tolist()
    assert dataclasses.replace(first.report, seconds=0) == dataclasses.replace(again.report, seconds=0)


def test_a_gradient_by_buckets_is_that_of_the_whole_batch(
    policy: Policy, chosen: LearnerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the loss of the whole batch in one expression; buckets of one row."""
    votes = Votes([dataclasses.replace(t, user=f"u{i % 2}", topic="t") for i, t in enumerate(thumbs(5))], pairs(3))
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1]), torch.tensor([1.0, 3.0, 0.5])
    scorer = Scorer(policy, 8, 16, chosen.target_modules, numbers())
    scorer.set_weights({name: w + 0.1 * torch.ones_like(w) for name, w in scorer.weights().items()})
    context = Context(votes.thumbs)
    with torch.no_grad():
        for parameter in [context.intercept, *context.effects.parameters()]:
            parameter.fill_(0.3)

    scores = scorer([Row(t.prompt, t.completion) for t in votes.thumbs])
    better = scorer([Row(p.prompt, p.chosen) for p in votes.pairs])
    worse = scorer([Row(p.prompt, p.rejected) for p in votes.pairs])
    ups = torch.tensor([t.up for t in votes.thumbs])
    thumb_losses = reward.thumb_losses(scores, context(votes.thumbs), ups, weights[0])
    loss = (thumb_losses.sum() + reward.pair_losses(better, worse, weights[1]).sum()) / 8
    expected = torch.autograd.grad(loss, scorer.parameters())

    def single(rows: list[Row], _: int = 0) -> list[list[int]]:
        return [[i] for i in reversed(range(len(rows)))]

    monkeypatch.setattr(reward_training, "buckets", single)
    seen = reward_training.gradient(scorer, context, votes, *weights)
    for ours, theirs in zip(scorer.parameters(), expected, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-6)
    assert seen.loss == pytest.approx(loss.item(), rel=1e-5)
    for theirs, scored in ((seen.scores, scores), (seen.chosen, better), (seen.rejected, worse)):
        assert theirs.tolist() == pytest.approx(scored.tolist(), abs=1e-5)


def test_effects_are_where_the_votes_and_the_ridge_balance() -> None:
    """Σ trust (up − p) of a user's votes is κ u: the prior counts once, and an only vote moves little."""
    generator = numbers()
    users = ["many"] * 60 + ["few"] * 3 + ["one"] + [""] * 40
    votes = [
        dataclasses.replace(t, user=user, topic="t" if i % 3 else "", trust=0.5 + i % 2 / 2, up=user in ("many", "one"))
        for i, (t, user) in enumerate(zip(thumbs(len(users)), users, strict=True))
    ]
    votes += [dataclasses.replace(thumb, up=not thumb.up, user="") for thumb in votes[:30]]
    scores = torch.randn(len(votes), generator=generator)
    context = Context(votes)
    context.fit(votes, scores, 2.0)
    left = torch.tensor([t.trust for t in votes]) * (
        torch.tensor([float(t.up) for t in votes]) - torch.sigmoid(scores + context(votes))
    )
    assert left.sum().item() == pytest.approx(0, abs=1e-3)
    users_effects = dict(zip(("few", "many", "one"), context.effects.users.tolist(), strict=True))
    for user, effect in users_effects.items():
        of = torch.tensor([t.user == user for t in votes])
        assert left[of].sum().item() == pytest.approx(2 * effect, abs=1e-3)
    assert left[torch.tensor([t.topic == "t" for t in votes])].sum().item() == pytest.approx(
        2 * context.effects.topics.item(), abs=1e-3
    )
    lengths = torch.tensor([len(t.completion) / 100 for t in votes]).log()
    assert (left @ lengths).item() == pytest.approx(2 * context.effects.length.item(), abs=1e-3)
    assert users_effects["many"] > 4 * users_effects["one"] > 0
    stranger = dataclasses.replace(votes[0], user="new", topic="new")
    nobody = dataclasses.replace(votes[0], user="", topic="")
    assert context([stranger]).tolist() == context([nobody]).tolist()


def test_no_prompt_is_on_both_sides_and_the_side_never_changes() -> None:
    few = thumbs(40)
    same = [Pair(("a", "b"), thumb.prompt, [GOOD], [BAD], "votes") for thumb in few]
    learned, held_out = split(few * 2, same, 0.25)
    ours, theirs = (
        {tuple(t.prompt) for t in part.thumbs} | {tuple(p.prompt) for p in part.pairs} for part in (learned, held_out)
    )
    assert not ours & theirs
    assert len(ours) + len(theirs) == 40
    assert len(held_out.thumbs) == 2 * len(held_out.pairs)
    assert split(few, [], 0.25)[1].thumbs == [thumb for thumb in few if tuple(thumb.prompt) in theirs]
    wider = {tuple(thumb.prompt) for thumb in split(few, [], 0.5)[1].thumbs}
    assert theirs < wider
    shares = [len(split(thumbs(2000), [], share)[1]) / 2000 for share in (0.1, 0.2, 0.5)]
    assert shares == pytest.approx([0.1, 0.2, 0.5], abs=0.03)


def test_votes_without_trust_are_neither_learned_nor_tested() -> None:
    none = [dataclasses.replace(thumb, trust=0.0) for thumb in thumbs(20)]
    assert [len(part) for part in split(none, [dataclasses.replace(p, trust=0.0) for p in pairs(5)], 0.2)] == [0, 0]


def test_progress_stays_within_what_was_announced(policy: Policy, chosen: LearnerSettings) -> None:
    done: list[int] = []
    fit(policy, thumbs(100), pairs(40), PROMPTS, chosen, numbers(), done.append)
    assert 0.7 * work(100, 40, chosen) < sum(done) <= work(100, 40, chosen)


# --- what is reported ---


def test_the_auc_is_the_share_of_ups_above_downs_and_ties_are_half() -> None:
    scores, ups = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert reward_report.auc(scores, ups, "abcd").estimate == pytest.approx((1 + 1 + 0 + 0.5) / 4)


@pytest.mark.parametrize("each", [1, 4])
def test_the_lower_bound_of_the_auc_passes_noise_in_a_twentieth_of_cases(each: int) -> None:
    """With votes on a prompt that go together, in score and in rating, too."""
    generator = numbers()
    passed, tries, votes = 0, 400, 40
    prompts = [i // each for i in range(votes)]
    for _ in range(tries):
        scores, liking = torch.randn(2, votes, generator=generator)
        shared = torch.randn(2, votes, generator=generator)[:, prompts] * (each > 1)
        liking = liking + shared[1]
        passed += reward_report.auc(scores + shared[0], liking > liking.median(), prompts).low > 0.5
    assert passed / tries < 0.075


def test_few_votes_that_all_agree_still_have_an_interval() -> None:
    seen = reward_report.auc(torch.arange(10.0), torch.arange(10) > 4, range(10))
    assert seen.estimate == 1
    assert 0.5 < seen.low < 0.75


def test_a_score_that_is_the_length_is_seen_in_the_report() -> None:
    few = thumbs(30)
    scores = torch.tensor([2.0 ** len(thumb.completion) for thumb in few])
    empty = torch.zeros(0)
    seen = reward_report.measure(few, [], scores, torch.zeros(30), empty, empty)
    assert seen.length_spearman == pytest.approx(1)
    assert 0.5 < seen.length_pearson < 1
    flat = reward_report.measure(few, [], torch.ones(30), torch.zeros(30), empty, empty)
    assert (flat.length_spearman, flat.length_pearson) == (0, 0)


# --- on disk ---


@pytest.fixture(scope="module")
def model(chosen: LearnerSettings) -> RewardModel:
    return fitted(Policy(tiny(), Settings(learner=chosen), "sha256:test"), chosen, thumbs(100), pairs(10))


def test_what_is_saved_scores_the_same_again(model: RewardModel, settings: Settings, tmp_path: Path) -> None:
    assert [model.save(tmp_path / "rewards") for _ in range(2)] == ["r1", "r2"]
    changed = settings.model_copy(update={"learner": settings.learner.model_copy(update={"rank": 1})})
    again = RewardModel.load(Policy(tiny(), changed, "sha256:test"), tmp_path / "rewards")
    assert again.score(ROWS).tolist() == pytest.approx(model.score(ROWS).tolist(), abs=1e-6)
    assert again.rewards(ROWS).tolist() == pytest.approx(model.rewards(ROWS).tolist(), abs=1e-6)
    assert again.report == model.report
    manifest = json.loads((tmp_path / "rewards" / "r2" / "manifest.json").read_text())
    assert (manifest["version"], manifest["base_model"], manifest["votes"]) == ("r2", "sha256:test", 120)
    assert manifest["report"]["held_out"]["ups"] == model.report.held_out.ups
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_reward_model_of_another_base_model_is_refused(
    model: RewardModel, settings: Settings, tmp_path: Path
) -> None:
    model.save(tmp_path)
    with pytest.raises(AdapterError, match="was fitted on the base model sha256:test"):
        RewardModel.load(Policy(tiny(), settings, "sha256:other"), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("change", ["altered", "cut", "removed"])
def test_files_that_were_altered_are_refused(
    model: RewardModel, policy: Policy, tmp_path: Path, name: str, change: str
) -> None:
    file = tmp_path / model.save(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content if change == "altered" else content[:-10])
    if change == "removed":
        file.unlink()
    with pytest.raises(AdapterError, match="cannot be read" if change == "removed" else "fails its digest"):
        RewardModel.load(policy, tmp_path)


def test_what_a_kill_left_half_written_is_not_there(model: RewardModel, policy: Policy, tmp_path: Path) -> None:
    """A directory that was not moved into place yet, and one without its marker: as if they had never been."""
    with pytest.raises(AdapterError, match="no reward model yet"):
        RewardModel.load(policy, tmp_path)
    (tmp_path / ".r1-half").mkdir()
    (tmp_path / "r1").mkdir()
    with pytest.raises(AdapterError, match="no reward model yet"):
        RewardModel.load(policy, tmp_path)
    assert model.save(tmp_path) == "r2"
    assert RewardModel.load(policy, tmp_path).score(ROWS).tolist() == model.score(ROWS).tolist()
    assert not (tmp_path / ".r1-half").exists()
    with pytest.raises(AdapterError, match="no reward model r9"):
        RewardModel.load(policy, tmp_path, "r9")


def test_a_write_that_fails_leaves_nothing(model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("learner.reward_store.sync", full)
    with pytest.raises(OSError, match="no space"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())
