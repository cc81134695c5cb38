"""One event of every type, with all that it may carry."""

from thumbwheel.events import (
    FEEDBACK,
    AdapterPromoted,
    AdapterRolledBack,
    CandidateApproved,
    CandidateRejected,
    CandidateSubmitted,
    CheckResult,
    Choice,
    EvaluationReported,
    Event,
    FeedbackSubmitted,
    ReplicaReported,
    ReplicaVersion,
    ResponseGenerated,
    Sampling,
    Timings,
)
from thumbwheel.log import Log, Message, message_of, read_all
from thumbwheel.log.deadletter import letters, send


def response(id: str = "r1", time: float = 1.0, text: str = "Paris", version: str = "v1") -> ResponseGenerated:
    return ResponseGenerated(
        source="gateway/r1", time=time, response_id=id, endpoint="chat.completions", outcome="completed", replica="r1",
        version=version, digest="d1", api_key="app", user="ab12cd34", stream=True,
        request={"messages": [{"role": "user", "content": "Capital of France?"}], "n": 1},
        prompt_token_ids=[[1, 2, 3]], sampling=Sampling(stop=["\n"], max_tokens=9, seed=4),
        choices=[Choice(index=0, text=text, finish_reason="stop", token_ids=[4, 5], logprobs=[-0.5, None])],
        timings=Timings(first_token_s=0.1, duration_s=0.2),
    )  # fmt: skip


def vote(id: str = "r1", time: float = 2.0, user: str = "ab12cd34", comment: str | None = None) -> FeedbackSubmitted:
    return FeedbackSubmitted(
        source="gateway/r1", time=time, response_id=id, rating="down", reasons=["too long"], comment=comment,
        preferred_over="r0", correction="Paris.", metadata={"page": 3}, api_key="app", user=user,
    )  # fmt: skip


EVERY: list[Event] = [
    response(),
    vote(comment="größer ✓"),
    CandidateSubmitted(
        source="learner", time=3.0, version="v2", digest="d2", parent="v1", algorithm="kto",
        learned_from=64, kl_upper=1.5,
    ),
    EvaluationReported(
        source="guardrails", time=4.0, version="v2", digest="d2", verdict="fail", suites=["default"],
        checks=[
            CheckResult(name="refusals", verdict="fail", n=4, estimate=0.4, low=0.2, high=0.6, limit=0.1, unit="share"),
            CheckResult(name="tone", verdict="pass", n=40),
        ],
    ),
    CandidateApproved(
        source="cli", time=5.0, version="v2", digest="d2", actor="ann", reason="read 20 answers", forced=True
    ),
    CandidateRejected(source="cli", time=6.0, version="v3", digest="d3", actor="ann", reason="curt"),
    AdapterPromoted(source="controller", time=7.0, version="v2", digest="d2", previous="v1", actor="controller"),
    AdapterRolledBack(
        source="cli", time=8.0, version="v1", digest="d1", rolled_back="v2", actor="ann", reason="complaints"
    ),
    ReplicaReported(
        source="gateway/r1", time=9.0, replica="r1", serving="v1", leaving=True,
        versions=[ReplicaVersion(version="v3", digest="d3", state="failed", why="log-probs differ")],
    ),
]  # fmt: skip


def put(log: Log, *events: Event) -> None:
    """Each onto its topic, in order."""
    for event in events:
        log.append(event.topic, [message_of(event)])


def dead(log: Log, value: bytes = b"no event", id: str = "m1") -> str:
    """A dead letter of the learner's; returns its id."""
    there = {letter.id for letter in letters(log, FEEDBACK)}
    log.append(FEEDBACK, [Message(id, "r9", 5.0, value, (("ce_type", b"odd"),))])
    record = next(
        record
        for partition in range(log.partitions(FEEDBACK))
        for record in read_all(log, FEEDBACK, 0, partition)
        if record.message.id == id
    )
    send(log, record, "learner", ValueError("no"))
    (new,) = {letter.id for letter in letters(log, FEEDBACK)} - there
    return new
