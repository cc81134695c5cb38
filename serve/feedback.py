"""Votes: POST /v1/feedback, and DELETE /v1/feedback/{response_id} to take one back.

202 means that the vote is on disk. A vote may come before its response is on the log, so only the shape of a response
id is checked. With an `Idempotency-Key` the event's id follows from it: a client may send again until it hears 202.
"""

import re
import time
import uuid
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from serve import metrics
from serve.auth import Key, Keys, user_hash
from serve.body import read_object
from serve.errors import ApiError
from thumbwheel.errors import LogError
from thumbwheel.events import FEEDBACK, FeedbackSubmitted, decode, new_id
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.settings import Settings

MAX_TEXT_BYTES = 32 * 1024
MAX_METADATA_BYTES = 4 * 1024
CLOCK_SKEW_S = 86_400.0
RESPONSE_ID = re.compile(r"(?:chatcmpl|cmpl)-(ns)?([0-9a-f]{12})7[0-9a-f]{3}[89ab][0-9a-f]{15}")
"""What the gateways issue: the prefix, `ns` where it was not stored, a UUID version 7 in hex."""
NAMESPACE = uuid.UUID("6a5f7f3e-97c5-4b0e-8a37-1f3f2d9f5b10")
"""Of the event ids that follow from idempotency keys."""


def _short_text(value: str) -> str:
    if len(value.encode(errors="surrogatepass")) > MAX_TEXT_BYTES:
        raise ValueError(f"may have at most {MAX_TEXT_BYTES} bytes")
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    if len(orjson.dumps(value)) > MAX_METADATA_BYTES:
        raise ValueError(f"may have at most {MAX_METADATA_BYTES} bytes as JSON")
    return value


Text = Annotated[str, AfterValidator(_short_text)]


class Vote(BaseModel):
    """The body of POST /v1/feedback."""

    model_config = ConfigDict(extra="forbid", strict=True)

    response_id: str
    choice_index: int = Field(default=0, ge=0, lt=100_000)
    rating: Literal["up", "down"] | None = None
    retracted: bool = False
    reasons: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default=[], max_length=16)
    comment: Text | None = None
    correction: Text | None = None
    preferred_over: str | None = None
    metadata: Annotated[dict[str, Any], AfterValidator(_small)] = {}
    user: str | None = Field(default=None, min_length=1, max_length=512)


class Feedback:
    """The endpoints."""

    def __init__(self, settings: Settings, log: SqliteLog, commit: GroupCommit, keys: Keys) -> None:
        self._settings = settings
        self._log = log
        self._commit = commit
        self._keys = keys

    async def submit(self, request: Request) -> Response:
        """POST /v1/feedback"""
        return await self._take(request, retract=False)

    async def retract(self, request: Request) -> Response:
        """DELETE /v1/feedback/{response_id}, with `user` and `choice_index` in the query or a JSON body."""
        return await self._take(request, retract=True)

    async def _take(self, request: Request, retract: bool) -> Response:
        rating = "none"
        try:
            key = self._keys.authenticate(request.headers.get("authorization"))
            key.require("feedback")
            fields = await (self._retraction(request) if retract else self._body(request))
            vote = parse(fields)
            rating = "retracted" if vote.retracted else str(vote.rating)
            event = self._event(vote, key, request.headers.get("idempotency-key"))
            result = await self._append(event)
        except ApiError as error:
            metrics.FEEDBACK.labels(rating, "failed" if error.status >= 500 else "rejected").inc()
            raise
        metrics.FEEDBACK.labels(rating, result).inc()
        answer = {"id": event.id, "object": "feedback", "response_id": event.response_id, "status": "accepted"}
        return Response(orjson.dumps(answer), 202, media_type="application/json")

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_object(request, self._settings.gateway.max_body_bytes)

    async def _retraction(self, request: Request) -> dict[str, Any]:
        fields: dict[str, Any] = dict(request.query_params)
        if index := fields.get("choice_index"):
            fields["choice_index"] = int(index) if index.isdecimal() and len(index) < 9 else index
        if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
            fields |= await self._body(request)
        return {**fields, "response_id": request.path_params["response_id"], "retracted": True}

    def _event(self, vote: Vote, key: Key, idempotency_key: str | None) -> FeedbackSubmitted:
        again = None if not idempotency_key else str(uuid.uuid5(NAMESPACE, f"{key.name}\n{idempotency_key}"))
        return FeedbackSubmitted(
            **vote.model_dump(exclude={"user"}),
            id=again or new_id(),
            source=f"gateway/{self._settings.gateway.replica}",
            api_key=key.name,
            user=user_hash(vote.user if vote.user is not None else f"key:{key.name}"),
        )

    async def _append(self, event: FeedbackSubmitted) -> Literal["accepted", "duplicate"]:
        """Returns once it is durable. Raises ApiError: 409 where another vote has the id, 503 where the log fails."""
        try:
            appended = await self._commit.append(event)
            if not appended.duplicate:
                return "accepted"
            there = self._log.find(FEEDBACK, event.id)
        except LogError as error:
            raise ApiError(503, f"The vote could not be stored; send it again: {error}.") from error
        assert there is not None
        first = decode(there.message.value)
        ignored = {"time", "source", "schema_version"}
        if first.model_dump(exclude=ignored) != event.model_dump(exclude=ignored):
            raise ApiError(409, "This Idempotency-Key was used for another vote; that one stands.", "Idempotency-Key")
        return "duplicate"


def parse(fields: dict[str, Any]) -> Vote:
    """A vote that may go onto the log. Raises ApiError: 400 with every mistake, 404 for an id never issued."""
    if not fields.get("response_id"):
        raise ApiError(400, "'response_id' is missing: the id of the answer that the vote is about.", "response_id")
    try:
        vote = Vote.model_validate(fields)
    except ValidationError as error:
        mistakes = [(".".join(map(str, problem["loc"])), problem) for problem in error.errors()]
        known = ", ".join(Vote.model_fields)
        words = [
            f"unknown field '{where}' (known: {known})"
            if problem["type"] == "extra_forbidden"
            else f"'{where}': {problem['msg']}"
            for where, problem in mistakes
        ]
        raise ApiError(400, "; ".join(words) + ".", mistakes[0][0]) from error
    if vote.rating is None and not vote.retracted:
        raise ApiError(400, "'rating' is missing: 'up' or 'down'.", "rating")
    _check_id(vote.response_id, "response_id")
    if vote.preferred_over is not None:
        _check_id(vote.preferred_over, "preferred_over")
        if vote.preferred_over == vote.response_id:
            raise ApiError(400, "'preferred_over' has to name another response.", "preferred_over")
    return vote


def _check_id(response_id: str, param: str) -> None:
    match = RESPONSE_ID.fullmatch(response_id)
    # The first 48 bits of a UUID version 7 are the time in milliseconds.
    if match is None or int(match[2], 16) / 1000 > time.time() + CLOCK_SKEW_S:
        raise ApiError(404, f"There is no response `{response_id[:80]}`.", param)
    if match[1]:
        raise ApiError(400, "That response was asked for with `store: false`; it takes no feedback.", param)
