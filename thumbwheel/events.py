"""The schemas of everything on the log: versioned, and exported as JSON Schema by `thumbwheel log schemas`.

Three topics (see `TOPICS`). An event is immutable, names its schema version, and carries an id that is stable across
retries, so that every reader can drop a second copy. Readers ignore fields that they do not know (a newer minor
version) and refuse a newer major one.

Units: times are Unix seconds, durations seconds, log-probabilities nats.
"""

import os
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

RESPONSES = "llm.response.generated.v1"
FEEDBACK = "llm.feedback.submitted.v1"
ROLLOUT = "policy.rollout.v1"
TOPICS = (RESPONSES, FEEDBACK, ROLLOUT)

BASE = "base"
"""The version name of the frozen base model: what serves before the first promotion."""

SCHEMA_VERSION = "1.0"


def new_id() -> str:
    """A UUID version 7 (RFC 9562, section 5.7): ids that sort by the time they were made, to the millisecond."""
    millis = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (millis << 80) | (0x7 << 76) | ((random >> 68) << 64) | (0b10 << 62) | (random & ((1 << 62) - 1))
    return str(uuid.UUID(int=value))


class Data(BaseModel):
    """A part of an event: immutable, tolerant of fields from a newer minor version."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Event(Data):
    """What all events share."""

    topic: ClassVar[str]

    schema_version: str = SCHEMA_VERSION
    id: str = Field(default_factory=new_id)
    time: float = Field(default_factory=time.time)
    source: str = Field(description="the program that appended it, such as gateway/r1 or learner")

    @property
    def key(self) -> str:
        """Events of one key keep their order."""
        raise NotImplementedError

    @property
    def headers(self) -> tuple[tuple[str, bytes], ...]:
        """The attributes of CloudEvents 1.0 that a reader may route by without opening the event."""
        kind: str = getattr(self, "type")  # noqa: B009
        return (("ce_type", kind.encode()), ("ce_source", self.source.encode()))


# --- llm.response.generated.v1 -----------------------------------------------------------------------------------


class Sampling(Data):
    """The sampling parameters that were in force, defaults filled in."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    stop: list[str] = []


class Choice(Data):
    """One sampled answer. `token_ids` and `logprobs` have one entry per sampled token, the stop token included."""

    index: int
    prompt_index: int = 0
    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    token_ids: list[int] = []
    logprobs: list[float | None] = Field(default=[], description="behaviour log-probs, nats; null where missing")


class Timings(Data):
    """Seconds, from the arrival of the request at the gateway."""

    first_token_s: float | None = None
    duration_s: float


class ResponseGenerated(Event):
    """One exchange: what was asked, what was sampled and by which version."""

    topic: ClassVar[str] = RESPONSES
    type: Literal["response.generated"] = "response.generated"
    response_id: str
    endpoint: Literal["chat.completions", "completions"]
    outcome: Literal["completed", "client_disconnected", "engine_error", "timeout"]
    error: str | None = None
    replica: str
    version: str
    digest: str
    propensity: float = Field(default=1.0, description="probability with which routing chose this version")
    api_key: str = Field(description="the name of the key that asked, never the key")
    user: str | None = Field(default=None, description="hash of the end user's identifier")
    stream: bool = False
    request: dict[str, Any] = Field(description="the client's request as it arrived")
    prompt_token_ids: list[list[int]] = Field(default=[], description="one list a prompt")
    choices: list[Choice] = []
    sampling: Sampling
    untrainable: str | None = Field(default=None, description="why the learner must not use it; null when it may")
    timings: Timings

    @property
    def key(self) -> str:
        return self.response_id


# --- llm.feedback.submitted.v1 -----------------------------------------------------------------------------------


class FeedbackSubmitted(Event):
    """One vote of one user on one choice. The last vote of a user on a choice wins; `retracted` takes it back."""

    topic: ClassVar[str] = FEEDBACK
    type: Literal["feedback.submitted"] = "feedback.submitted"
    response_id: str
    choice_index: int = 0
    rating: Literal["up", "down"] | None = None
    retracted: bool = False
    reasons: list[str] = []
    comment: str | None = None
    correction: str | None = None
    preferred_over: str | None = Field(default=None, description="the response id of a sibling that was worse")
    metadata: dict[str, Any] = {}
    api_key: str
    user: str = Field(description="hash of the end user's identifier, or of the key's name where there is none")

    @property
    def key(self) -> str:
        return self.response_id


# --- policy.rollout.v1 -------------------------------------------------------------------------------------------


class RolloutEvent(Event):
    """An event about one adapter version."""

    topic: ClassVar[str] = ROLLOUT
    version: str
    digest: str

    @property
    def key(self) -> str:
        return self.version


class CandidateSubmitted(RolloutEvent):
    """The learner offers a version that is whole in the store. `parent` is the version that it was trained from."""

    type: Literal["candidate.submitted"] = "candidate.submitted"
    parent: str
    algorithm: str
    learned_from: int = Field(description="how many votes it learned from")
    kl_upper: float = Field(description="upper confidence bound of KL to the reference, nats per sequence")


Verdict = Literal["pass", "fail", "inconclusive"]


class CheckResult(Data):
    """What one guardrail saw: the estimate with its interval, against the limit, in words where that helps."""

    name: str
    verdict: Verdict
    n: int
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    unit: str = ""
    why: str = ""


class EvaluationReported(RolloutEvent):
    """The guardrails' report. `verdict` is fail if any check failed, else inconclusive if any is, else pass."""

    type: Literal["evaluation.reported"] = "evaluation.reported"
    verdict: Verdict
    checks: list[CheckResult]
    suites: list[str] = []


class CandidateApproved(RolloutEvent):
    """An operator, or a policy in an operator's name, lets it go live. `forced` skips the gates and says so."""

    type: Literal["candidate.approved"] = "candidate.approved"
    actor: str
    reason: str
    forced: bool = False


class CandidateRejected(RolloutEvent):
    """It will not go live."""

    type: Literal["candidate.rejected"] = "candidate.rejected"
    actor: str
    reason: str


class AdapterPromoted(RolloutEvent):
    """It is the champion from here on: each gateway flips when it reads this."""

    type: Literal["adapter.promoted"] = "adapter.promoted"
    previous: str
    actor: str


class AdapterRolledBack(RolloutEvent):
    """The champion goes back to `version` (which was champion before) from `rolled_back`."""

    type: Literal["adapter.rolled_back"] = "adapter.rolled_back"
    rolled_back: str
    actor: str
    reason: str


class ReplicaVersion(Data):
    """A version that a gateway loaded into its engine, and whether the served log-probs proved it."""

    version: str
    digest: str
    state: Literal["proved", "failed"]
    why: str = ""


class ReplicaReported(Event):
    """A gateway says what it serves and holds. Repeated as a sign of life; `leaving` is its last word."""

    topic: ClassVar[str] = ROLLOUT
    type: Literal["replica.reported"] = "replica.reported"
    replica: str
    serving: str
    versions: list[ReplicaVersion] = []
    leaving: bool = False

    @property
    def key(self) -> str:
        return self.replica


AnyEvent = Annotated[
    ResponseGenerated
    | FeedbackSubmitted
    | CandidateSubmitted
    | EvaluationReported
    | CandidateApproved
    | CandidateRejected
    | AdapterPromoted
    | AdapterRolledBack
    | ReplicaReported,
    Field(discriminator="type"),
]
_any_event: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def encode(event: Event) -> bytes:
    """The bytes that go onto the log: UTF-8 JSON."""
    return event.model_dump_json().encode()


def decode(value: bytes) -> AnyEvent:
    """Read one event. Raises ValueError where the bytes are no event of a major version that this reader knows."""
    event = _any_event.validate_json(value)
    if event.schema_version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(f"event {event.id} has schema version {event.schema_version}; this reader knows 1.x")
    return event


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of every event, by its type."""
    return {cls.model_fields["type"].default: cls.model_json_schema() for cls in _classes()}


def _classes() -> list[type[Event]]:
    found: list[type[Event]] = []
    pending: list[type[Event]] = [Event]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if "type" in cls.model_fields:
                found.append(cls)
    return sorted(found, key=lambda cls: str(cls.model_fields["type"].default))
