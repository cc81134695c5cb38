"""API keys: `tw-` and 32 random bytes, kept as SHA-256 hashes in a JSON file, each with a name and scopes.

    {"keys": [{"name": "app", "sha256": "…", "scopes": ["inference", "feedback"]}]}

A plain SHA-256 is enough because a key is random: there is no dictionary to try. `inference` may ask the champion,
`feedback` may vote, `evaluator` may ask a pinned version, `operator` may do that too and decide about versions.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ApiError
from thumbwheel.errors import SettingsError

SCOPES = ("inference", "feedback", "evaluator", "operator")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """Who asks. `name` is what goes onto the log."""

    name: str
    scopes: frozenset[str]

    def require(self, *scopes: str) -> None:
        """Raises ApiError (403) unless the key has one of `scopes`."""
        if self.scopes.isdisjoint(scopes):
            raise ApiError(403, f"The API key '{self.name}' lacks the scope for this: {' or '.join(scopes)}.")


class Keys:
    """The keys of a file, read again whenever the file changes: a key is added or revoked without a restart."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError where the file is there and cannot be read. A missing file holds no keys."""
        self._path = path
        self._stamp = _stamp(path)
        self._keys = _read(path)
        if not self._keys:
            logger.warning("no API keys in %s ([gateway] keys): every request will be refused", path)

    def authenticate(self, authorization: str | None) -> Key:
        """The key of an `Authorization` header. Raises ApiError (401), after the same time for any wrong key."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _unauthorized("No API key was given. Send it as 'Authorization: Bearer tw-…'.")
        self._refresh()
        digest = hashlib.sha256(token.strip().encode(errors="surrogateescape")).hexdigest()
        found: Key | None = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise _unauthorized("The API key is not known here: it is mistyped, or was revoked.")
        return found

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
        except SettingsError as error:  # a bad edit must not lock everybody out: the keys of before stay in force
            logger.error("%s; the keys read before stay in force", error)


def create(path: Path, name: str, scopes: Iterable[str]) -> str:
    """Add a key to the file (made if it is missing, mode 0600, replaced atomically) and return it: it is shown once.

    Raises SettingsError for an unknown scope, a name that is taken, or a file that cannot be read.
    """
    wanted = sorted(set(scopes))
    if not wanted or not set(wanted) <= set(SCOPES):
        raise SettingsError(f"scopes are some of {', '.join(SCOPES)}; given: {', '.join(wanted) or 'none'}")
    if not name:
        raise SettingsError("a key needs a name")
    entries = _entries(path)
    if any(entry["name"] == name for entry in entries):
        raise SettingsError(f"there is a key named '{name}' in {path} already")
    key = "tw-" + secrets.token_urlsafe(32)
    _write(path, [*entries, {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": wanted}])
    return key


def ensure(path: Path, name: str, scopes: Iterable[str], key_file: Path) -> None:
    """See to it that `key_file` (mode 0600) holds a key of that name; one whose text is lost is replaced."""
    entries = _entries(path)
    held = key_file.read_text().strip() if key_file.exists() else ""
    digest = hashlib.sha256(held.encode()).hexdigest()
    if any(entry["name"] == name and entry["sha256"] == digest for entry in entries):
        return
    if any(entry["name"] == name for entry in entries):
        _write(path, [entry for entry in entries if entry["name"] != name])
    _replace(key_file, create(path, name, scopes) + "\n")


def user_hash(user: str) -> str:
    """What the log keeps of an end user's identifier."""
    return hashlib.sha256(user.encode(errors="surrogatepass")).hexdigest()[:32]


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> list[tuple[str, Key]]:
    return [(entry["sha256"], Key(entry["name"], frozenset(entry["scopes"]))) for entry in _entries(path)]


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())["keys"]
        return [
            {"name": str(entry["name"]), "sha256": str(entry["sha256"]).lower(), "scopes": list(entry["scopes"])}
            for entry in entries
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"the API keys in {path} ([gateway] keys) cannot be read: {error!r}") from error


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    _replace(path, json.dumps({"keys": entries}, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
