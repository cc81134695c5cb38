"""One typed settings file, `thumbwheel.toml`, with overrides from the environment.

`THUMBWHEEL_LEARNER__BETA=0.2` overrides `beta` in the section `[learner]`. Secrets are never written here: API keys
live as hashes in the file that `[gateway] keys` names, and clients of it read theirs from the environment or a file.
Paths are relative to `data`. `thumbwheel doctor --settings` prints what is in force.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import (
    SettingsError as SettingsSourceError,
)

from thumbwheel.errors import SettingsError

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KafkaSettings(Section):
    """The cluster behind `backend = "kafka"`. Passwords are never written here."""

    bootstrap: str = ""
    """Brokers to begin with: host:port, several with commas between them."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    ca_file: Path | None = None
    """Certificates, PEM, that the brokers' are checked by. None: those of the system."""
    certificate_file: Path | None = None
    """Our own certificate, PEM, for brokers that ask for one, and its key."""
    key_file: Path | None = None
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    username: str = ""
    password_file: Path | None = None
    """Holds the password; `$THUMBWHEEL_KAFKA_PASSWORD` comes first."""
    prefix: str = ""
    """Comes before the name of every topic and group, for several installations on one cluster."""
    member: str = ""
    """This process's name among those of its kind, the same after a restart. Empty: the host's name."""
    partitions: Count = 6
    """Of the topics of responses and feedback, when `thumbwheel log init` makes them. The rollout has one."""
    replication: Count = 3
    min_insync_replicas: Count = 2
    response_retention_days: Positive = 90.0
    feedback_retention_days: Positive = 365.0
    timeout_s: Positive = 15.0
    """How long the cluster may take to answer before that is an error. Whoever follows the log tries again."""
    session_timeout_s: Positive = 45.0
    """How long a member may be silent before its partitions go to another."""


class LogSettings(Section):
    """Where events go: a SQLite file on one machine, Kafka between several."""

    backend: Literal["sqlite", "kafka"] = "sqlite"
    path: Path = Path("log.sqlite")
    """The log of the backend "sqlite"."""
    outbox: Path = Path("outbox.sqlite")
    """With Kafka: what a gateway acknowledged lies here until the cluster has it."""
    mirror: Path = Path("mirror.sqlite")
    """With Kafka: the rollout's events as the gateway last saw them."""
    outbox_max_bytes: Annotated[int, Field(ge=1_000_000)] = 10_000_000_000
    """How large the outbox may grow while the cluster is away. Then the oldest responses go, those with votes last;
    when votes alone fill it, new ones are refused."""
    outbox_keep_s: Annotated[float, Field(ge=0)] = 86_400.0
    """How long a vote stays in the outbox after Kafka has it: as long as an Idempotency-Key is remembered."""
    forwarder_metrics_port: Port = 8104
    kafka: KafkaSettings = KafkaSettings()


class StoreSettings(Section):
    """Where adapter versions lie."""

    path: Path = Path("adapters")


class EngineSettings(Section):
    """The vLLM behind the gateway: started by it, or given by `url`; the README says how to start that one."""

    model: Path = Path("model")
    url: str = ""
    port: Port = 0
    arguments: list[str] = []
    environment: dict[str, str] = {}
    max_loras: Annotated[int, Field(ge=2)] = 3
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    max_model_len: Count = 2048
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """Tokens that end an answer beside the model's own end tokens; the one with which its chat template opens a turn,
    say: an adapter that learned to end early may open the user's turn instead, and no thumb speaks against it."""
    start_timeout_s: Positive = 600.0
    request_timeout_s: Positive = 600.0


class GatewaySettings(Section):
    """The OpenAI-compatible server."""

    host: str = "127.0.0.1"
    port: Port = 8100
    model_name: str = "policy"
    replica: str = "r1"
    keys: Path = Path("keys.json")
    max_body_bytes: Count = 1_000_000
    poll_s: Positive = 0.1
    report_every_s: Positive = 20.0
    drain_s: Positive = 30.0


class FreshSettings(Section):
    """Answers sampled under the adapter that is being trained: what "ppo", "grpo" and "gspo" learn from."""

    engine: str = ""
    """A vLLM that samples them, its URL: one that loads adapters at run time and sees the learner's files. Empty: the
    learner samples by itself."""
    answers: Annotated[int, Field(ge=2)] = 4
    """How many for each prompt."""
    epochs: Count = 2
    """How often each batch of them is gone over; "ppo" stops early where the policy moves too far."""
    minibatches: Count = 2
    """Optimizer steps in each of these."""


class RewardSettings(Section):
    """The reward model behind "ppo", "grpo" and "gspo": a score for an answer, learned from thumbs and pairs."""

    votes: Count = 2000
    """The newest so many are learned from."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of prompts whose votes only test it. It is refused unless it tells these ups from downs."""
    epochs: Count = 3
    batch: Count = 16
    learning_rate: Positive = 2e-4
    weight_thumbs: Positive = 1.0
    weight_pairs: Positive = 1.0
    ridge: Positive = 1.0
    """How much it takes to blame a thumb on its user, its topic or the answer's length."""
    samples: Annotated[int, Field(ge=8)] = 64
    """Answers of the reference that its zero and its unit come from."""


class PPOSettings(Section):
    """What "ppo" and "ppo-logged" alone need."""

    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Reward taken off for a nat of KL to the reference; "ppo" adapts it from there."""
    kl_target: Positive = 2.0
    """The KL to the reference, in nats an answer, that the coefficient steers towards."""
    kl_horizon: Positive = 1000.0
    """Answers over which it moves by a fifth."""
    unfinished_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Reward taken off for an answer that was cut off."""
    stop_kl: Positive = 0.05
    """A batch is left alone once the policy has moved 1.5 times this from where it began, nats a token."""
    value_learning_rate: Positive = 1e-3
    max_lag: Annotated[int, Field(ge=0)] = 4
    """Logged answers of versions older than this many are left out."""


class LearnerSettings(Section):
    """When to learn, from what, how hard, and how far the policy may move from the reference."""

    metrics_port: Port = 8101
    algorithm: str = "kto"
    """"kto" and "bco" learn from thumbs, "dpo" from pairs, "ppo-logged" from thumbs and the recorded log-probs; "ppo",
    "grpo" and "gspo" from fresh answers that a reward model scores."""
    z0: Literal["none", "measured", "mismatched"] = "none"
    """Where KTO's point of reference comes from: nowhere (APO-zero), the measured KL, or mismatched pairs."""
    dpo_loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    label_noise: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """The share of pairs that are the wrong way round, as "robust" takes it."""
    batch: Annotated[int, Field(ge=2)] = 16
    updates_per_candidate: Count = 4
    rank: Literal[1, 8, 16, 32, 64] = 8
    lora_alpha: Positive = 16.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    learning_rate: Positive = 1e-4
    beta: Positive = 0.1
    weight_up: Positive = 1.0
    weight_down: Positive = 1.0
    max_grad_norm: Positive = 1.0
    kl_budget: Positive = 4.0
    """Upper bound of KL to the reference, nats per sequence, that no candidate may pass."""
    kl_confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    kl_prompts: Path | None = None
    """Held-out prompts, one JSON object a line: {"messages": [...]}. None: prompts set aside from the log."""
    kl_samples: Count = 64
    max_tokens: Count = 256
    """Longest answer sampled when KL is measured, in tokens."""
    settle_s: Annotated[float, Field(ge=0)] = 5.0
    """How long a vote may still be changed before it is learned from."""
    poll_s: Positive = 0.5
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    fresh: FreshSettings = FreshSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()


class GuardrailSettings(Section):
    """Which suites a candidate has to pass. A suite is a YAML file, or the name of one that ships."""

    metrics_port: Port = 8102
    gateway: str = "http://127.0.0.1:8100"
    key_file: Path = Path("evaluator.key")
    """Holds the API key (scope evaluator) that the guardrails use; `$THUMBWHEEL_EVALUATOR_KEY` comes first."""
    suites: list[str] = ["default"]
    poll_s: Positive = 0.5
    concurrency: Count = 16


class DeploySettings(Section):
    """Who decides, and when a replica counts as gone."""

    metrics_port: Port = 8103
    approval: Literal["manual", "auto"] = "manual"
    replica_silence_s: Positive = 60.0
    poll_s: Positive = 0.1


class Settings(BaseSettings):
    """All of it. Immutable."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="THUMBWHEEL_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    data: Path = Path("state")
    log: LogSettings = LogSettings()
    store: StoreSettings = StoreSettings()
    engine: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    learner: LearnerSettings = LearnerSettings()
    guardrails: GuardrailSettings = GuardrailSettings()
    deploy: DeploySettings = DeploySettings()

    def path(self, relative: Path) -> Path:
        """A path of the settings, made absolute: relative ones lie under `data`."""
        return (self.data / relative).absolute()


def load(path: Path | None = None) -> Settings:
    """Read settings from `path`, else from `$THUMBWHEEL_CONFIG`, else from `thumbwheel.toml` if it is there.

    Raises SettingsError with one line a mistake: the setting's name, what is wrong and what was given.
    """
    chosen = path or (Path(os.environ["THUMBWHEEL_CONFIG"]) if "THUMBWHEEL_CONFIG" in os.environ else None)
    if chosen is not None and not chosen.is_file():
        raise SettingsError(f"there is no settings file {chosen}")
    file = chosen or Path("thumbwheel.toml")

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (env_settings, TomlConfigSettingsSource(settings_cls, file))

    try:
        return Loaded()
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']} (given: {problem['input']!r})"
            for problem in error.errors()
        ]
        raise SettingsError(f"{file} or a THUMBWHEEL_ variable has mistakes:\n" + "\n".join(lines)) from error
    except (SettingsSourceError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
