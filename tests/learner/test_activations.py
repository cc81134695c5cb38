"""Recomputed or kept, the gradient is the same; and what is kept is measured, not guessed."""

from pathlib import Path

import pytest
import torch

from learner import activations
from learner.activations import checkpointing, free, kept, needs_checkpointing
from learner.logprobs import Row, sequence_logprobs
from learner.policy import Policy
from tests.learner.conftest import tiny

ROWS = [Row([2, 3], [4, 5, 1]), Row([2, 3], [9, 1]), Row([6, 7, 8, 9, 10], [11, 12])]


def gradient(policy: Policy) -> list[torch.Tensor]:
    return list(torch.autograd.grad(sequence_logprobs(policy.model, ROWS).sum(), policy.parameters()))


def test_the_gradient_is_the_same_and_less_is_kept(exact: Policy) -> None:
    expected, before = gradient(exact), kept(exact.model, 32)
    modes = [module.training for module in exact.model.modules()]
    checkpointing(exact.model, on=True)
    checkpointing(exact.model, on=True)
    assert [module.training for module in exact.model.modules()] == modes
    assert kept(exact.model, 32) < before / 2
    assert all(torch.equal(*each) for each in zip(gradient(exact), expected, strict=True))
    checkpointing(exact.model, on=False)
    assert kept(exact.model, 32) == before
    assert all(torch.equal(*each) for each in zip(gradient(exact), expected, strict=True))


def test_layers_run_twice_only_while_it_is_on(exact: Policy) -> None:
    runs = []
    exact.model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    for on, expected in ((False, 1), (True, 2), (False, 1)):
        runs.clear()
        checkpointing(exact.model, on)
        gradient(exact)
        assert len(runs) == expected


def test_what_is_kept_grows_with_tokens_and_has_no_square_in_it(exact: Policy) -> None:
    small, large = kept(exact.model, 64), kept(exact.model, 256)
    assert 3.5 * small < large < 4.1 * small
    bare = tiny(torch.float64).requires_grad_(False)
    assert kept(bare, 16) == 0, "nothing to train, nothing to keep"


def test_checkpointing_is_for_what_does_not_fit(exact: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "free", lambda _: float("inf"))
    assert not needs_checkpointing(exact.model, 10**9)
    monkeypatch.setattr(activations, "free", lambda _: 10e6)
    assert not needs_checkpointing(exact.model, 10)
    assert needs_checkpointing(exact.model, 10_000)


def test_the_tightest_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "PROC", tmp_path / "proc")
    monkeypatch.setattr(activations, "CGROUPS", tmp_path / "cgroup")
    cpu = torch.device("cpu")
    assert free(cpu) == float("inf")

    def cgroup(place: Path, limit: str, used: int) -> None:
        place.mkdir(parents=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text("anon 5\ninactive_file 100\nfile 300\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    80 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/learner\n")
    cgroup(tmp_path / "cgroup/pod/learner", "max", 7)
    assert free(cpu) == 80 * 1024
    cgroup(tmp_path / "cgroup/other", "10", 1)
    (tmp_path / "cgroup/pod/memory.max").write_text("5000")
    (tmp_path / "cgroup/pod/memory.current").write_text("1000")
    (tmp_path / "cgroup/pod/memory.stat").write_text("inactive_file 100")
    assert free(cpu) == 4100
    (tmp_path / "proc/self/cgroup").write_text("12:cpu:/\n0::/\n")
    assert free(cpu) == 80 * 1024


def test_this_machine_has_some_memory() -> None:
    assert 0 < free(torch.device("cpu")) < 2**50
