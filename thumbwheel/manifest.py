"""What an adapter version says of itself: where it came from, what it learned from, how far it moved, its proof."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from thumbwheel.events import BASE


class Part(BaseModel):
    # An infinite budget is written as "Infinity": as a number it would not be JSON, as null it could not be read back.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class KLBound(Part):
    """KL(candidate ‖ reference), histories sampled from the candidate on held-out prompts. Nats.

    `mean` and `upper` (a confidence bound) per sequence, `per_token` the mean per sampled token, n the sequences.
    """

    mean: float
    upper: float
    per_token: float
    n: int
    budget: float
    scale: float = 1.0
    """What the update was multiplied with to come inside the budget; 1 when it was inside as trained."""


class LearnedFrom(Part):
    """Which votes made it. `feedback_ids` are the ids of the events that this version and no other learned from.

    Thumbs up and down that were learned from one by one, and pairs that were made from votes.
    """

    ups: int
    downs: int
    pairs: int = 0
    feedback_ids: list[str]


class Probe(Part):
    """A prompt and an answer with the log-probs that the candidate and the base model give to each answer token.

    The two lists of log-probs are as long as `completion_token_ids`. Nats, temperature 1.
    """

    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    candidate_logprobs: list[float]
    base_logprobs: list[float]


class Manifest(Part):
    """`manifest.json` beside the weights; covered by the version's digest."""

    version: str
    parent: str = BASE
    base_model: str
    """Fingerprint of the base model (`store.fingerprint`); an adapter serves on no other."""
    created: float
    algorithm: str
    learned_from: LearnedFrom
    reward_model: str = ""
    """The version of the learner's reward model that scored fresh answers; empty where none did."""
    kl: KLBound
    probes: list[Probe]
    settings: dict[str, Any] = {}
