import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.thumbwheel.test_rollout import life, reported, submitted
from tests.thumbwheel.test_store import manifest, save
from thumbwheel.cli import cli, main
from thumbwheel.events import ROLLOUT, AnyEvent
from thumbwheel.log import SqliteLog, message_of
from thumbwheel.store import AdapterStore


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "thumbwheel.toml"
    file.write_text(f'data = "{tmp_path}"\n')
    return file


def put(config: Path, *events: AnyEvent) -> None:
    log = SqliteLog(config.parent / "log.sqlite")
    log.append(ROLLOUT, [message_of(event) for event in events])
    log.close()


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--config", str(config), *arguments], catch_exceptions=True)


def test_an_approval_lands_on_the_log_with_who_and_why(config: Path) -> None:
    put(config, submitted(), reported("pass"))
    done = run(config, "adapters", "approve", "v1", "--digest", "d1", "--actor", "ann", "--reason", "good", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["actor"] == "ann"
    listed = json.loads(run(config, "adapters", "list", "--json").output)
    assert "approved" in json.dumps(listed)


def test_a_decision_that_does_not_fit_says_why_and_exits_with_5(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(config, submitted(), reported("fail"))
    arguments = ["thumbwheel", "--config", str(config), "adapters", "approve", "v1", "--reason", "r"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 5
    assert "v1" in capsys.readouterr().err
    assert SqliteLog(config.parent / "log.sqlite").ends(ROLLOUT)[1] == 2


def test_a_reason_is_demanded(config: Path) -> None:
    assert run(config, "adapters", "approve", "v1").exit_code == 2


def test_show_puts_the_manifest_beside_the_decisions(config: Path) -> None:
    adapter = AdapterStore(config.parent / "adapters").write("v1", manifest(), save)
    put(config, *life("v1", adapter.digest))
    shown = run(config, "adapters", "show", "v1")
    assert shown.exit_code == 0, shown.output
    assert adapter.digest in shown.output
    assert "ann" in shown.output
    assert "ann" in run(config, "adapters", "show", "v1", "--json").output


def test_a_rollback_goes_to_the_previous_champion(config: Path) -> None:
    put(config, *life("v1", "d1"), *life("v2", "d2", 2.0))
    done = run(config, "adapters", "rollback", "--reason", "worse", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["version"] == "v1"


def test_the_log_can_be_read_as_lines_of_json(config: Path) -> None:
    put(config, submitted())
    assert [json.loads(line)["type"] for line in run(config, "log", "read", ROLLOUT, "--json").output.splitlines()] == [
        "candidate.submitted"
    ]
    assert json.loads(run(config, "log", "read", "--json").output)[ROLLOUT] == [{"partition": 0, "first": 0, "next": 1}]
    assert run(config, "log", "read", "nothing").exit_code == 2


def test_a_key_is_printed_once_and_kept_as_a_hash(config: Path) -> None:
    key = run(config, "keys", "add", "app", "--scope", "inference").output.strip()
    kept = (config.parent / "keys.json").read_text()
    assert key not in kept
    assert "app" in kept


def test_doctor_names_what_is_missing_and_fails(config: Path) -> None:
    done = run(config, "doctor", "--json")
    assert done.exit_code == 1
    problems = {finding["what"] for finding in json.loads(done.output) if not finding["ok"]}
    assert {"model", "keys"} <= problems
