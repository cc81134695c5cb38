"""How to reach the cluster, and what a failure of kafka-python means in words of our settings.

The library says "Unable to bootstrap" whatever went wrong, and the reason to its own log alone: `Connection` keeps the
last reasons from there.
"""

import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kafka import KafkaAdminClient, errors

from thumbwheel.errors import LogError, SettingsError
from thumbwheel.settings import KafkaSettings, Settings

PASSWORD = "THUMBWHEEL_KAFKA_PASSWORD"
MAX_BYTES = 16 * 1024 * 1024
"""The largest message, headers included; the topics allow as much."""


class _Reasons(logging.Handler):
    """The last things that kafka-python complained of, in this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last: deque[str] = deque(maxlen=50)

    def emit(self, record: logging.LogRecord) -> None:
        self.last.append(record.getMessage())


_reasons = _Reasons()
_library = logging.getLogger("kafka")
_library.addHandler(_reasons)
_library.propagate = False  # it repeats itself several times a second while a broker is away; we say it once


class Connection:
    """The settings of the cluster, as kafka-python wants them."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where they cannot work: no address, no password, a certificate that is no file."""
        self.settings: KafkaSettings = settings.log.kafka
        if not self.settings.bootstrap:
            raise SettingsError(
                '[log.kafka] bootstrap is empty: it takes the brokers\' addresses, "host:port,host:port"'
            )
        self.member = self.settings.member or socket.gethostname()
        self.timeout_ms = int(self.settings.timeout_s * 1000)
        self.options: dict[str, Any] = {
            "bootstrap_servers": [address.strip() for address in self.settings.bootstrap.split(",")],
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
        try:
            yield
        except (errors.KafkaError, OSError, TimeoutError) as error:
            raise self.explain(doing, error) from error

    def explain(self, doing: str, error: BaseException) -> LogError:
        """The error in words, with the setting that it is about."""
        reasons = [str(error), *reversed(_reasons.last)]
        protocol = self.settings.security_protocol
        what, setting = str(error), f'bootstrap = "{self.settings.bootstrap}"'
        for reason in reasons:
            low = reason.lower()
            if "saslauthenticationfailed" in low or "authentication failed" in low or "invalid credentials" in low:
                what = f"the cluster refuses user {self.settings.username} with this password"
                setting = f"username, password_file or ${PASSWORD}"
            elif "unsupportedsaslmechanism" in low or "sasl mechanism" in low:
                what = f"the cluster does not take {self.settings.sasl_mechanism}"
                setting = "sasl_mechanism"
            elif "certificate_verify_failed" in low or "certificate verify failed" in low:
                what, setting = "the brokers' certificate cannot be verified", "ca_file"
            elif "wrong_version_number" in low or ("ssl" in low and "eof" in low):
                what, setting = "the brokers do not speak TLS there", f"security_protocol = {protocol}"
            elif "authorizationfailed" in low or "not authorized" in low:
                what, setting = f"user {self.settings.username or 'anonymous'} may not: {error}", "username"
            elif "unknown_topic_or_partition" in low or "unknowntopicorpartition" in low:
                what, setting = "a topic is missing; make the topics with `thumbwheel log init`", "prefix"
            elif "notenoughreplicas" in low:
                what = "too few replicas are in sync to take a message: brokers are down"
                setting = f"min_insync_replicas, {self.settings.min_insync_replicas}, when the topics were made"
            elif "messagesizetoolarge" in low or "recordtoolarge" in low or "recordlisttoolarge" in low:
                what = f"a message is larger than the cluster takes; `thumbwheel log init` allows {MAX_BYTES} bytes"
                setting = "prefix"
            elif "econnrefused" in low or "name or service not known" in low or "dns" in low or "getaddrinfo" in low:
                what = f"nobody answers there: {reason.rsplit(': ', 1)[-1]}"
            elif "fencedinstanceid" in low:
                what = f"another process is member {self.member}; two at once need two names"
                setting = "member"
            else:
                continue
            break
        return LogError(f"cannot {doing} Kafka ([log.kafka] {setting}): {what}")

    def admin(self) -> KafkaAdminClient:
        """A client that asks about and changes topics and groups. Raises LogError where the cluster does not answer."""
        _reasons.last.clear()
        with self.errors("reach"):
            return KafkaAdminClient(**self.options)


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
