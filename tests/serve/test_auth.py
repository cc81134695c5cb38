import hashlib
import hmac
import json
import os
import stat
from pathlib import Path

import pytest

from serve.auth import Keys, create, ensure, user_hash
from serve.errors import ApiError
from thumbwheel.errors import SettingsError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


def status_of(keys: Keys, header: str | None) -> int:
    with pytest.raises(ApiError) as caught:
        keys.authenticate(header)
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    return caught.value.status


def test_a_created_key_is_known_and_the_file_holds_only_its_hash(path: Path) -> None:
    key = create(path, "app", ["feedback", "inference"])
    assert key.startswith("tw-")
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Keys(path).authenticate(f"Bearer {key}")
    assert (found.name, sorted(found.scopes)) == ("app", ["feedback", "inference"])


def test_keys_have_32_random_bytes(path: Path) -> None:
    first, second = create(path, "a", ["inference"]), create(path, "b", ["inference"])
    assert first != second
    assert len(first) == len("tw-") + 43  # base64 of 32 bytes


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer tw-wrong", "Bearer \udcff"])
def test_no_key_or_a_wrong_one_is_401(path: Path, header: str | None) -> None:
    create(path, "app", ["inference"])
    assert status_of(Keys(path), header) == 401


def test_the_hash_itself_is_no_key(path: Path) -> None:
    key = create(path, "app", ["inference"])
    assert status_of(Keys(path), f"Bearer {hashlib.sha256(key.encode()).hexdigest()}") == 401


def test_every_hash_is_compared_in_constant_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [create(path, name, ["inference"]) for name in ("a", "b", "c")]
    compared: list[str] = []
    compare = hmac.compare_digest

    def spy(known: str, given: str) -> bool:
        compared.append(known)
        return compare(known, given)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert Keys(path).authenticate(f"Bearer {keys[0]}").name == "a"
    assert len(compared) == 3, "it went on after the match"


def test_a_missing_scope_is_403(path: Path) -> None:
    secret = create(path, "app", ["inference"])
    key = Keys(path).authenticate(f"Bearer {secret}")
    key.require("evaluator", "inference")
    with pytest.raises(ApiError) as caught:
        key.require("evaluator", "operator")
    assert caught.value.status == 403


def test_a_key_is_added_and_revoked_without_a_restart(path: Path) -> None:
    keys = Keys(path)
    key = create(path, "late", ["inference"])
    assert keys.authenticate(f"Bearer {key}").name == "late"
    path.write_text('{"keys": []}')
    assert status_of(keys, f"Bearer {key}") == 401


def test_a_bad_edit_keeps_the_keys_of_before_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = create(path, "app", ["inference"])
    keys = Keys(path)
    path.write_text('{"keys": [')
    assert keys.authenticate(f"Bearer {key}").name == "app"
    assert "cannot be read" in caplog.text


def test_a_broken_file_stops_the_start(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(SettingsError, match="cannot be read"):
        Keys(path)


@pytest.mark.parametrize(("name", "scopes"), [("app", ["inference"]), ("", ["inference"]), ("b", []), ("b", ["root"])])
def test_a_taken_name_and_an_unknown_scope_are_refused_and_change_nothing(
    path: Path, name: str, scopes: list[str]
) -> None:
    create(path, "app", ["inference"])
    before = path.read_text()
    with pytest.raises(SettingsError):
        create(path, name, scopes)
    assert path.read_text() == before
    assert os.listdir(path.parent) == [path.name]


def test_ensure_makes_a_key_once_and_replaces_one_whose_text_is_lost(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "app.key"
    ensure(path, "app", ["inference"], file)
    first = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ensure(path, "app", ["inference"], file)
    assert file.read_text() == first
    file.unlink()
    ensure(path, "app", ["inference"], file)
    assert Keys(path).authenticate(f"Bearer {file.read_text().strip()}").name == "app"
    assert status_of(Keys(path), f"Bearer {first.strip()}") == 401
    assert len(json.loads(path.read_text())["keys"]) == 1


def test_a_users_hash_does_not_show_the_user() -> None:
    assert user_hash("ada@example.org") == hashlib.sha256(b"ada@example.org").hexdigest()[:32]
