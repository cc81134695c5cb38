"""What a version answered: the evidence that the checks look at."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from thumbwheel.manifest import Manifest


class Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Answer(Part):
    """One sampled answer. `token_ids` and `logprobs` are as long as each other, the stop token included. Nats."""

    prompt: str
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    ended: bool
    """It ended by itself: the last token is the stop token. Otherwise it was cut at `max_tokens`."""

    @property
    def content_length(self) -> int:
        """Tokens without the stop token."""
        return len(self.token_ids) - self.ended


class Answers(Part):
    """All that one version answered to one suite: `sampled` at temperature 1, the other sets at temperature 0."""

    version: str
    digest: str
    sampled: list[Answer]
    harmful: list[Answer] = []
    harmless: list[Answer] = []
    required: list[Answer] = []

    def all(self) -> list[Answer]:
        return [*self.sampled, *self.harmful, *self.harmless, *self.required]


@dataclass(frozen=True)
class Evidence:
    """A candidate's answers beside the reference's (same prompts, same order, same seeds).

    `under_reference[i][t]` is the reference's log-prob of token t of `candidate.sampled[i]`; `served_probes[i][t]` the
    served candidate's log-prob of token t of the manifest's probe i. Nats, temperature 1.
    """

    candidate: Answers
    reference: Answers
    under_reference: list[list[float]]
    served_probes: list[list[float]]
    manifest: Manifest
    refusal_patterns: tuple[str, ...] = ()
