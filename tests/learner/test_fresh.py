"""Fresh answers are the policy's own, n a prompt and in order; an engine that gives anything else is found out."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import fresh as module
from learner.fresh import Engine, Fresh, FreshError, Memory, check_served
from learner.logprobs import Row, completion_hidden, sequence_logprobs, token_logprobs
from learner.policy import Policy
from learner.progress import Stopped
from learner.sampler import sample
from tests.learner.conftest import VOCABULARY, move, tiny
from thumbwheel.errors import AdapterError, ThumbwheelError
from thumbwheel.settings import Settings
from thumbwheel.store import CONFIG, WEIGHTS, fingerprint

pytestmark = pytest.mark.slow

PROMPTS = [[2, 3], [9, 8, 7, 6, 5, 4], [4], [5, 5, 5], [2, 3]]


@pytest.fixture
def policy(settings: Settings) -> Policy:
    policy = Policy(tiny(), settings, fingerprint(settings.engine.model))
    move(policy, 0.5)
    return policy


def seeded(policy: Policy, seed: int = 0) -> Memory:
    return Memory(policy, torch.Generator().manual_seed(seed))


# --- the model in memory ---


def test_every_prompt_gets_n_answers_in_the_order_of_the_prompts(policy: Policy) -> None:
    answers = seeded(policy).answers(PROMPTS, 3, 6)
    assert [[one.row.prompt for one in group] for group in answers] == [[prompt] * 3 for prompt in PROMPTS]
    assert all(1 <= len(one.row.completion) <= 6 for group in answers for one in group)
    assert all(one.behaviour is None for group in answers for one in group)
    assert len({tuple(one.row.completion) for group in answers for one in group}) > 5


def test_an_answer_has_ended_exactly_when_it_holds_its_end_token(policy: Policy) -> None:
    flat = [one for group in seeded(policy).answers(PROMPTS, 24, 5) for one in group]
    for one in flat:
        assert one.ended == (one.row.completion[-1] == 1)
        assert 1 not in one.row.completion[:-1]
        assert one.ended or len(one.row.completion) == 5
    assert {one.ended for one in flat} == {True, False}
    assert any(one.ended and len(one.row.completion) == 5 for one in flat), "the last token allowed may be the end"


def test_a_seed_repeats_itself_and_another_does_not(policy: Policy) -> None:
    once, again, other = (seeded(policy, seed).answers(PROMPTS, 3, 6) for seed in (7, 7, 8))
    assert once == again
    assert once != other


def test_answers_follow_the_policy_and_not_the_reference(policy: Policy) -> None:
    n = 2000
    (answers,) = seeded(policy).answers([[2, 3]], n, 1)
    seen = torch.bincount(torch.tensor([one.row.completion[0] for one in answers]), minlength=VOCABULARY)

    @torch.no_grad()
    def chi_square() -> float:
        expected = n * policy.model(torch.tensor([[2, 3]])).logits[0, -1].softmax(-1)
        return float(((seen - expected) ** 2 / expected).sum())

    assert chi_square() < 70  # 31 degrees of freedom: passed by 1 in 10,000
    with policy.reference():
        assert chi_square() > 200


def test_batches_are_bounded_and_hold_the_longest_prompts_together(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []

    def spy(model: Any, prompts: list[list[int]], *others: Any) -> list[Row]:
        lengths.append([len(prompt) for prompt in prompts])
        return sample(model, prompts, *others)

    monkeypatch.setattr(module, "sample", spy)
    seeded(policy).answers([[2] * (1 + i % 7) for i in range(40)], 4, 2)
    assert [len(batch) for batch in lengths] == [64, 64, 32]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)


def test_progress_counts_every_answer_once_and_can_stop_the_work(policy: Policy) -> None:
    counts: list[int] = []
    seeded(policy).answers(PROMPTS, 20, 8, counts.append)
    assert sum(counts) == 100
    assert len(counts) > 4

    def stop(done: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        seeded(policy).answers(PROMPTS, 2, 8, stop)


# --- served equals trained ---


def scored(policy: Policy, rows: list[Row]) -> list[torch.Tensor]:
    with torch.no_grad():
        targets = torch.tensor([id for row in rows for id in row.completion])
        each = token_logprobs(policy.model, completion_hidden(policy.model, rows), targets)
    return list(torch.split(each, [len(row.completion) for row in rows]))


@pytest.fixture
def learners(policy: Policy) -> tuple[list[Row], list[torch.Tensor], list[torch.Tensor]]:
    """Rows, with the log-probs of policy and reference."""
    rows = [one.row for group in seeded(policy).answers(PROMPTS, 8, 8) for one in group]
    with policy.reference():
        reference = scored(policy, rows)
    return rows, scored(policy, rows), reference


def reported(rows: list[Row], logprobs: list[torch.Tensor], noise: float = 0.05) -> list[Fresh]:
    """As an engine with rounding noise reports them."""
    random = torch.Generator().manual_seed(3)
    noisy = [part + noise * torch.randn(part.shape, generator=random) for part in logprobs]
    return [Fresh(row, False, part.tolist()) for row, part in zip(rows, noisy, strict=True)]


def test_what_the_policy_would_sample_is_served_and_what_the_reference_would_is_not(learners: Any) -> None:
    rows, policy, reference = learners
    assert 0.03 < check_served(reported(rows, policy), policy, reference) < 0.05
    with pytest.raises(ThumbwheelError, match=r"does not serve the adapter .* from the policy's .* the reference's"):
        check_served(reported(rows, reference), policy, reference)


def test_the_reference_is_found_out_long_before_the_limit(learners: Any) -> None:
    rows, policy, reference = learners
    slightly = [r + 0.055 * (p - r) for p, r in zip(policy, reference, strict=True)]
    distance = torch.cat([(p - r).abs() for p, r in zip(slightly, reference, strict=True)]).mean()
    assert 0.05 < distance < module.LIMIT / 2
    assert check_served(reported(rows, slightly), slightly, reference) < 0.05
    with pytest.raises(FreshError, match="does not serve"):
        check_served(reported(rows, reference), slightly, reference)


def test_noise_decides_nothing_where_policy_and_reference_are_one(learners: Any) -> None:
    rows, policy, _ = learners
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        near = [part + 0.06 * torch.randn(part.shape, generator=random) for part in policy]
        assert check_served(reported(rows, policy), policy, policy) < 0.05
        assert check_served(reported(rows, policy), near, policy) < 0.1


def test_log_probs_that_are_far_from_both_or_no_numbers_are_not_served(learners: Any) -> None:
    rows, policy, reference = learners
    with pytest.raises(FreshError, match=r"at most 0\.25"):
        check_served(reported(rows, policy, noise=0.5), policy, policy)
    with pytest.raises(FreshError, match="nan"):
        check_served(reported(rows, policy), [part * math.nan for part in policy], reference)


def test_the_model_in_memory_serves_what_is_trained(policy: Policy, learners: Any) -> None:
    rows, ours, reference = learners
    assert check_served([Fresh(row, True, None) for row in rows], ours, reference) == 0.0
    both = [Fresh(rows[0], True, None), *reported(rows[1:], ours[1:])]
    assert 0.03 < check_served(both, [part.tolist() for part in ours], reference) < 0.05


# --- an engine, on a real socket ---


class Fake:
    """vLLM's wire format, with faults on demand."""

    def __init__(self) -> None:
        self.adapters: dict[str, Path] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, list[tuple[int, Any]]] = {}
        """What a path answers first: status and body; the status 0 resets the connection."""
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: None
        self.root = "somewhere/else"
        self.release = threading.Event()
        """Completions wait for it."""
        self.release.set()
        self.now = self.most = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.reply(self, {})

            def do_POST(self) -> None:
                fake.reply(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                pass  # clients that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == path]

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.calls.append((handler.path, body))
        if faults := self.faults.get(handler.path):
            status, answer = faults.pop(0)
            if status == 0:
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
        else:
            status, answer = self.answer(handler.path, body)
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "root": self.root, "parent": None}]}
        if path == module.LOAD:
            if body["lora_name"] in self.adapters:
                return 400, error(f"The lora adapter '{body['lora_name']}' has already been loaded.")
            self.adapters[body["lora_name"]] = Path(body["lora_path"])
            return 200, "Success"
        if path == module.UNLOAD:
            known = self.adapters.pop(body["lora_name"], None)
            return (200, "Success") if known else (404, error("The lora adapter cannot be found."))
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.release.wait(20)
        time.sleep(0.01)
        with self._lock:
            self.now -= 1
        assert (self.adapters[body["model"]] / WEIGHTS).is_file()
        choice = {
            "finish_reason": "stop",
            "token_ids": [4, 5, 1],
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [-1.0, -0.0, -0.5]},
        }
        answer = {"model": body["model"], "choices": [json.loads(json.dumps(choice)) for _ in range(body["n"])]}
        return 200, self.change(answer) or answer


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError"}}


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.02,))
    thread.start()
    yield fake
    fake.release.set()
    fake.server.shutdown()
    thread.join()
    fake.server.server_close()


@pytest.fixture
def engine(fake: Fake, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(module, "PAUSES_S", (0.01, 0.02))
    with Engine(fake.url, policy, tmp_path / "fresh") as engine:
        yield engine


def places(tmp_path: Path) -> set[str]:
    return {place.name for place in (tmp_path / "fresh").iterdir()}


def test_answers_come_with_the_engines_log_probs_in_the_order_of_the_prompts(fake: Fake, engine: Engine) -> None:
    def cut(answer: dict[str, Any]) -> None:
        answer["choices"][0] |= {"finish_reason": "length", "token_ids": [4, 5, 6, 7, 8, 9]}
        answer["choices"][0]["logprobs"]["token_logprobs"] = [-2.0] * 6

    fake.change = cut
    answers = engine.answers(PROMPTS, 2, 6)
    for prompt, (first, second) in zip(PROMPTS, answers, strict=True):
        assert first == Fresh(Row(prompt, [4, 5, 6, 7, 8, 9]), False, [-2.0] * 6)
        assert second == Fresh(Row(prompt, [4, 5, 1]), True, [-1.0, -0.0, -0.5])


def test_it_asks_for_the_whole_distribution_whatever_the_models_defaults_are(fake: Fake, engine: Engine) -> None:
    engine.answers(PROMPTS, 3, 6)
    bodies = fake.bodies(module.COMPLETIONS)
    assert sorted(body["prompt"] for body in bodies) == sorted(PROMPTS)
    for body in bodies:
        asked = {"n": 3, "max_tokens": 6, "temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        assert asked.items() <= body.items()
        assert (body["stop_token_ids"], body["ignore_eos"], body["add_special_tokens"]) == ([1], True, False)
        assert body["logprobs"] == 0
        assert body["return_token_ids"] is True
        assert "seed" not in body, "vLLM's CPU build ends on seeds of prompts that it takes up in parts"


def test_no_name_and_no_path_is_ever_used_again_and_files_go_late(
    fake: Fake, engine: Engine, policy: Policy, tmp_path: Path
) -> None:
    for call in range(3):
        engine.answers(PROMPTS, 2, 6)
        assert fake.adapters == {}, "it is unloaded after each call"
        assert len(places(tmp_path)) == 1, "the files of the last call stay"
        assert places(tmp_path) == {fake.bodies(module.LOAD)[call]["lora_name"]}
    loads = fake.bodies(module.LOAD)
    assert len({load["lora_name"] for load in loads}) == len({load["lora_path"] for load in loads}) == 3
    assert all(Path(load["lora_path"]).is_absolute() for load in loads)
    assert [body["lora_name"] for body in fake.bodies(module.UNLOAD)] == [load["lora_name"] for load in loads]
    engine.close()
    assert places(tmp_path) == set()


def test_what_is_loaded_is_the_adapter_as_it_is_now(fake: Fake, engine: Engine, policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "before")
    move(policy, 0.5, seed=9)
    policy.save(tmp_path / "now")
    engine.answers([[2]], 2, 6)
    (place,) = (tmp_path / "fresh").iterdir()
    assert (place / WEIGHTS).read_bytes() == (tmp_path / "now" / WEIGHTS).read_bytes()
    assert (place / WEIGHTS).read_bytes() != (tmp_path / "before" / WEIGHTS).read_bytes()
    assert (place / CONFIG).is_file()


def test_what_a_killed_learner_left_is_unloaded_and_deleted(fake: Fake, policy: Policy, tmp_path: Path) -> None:
    left = tmp_path / "fresh" / f"{module.PREFIX}0"
    left.mkdir(parents=True)
    fake.adapters[left.name] = left
    with Engine(fake.url, policy, tmp_path / "fresh") as engine:
        engine.answers([[2]], 2, 6)
        assert fake.adapters == {}
        assert left.name not in places(tmp_path)
        assert len(places(tmp_path)) == 1


def test_requests_are_bounded_and_progress_counts_every_answer(
    fake: Fake, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONCURRENCY", 3)
    counts: list[int] = []
    engine.answers([[i] for i in range(2, 22)], 4, 6, counts.append)
    assert fake.most == 3
    assert sum(counts) == 80


def test_a_stop_ends_it_at_once_and_the_adapter_is_unloaded(fake: Fake, engine: Engine) -> None:
    fake.release.clear()
    begun = time.monotonic()

    def stop(done: int) -> None:
        if fake.now:  # the engine is at work
            raise Stopped

    with pytest.raises(Stopped):
        engine.answers(PROMPTS, 2, 6, stop)
    assert time.monotonic() - begun < 5
    assert fake.adapters == {}
    assert len(fake.bodies(module.UNLOAD)) == 1


@pytest.mark.parametrize("fault", [(500, error("oops")), (502, "<html>"), (503, ""), (0, "")])
@pytest.mark.parametrize("path", [module.COMPLETIONS, "/v1/models"])
def test_what_may_pass_is_asked_again(fake: Fake, engine: Engine, path: str, fault: tuple[int, Any]) -> None:
    fake.faults[path] = [fault, fault]
    assert len(engine.answers([[2]], 2, 6)[0]) == 2
    assert len(fake.bodies(path)) == 3


def test_patience_ends_after_three_tries_and_the_adapter_is_unloaded(fake: Fake, engine: Engine) -> None:
    fake.faults[module.COMPLETIONS] = [(503, error("not now"))] * 3
    with pytest.raises(FreshError, match="answered 503: not now"):
        engine.answers([[2]], 2, 6)
    assert len(fake.bodies(module.COMPLETIONS)) == 3
    assert fake.adapters == {}


def test_a_refusal_is_final_and_ends_the_other_requests(fake: Fake, engine: Engine) -> None:
    fake.faults[module.COMPLETIONS] = [(400, error("maximum context length is 8 tokens"))]
    with pytest.raises(FreshError, match="answered 400: maximum context length"):
        engine.answers(PROMPTS, 2, 6)
    assert fake.adapters == {}
    assert len(engine.answers(PROMPTS, 2, 6)) == len(PROMPTS), "and the next call finds everything in order"


def test_a_load_whose_answer_was_lost_has_loaded(fake: Fake, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fake.answer

    def lose(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        first = path == module.LOAD and len(fake.bodies(path)) == 1
        status, answer = honest(path, body)
        return (502, "gone") if first else (status, answer)

    monkeypatch.setattr(fake, "answer", lose)
    assert len(engine.answers([[2]], 2, 6)[0]) == 2


def test_an_unload_that_fails_spoils_nothing_and_is_made_up_for(
    fake: Fake, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    fake.faults[module.UNLOAD] = [(500, error("busy"))]
    assert len(engine.answers([[2]], 2, 6)[0]) == 2
    assert len(fake.adapters) == 1
    assert "still holds" in caplog.text
    engine.answers([[2]], 2, 6)
    assert fake.adapters == {}


def test_an_engine_that_is_not_there_is_named(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.01,))
    with Engine("http://127.0.0.1:9", policy, tmp_path) as engine, pytest.raises(ThumbwheelError) as caught:
        engine.answers([[2]], 2, 6)
    assert "the engine at http://127.0.0.1:9 ([learner.fresh] engine) cannot be reached" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (404, {"detail": "Not Found"}, FreshError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (500, error("LoRA is not enabled. Use --enable-lora to enable LoRA."), FreshError, "with --enable-lora"),
        (404, error("Loading lora x failed: No adapter found for /y"), FreshError, "see the learner's files"),
        (400, error("LoRA rank 64 is greater than max_lora_rank 16."), AdapterError, "--max-lora-rank"),
        (500, error("LoRA rank 64 is greater than max_lora_rank 16."), AdapterError, r"\[learner\] rank"),
        (400, error("expected target modules in ['q_proj']"), AdapterError, "does not take .* expected target modules"),
    ],
)
def test_an_adapter_that_is_not_loaded_is_an_error_that_says_what_to_do(
    fake: Fake, engine: Engine, status: int, body: Any, kind: type[Exception], says: str
) -> None:
    fake.faults[module.LOAD] = [(status, body)]
    with pytest.raises(kind, match=says):
        engine.answers([[2]], 2, 6)
    assert fake.bodies(module.COMPLETIONS) == []


def test_an_engine_with_another_base_model_is_refused_where_it_can_be_seen(
    fake: Fake, engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    fake.root = str(settings.engine.model)
    assert engine.answers([[2]], 2, 6)
    tiny(seed=5).save_pretrained(tmp_path / "other")
    fake.root = str(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"other, which is another base model .* \[engine\] model"):
        engine.answers([[2]], 2, 6)


def test_what_is_no_vllm_is_refused(fake: Fake, engine: Engine) -> None:
    fake.faults["/v1/models"] = [(200, "<html>hello</html>")]
    with pytest.raises(FreshError, match="does not answer as vLLM does"):
        engine.answers([[2]], 2, 6)


def broken(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(answer: dict[str, Any]) -> None:
        answer["choices"][1] |= changes

    return change


def logprob(value: float | None) -> Callable[[dict[str, Any]], None]:
    return broken(logprobs={"token_logprobs": [-1.0, value, -0.5]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (broken(token_ids=None), "without token ids"),
        (broken(logprobs=None), "without log-probs"),
        (broken(token_ids=[], logprobs={"token_logprobs": []}), "an answer of 0 tokens"),
        (broken(token_ids=[4, 1]), "2 tokens with 3 log-probs"),
        (logprob(math.nan), "log-prob of nan"),
        (logprob(-9999.0), r"log-prob of -9999\.0"),
        (logprob(-math.inf), "log-prob of -inf"),
        (logprob(0.5), r"log-prob of 0\.5"),
        (logprob(None), "log-prob of None"),
        (broken(token_ids=[4, VOCABULARY, 1]), f"the token {VOCABULARY}, where the policy knows {VOCABULARY}"),
        (broken(token_ids=[4, -1, 1]), "the token -1"),
        (broken(token_ids=[4, 5, 6]), "stops at the token 6"),
        (broken(finish_reason="abort"), "ended by 'abort'"),
        (broken(prompt_token_ids=[0, 2]), "another prompt"),
        (lambda answer: answer["choices"].pop() and None, "1 answers of fresh-.*, where 2 of"),
        (lambda answer: answer.update(model="base"), "2 answers of base, where 2 of fresh-"),
        (lambda answer: "no JSON", "Expecting value"),
        (lambda answer: [1], "TypeError"),
    ],
)
def test_an_answer_that_cannot_be_learned_from_is_refused_by_name(
    fake: Fake, engine: Engine, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    fake.change = change
    with pytest.raises(FreshError, match=rf"\[learner\.fresh\] engine\).*{says}"):
        engine.answers([[2]], 2, 6)
    assert fake.adapters == {}


def test_rounding_above_zero_is_zero(fake: Fake, engine: Engine) -> None:
    fake.change = logprob(1e-6)
    assert len(engine.answers([[2]], 2, 6)[0]) == 2


def test_the_rows_it_gives_are_rows_of_the_learner(fake: Fake, engine: Engine, policy: Policy) -> None:
    (group,) = engine.answers([[2, 3]], 2, 6)
    assert torch.isfinite(sequence_logprobs(policy.model, [one.row for one in group])).all()
