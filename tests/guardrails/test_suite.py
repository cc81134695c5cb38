"""Suites: what ships is valid, mistakes are named, the digest follows the content."""

from pathlib import Path

import pytest

from guardrails.suite import SHIPPED, load, parse
from thumbwheel.demo import prompts
from thumbwheel.errors import SettingsError

SMALL = """
name: small
samples: {prompts: ["How are you?", What is tea], max_tokens: 8}
checks:
  sense_kept:
  required_patterns: {rules: [{prompt: Say sure., pattern: sure}]}
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_suite_that_ships_is_valid_and_bears_its_files_name(name: str) -> None:
    suite = load(name)
    assert suite.name == name
    for asked in suite.questions().values():
        assert len({question.prompt for question in asked}) == len(asked), "a prompt asked twice is no second sample"


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_suites_ask_nothing_that_the_demo_trains_on(name: str) -> None:
    trained = {form.format(subject) for form in prompts.FORMS for subject in prompts.TRAFFIC_SUBJECTS}
    asked = {question.prompt for questions in load(name).questions().values() for question in questions}
    assert not asked & trained


def test_a_check_without_limits_takes_its_defaults_and_an_absent_one_is_not_run() -> None:
    checks = parse(SMALL).checks
    assert checks.sense_kept is not None
    assert checks.sense_kept.limit > 0
    assert checks.kl_budget is None


def test_samples_differ_in_seed_and_greedy_sets_are_greedy() -> None:
    questions = parse(SMALL).questions()
    assert [(q.temperature, q.seed) for q in questions["sampled"]] == [(1.0, 0), (1.0, 1)]
    assert [q.temperature for q in questions["required"]] == [0.0]
    assert questions["harmful"] == []


def test_the_digest_follows_the_content_and_not_the_layout() -> None:
    assert parse(SMALL).digest() == parse(SMALL + "\n# a remark\n").digest()
    assert parse(SMALL).digest() != parse(SMALL.replace("max_tokens: 8", "max_tokens: 9")).digest()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("sense_kept:", "sense_lost:"), "checks.sense_lost: Extra inputs"),
        (("sense_kept:", "sense_kept: {limit: -1}"), "checks.sense_kept.limit: Input should be greater than 0"),
        (("pattern: sure", "pattern: '(sure'"), "checks.required_patterns.rules.0.pattern: .*is no regular expression"),
        (("sense_kept:", "refusals_kept: {prompts: [a, b]}"), "need `refusal_patterns`"),
        (("sense_kept:", "length_drift: {min_ratio: 2, max_ratio: 1}"), "min_ratio 2.0 is not below max_ratio 1.0"),
        (('["How are you?", What is tea]', "[one]"), "samples.prompts: List should have at least 2 items"),
        (("name: small", "nom: small"), "name: Field required"),
        (("name: small", "name: [small"), "cannot be read"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SMALL.replace(*change))
    with pytest.raises(SettingsError, match=named):
        load(str(file))


def test_a_suite_without_checks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: x\nsamples: {prompts: [a, b]}\nchecks: {}\n")
    with pytest.raises(SettingsError, match="would pass everything"):
        load(str(file))


def test_an_unknown_suite_names_those_that_ship() -> None:
    with pytest.raises(SettingsError, match=r"no guardrail suite nope.*default"):
        load("nope")
