"""The proof: right weights pass through the noise of two kernels; base, stale and mis-scaled weights do not."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.proof import MIN_TOKENS, Proof, prove
from thumbwheel.manifest import Probe

NOISE = 0.07
"""Standard deviation between engine and trainer, nats: a mean of 0.056, inside what was measured."""


def adapter(rng: np.random.Generator, moved: float, tokens: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of a base model, and how an adapter moves them: `moved` is the root mean square, nats."""
    return -rng.exponential(2.0, tokens), rng.normal(0.0, moved, tokens)


def probes(candidate: np.ndarray, base: np.ndarray, parts: int = 4) -> list[Probe]:
    """The manifest's view, split into `parts` answers."""
    return [
        Probe(
            prompt_token_ids=[1],
            completion_token_ids=[0] * len(c),
            candidate_logprobs=c.tolist(),
            base_logprobs=b.tolist(),
        )
        for c, b in zip(np.array_split(candidate, parts), np.array_split(base, parts), strict=True)
    ]


def verdict(candidate: np.ndarray, base: np.ndarray, served: np.ndarray) -> Proof:
    return prove(probes(candidate, base), [part.tolist() for part in np.array_split(served, 4)])


@given(seed=st.integers(0, 10_000), moved=st.floats(0.15, 2.0))
def test_the_candidate_is_proved_through_the_noise_of_the_kernels(seed: int, moved: float) -> None:
    rng = np.random.default_rng(seed)
    base, shift = adapter(rng, moved)
    proof = verdict(base + shift, base, base + shift + rng.normal(0, NOISE, len(base)))
    assert proof.proved, proof.why
    assert proof.projection == pytest.approx(1.0, abs=0.3)


@given(seed=st.integers(0, 10_000), moved=st.floats(0.15, 2.0))
def test_base_weights_in_place_of_the_candidate_are_caught(seed: int, moved: float) -> None:
    rng = np.random.default_rng(seed)
    base, shift = adapter(rng, moved)
    proof = verdict(base + shift, base, base + rng.normal(0, NOISE, len(base)))
    assert not proof.proved
    assert proof.projection == pytest.approx(0.0, abs=0.3)
    assert "0 is the base model" in proof.why


@given(seed=st.integers(0, 10_000))
def test_base_weights_are_caught_though_both_lists_of_the_manifest_share_the_noise_of_one_kernel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, shift = adapter(rng, 0.2)
    base = truth + rng.normal(0, 0.05, len(truth))
    served = truth + rng.normal(0, 0.05, len(truth))
    assert not verdict(truth + shift + rng.normal(0, 0.05, len(truth)), base, served).proved


@given(seed=st.integers(0, 10_000), moved=st.floats(0.3, 2.0))
def test_stale_weights_of_an_adapter_that_points_elsewhere_are_caught(seed: int, moved: float) -> None:
    rng = np.random.default_rng(seed)
    base, shift = adapter(rng, moved)
    stale = rng.normal(0.0, moved, len(base))
    assert not verdict(base + shift, base, base + stale + rng.normal(0, NOISE, len(base))).proved


def test_stale_weights_that_point_the_same_way_are_caught_by_their_distance() -> None:
    rng = np.random.default_rng(0)
    base, shift = adapter(rng, 1.0)
    proof = verdict(base + shift, base, base + 0.75 * shift)
    assert proof.projection == pytest.approx(0.75)
    assert not proof.proved


def test_an_adapter_applied_twice_too_strongly_is_caught() -> None:
    rng = np.random.default_rng(0)
    base, shift = adapter(rng, 0.15)
    proof = verdict(base + shift, base, base + 2 * shift)
    assert proof.mean_difference < 0.15
    assert not proof.proved


@given(seed=st.integers(0, 10_000), moved=st.floats(0.0, 0.05))
def test_a_candidate_that_hardly_moved_is_said_to_be_indistinguishable(seed: int, moved: float) -> None:
    rng = np.random.default_rng(seed)
    base, shift = adapter(rng, moved)
    proof = verdict(base + shift, base, base + shift + rng.normal(0, NOISE, len(base)))
    assert proof.proved
    assert "indistinguishable from base" in proof.why
    assert math.isnan(proof.projection)


def test_other_weights_in_place_of_one_that_hardly_moved_are_caught() -> None:
    rng = np.random.default_rng(0)
    base, shift = adapter(rng, 0.02)
    assert not verdict(base + shift, base, base + rng.normal(0, 0.3, len(base))).proved


def test_too_few_tokens_prove_nothing() -> None:
    base = np.full(MIN_TOKENS - 1, -1.0)
    assert not verdict(base + 1, base, base + 1).proved
    assert "a proof needs" in prove([], []).why


def test_what_is_not_a_number_proves_nothing() -> None:
    base = np.full(64, -1.0)
    served = base + 1
    served[3] = math.nan
    assert not verdict(base + 1, base, served).proved
    served[3] = -math.inf
    assert not verdict(base + 1, base, served).proved


def test_lists_of_different_lengths_prove_nothing() -> None:
    base = np.full(64, -1.0)
    assert not prove(probes(base + 1, base, 1), [[0.0] * 63]).proved
