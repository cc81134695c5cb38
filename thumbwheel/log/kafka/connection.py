"""How to reach the cluster, and what a failure of kafka-python means in words of our settings.

The library says "Unable to bootstrap" whatever went wrong, and the reason to its own log alone: `errors` looks there
for what was said while the operation ran.
"""

import logging
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kafka import KafkaAdminClient, errors

from thumbwheel.errors import LogError, SettingsError
from thumbwheel.log.kafka.client import make
from thumbwheel.settings import KafkaSettings, Settings

PASSWORD = "THUMBWHEEL_KAFKA_PASSWORD"
MAX_BYTES = 16 * 1024 * 1024
"""The largest message, headers included; the topics allow as much."""
LETTER_BYTES = MAX_BYTES + 64 * 1024
"""The largest dead letter: a message, and the headers that say what became of it."""

_VAGUE = (errors.KafkaTimeoutError, errors.KafkaConnectionError, errors.NodeNotReadyError, errors.Cancelled, OSError)
"""What the library raises when it has given up: the reason is in its log."""

_CAUSES = (
    (
        r"SaslAuthenticationFailed|Failed to authenticate",
        "the cluster refuses user {username} with this password",
        f"username, password_file or ${PASSWORD}",
    ),
    (r"UnsupportedSaslMechanism", "the cluster does not take {sasl_mechanism} there", "sasl_mechanism"),
    (r"IllegalSaslState", "the brokers take no user and password there", 'security_protocol = "{security_protocol}"'),
    (
        r"certificate is not valid for '([^']+)'",
        "the brokers' certificate is not for {found}",
        'bootstrap = "{bootstrap}"',
    ),
    (r"certificate verify failed: (.+?) \(_ssl", "the brokers' certificate cannot be verified: {found}", "ca_file"),
    (
        r"ALERT_(?:BAD_CERTIFICATE|CERTIFICATE_REQUIRED|CERTIFICATE_UNKNOWN|UNKNOWN_CA)",
        "the brokers ask for a certificate of ours that they trust",
        "certificate_file and key_file",
    ),
    (r"Handshake failed: \[", "the brokers do not speak TLS there", 'security_protocol = "{security_protocol}"'),
    (
        r"(?:Topic|Group|Cluster|TransactionalId)AuthorizationFailed|is not authorized",
        "user {username} may not do that: {error}",
        "username",
    ),
    (
        r"FencedInstanceId",
        "another process has taken over as member {member}; two at once need two names",
        "member",
    ),
    (
        r"UnknownTopicOrPartition|not found in cluster metadata",
        "a topic is missing; make the topics with `thumbwheel log init`",
        'prefix = "{prefix}"',
    ),
    (
        r"NotEnoughReplicas",
        "too few replicas are in sync to take a message: brokers are down, or the topic asks for more than it has",
        "min_insync_replicas",
    ),
    (
        r"MessageSizeTooLarge|RecordListTooLarge",
        f"a message is larger than the cluster takes; topics made by `thumbwheel log init` take {MAX_BYTES} bytes",
        'prefix = "{prefix}"',
    ),
    (
        r"Invalid frame length",
        "what answers there expects TLS, or is no broker",
        'security_protocol = "{security_protocol}"',
    ),
    (r"DNS lookup failed for (\S+),", "there is no host {found}", 'bootstrap = "{bootstrap}"'),
    (r"\b\d+ (E[A-Z]+)\b", "nobody answers there: {found}", 'bootstrap = "{bootstrap}"'),
    (
        r"node_id=bootstrap-.*socket disconnected",
        "the brokers hang up at the first words: they may expect TLS, or a user and password",
        'security_protocol = "{security_protocol}"',
    ),
    (
        r"timed out|not answered",
        "the brokers did not answer in time",
        'bootstrap = "{bootstrap}", timeout_s = {timeout_s:g}',
    ),
)
"""What is looked for, what it means, and the setting that it is about; the first that is found counts."""


class _Reasons(logging.Handler):
    """The last things that kafka-python complained of, in this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: deque[tuple[float, str]] = deque(maxlen=200)

    def emit(self, record: logging.LogRecord) -> None:
        self._last.append((record.created, record.getMessage()))

    def since(self, start: float) -> list[str]:
        """What was said since `start`, Unix seconds, the latest first."""
        return [reason for created, reason in reversed(list(self._last)) if created >= start]


_reasons = _Reasons()
_library = logging.getLogger("kafka")
_library.setLevel(logging.WARNING)
_library.addHandler(_reasons)
_library.propagate = False  # it repeats itself several times a second while a broker is away; we say it once


class Connection:
    """The settings of the cluster, as kafka-python wants them."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where they cannot work: no address, no password, a certificate that is no file."""
        self.settings: KafkaSettings = settings.log.kafka
        addresses = [address.strip() for address in self.settings.bootstrap.split(",")]
        if not all(re.fullmatch(r"\S+:\d{1,5}", address) for address in addresses):
            given = f'"{self.settings.bootstrap}"' if self.settings.bootstrap else "empty"
            raise SettingsError(
                f'[log.kafka] bootstrap is {given}: it takes brokers\' addresses, "host:port,host:port"'
            )
        self.member = self.settings.member or socket.gethostname()
        for setting, value in (("prefix", self.settings.prefix), ("member", self.member)):
            if not re.fullmatch(r"[A-Za-z0-9._-]{0,200}", value):
                raise SettingsError(f'[log.kafka] {setting} is "{value}": it takes letters, digits, ".", "_" and "-"')
        self.timeout_ms = int(self.settings.timeout_s * 1000)
        self.options: dict[str, Any] = {
            "bootstrap_servers": addresses,
            "client_id": f"thumbwheel-{self.member}",
            "security_protocol": self.settings.security_protocol,
            "bootstrap_timeout_ms": self.timeout_ms,
            "request_timeout_ms": self.timeout_ms,
            "reconnect_backoff_max_ms": 1000,
            "metadata_max_age_ms": 60_000,
        }
        if "SSL" in self.settings.security_protocol:
            self.options["ssl_context"] = _tls(settings)
        if "SASL" in self.settings.security_protocol:
            if not self.settings.username:
                raise SettingsError("[log.kafka] username is empty, and security_protocol asks for one")
            self.options |= {
                "sasl_mechanism": self.settings.sasl_mechanism,
                "sasl_plain_username": self.settings.username,
                "sasl_plain_password": _password(settings),
            }

    def name(self, logical: str) -> str:
        """A topic or a group as the cluster knows it."""
        return self.settings.prefix + logical

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """What the library raises becomes a LogError that names the setting."""
        start = time.time()
        try:
            yield
        except (errors.KafkaError, OSError) as error:
            raise self.explain(doing, error, start) from error

    def explain(self, doing: str, error: BaseException, start: float) -> LogError:
        """The error of an operation that began at `start` (Unix seconds) in words, with the setting it is about."""
        given = f"{type(error).__name__}: {error}"
        said = [given, *_reasons.since(start)] if isinstance(error, _VAGUE) else [given]
        words = self.settings.model_dump() | {"member": self.member, "error": _short(error)}
        words["username"] = self.settings.username or "anonymous"
        for pattern, what, setting in _CAUSES:
            for match in filter(None, (re.search(pattern, line) for line in said)):
                words["found"] = match[1] if match.re.groups else ""
                return LogError(f"cannot {doing} Kafka ([log.kafka] {setting.format(**words)}): {what.format(**words)}")
        return LogError(f'cannot {doing} Kafka ([log.kafka] bootstrap = "{self.settings.bootstrap}"): {_short(error)}')

    def admin(self) -> KafkaAdminClient:
        """A client that asks about and changes topics and groups. Raises LogError where the cluster does not answer."""
        with self.errors("reach"):
            return make(KafkaAdminClient, **self.options)


def _short(error: BaseException) -> str:
    """The library puts whole requests and answers into some of its errors."""
    words = str(error)
    return words if len(words) <= 300 else f"{words[:300]}…"


def _tls(settings: Settings) -> ssl.SSLContext:
    kafka = settings.log.kafka
    try:
        context = ssl.create_default_context(cafile=settings.path(kafka.ca_file) if kafka.ca_file else None)
    except OSError as error:
        raise SettingsError(f"[log.kafka] ca_file {kafka.ca_file} cannot be read: {error}") from error
    if kafka.certificate_file:
        key = settings.path(kafka.key_file) if kafka.key_file else None
        try:
            context.load_cert_chain(settings.path(kafka.certificate_file), key)
        except OSError as error:
            raise SettingsError(f"[log.kafka] certificate_file or key_file cannot be read: {error}") from error
    return context


def _password(settings: Settings) -> str:
    if given := os.environ.get(PASSWORD):
        return given
    file = settings.log.kafka.password_file
    if file is None:
        raise SettingsError(f"there is no password for Kafka: set [log.kafka] password_file or ${PASSWORD}")
    try:
        return settings.path(file).read_text().strip()
    except OSError as error:
        raise SettingsError(f"[log.kafka] password_file {file} cannot be read: {error.strerror}") from error
