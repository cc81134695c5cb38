"""`thumbwheel log dlq`, run as a person runs it, on both logs."""

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.thumbwheel.command import command, configure, run
from tests.thumbwheel.samples import dead
from thumbwheel.cli import cli
from thumbwheel.events import FEEDBACK, ROLLOUT
from thumbwheel.log import Log, open_log
from thumbwheel.settings import load

pytestmark = pytest.mark.slow


def test_a_dead_letter_is_listed_shown_and_given_back_byte_for_byte(config: Path, log: Log) -> None:
    value = b'{"schema_version": "9.0", "a": [1, "\xc3\xb6"]}\n'
    id = dead(log, value)
    assert id in run(config, "log", "dlq", "list").stdout
    (listed,) = json.loads(run(config, "log", "dlq", "list", FEEDBACK, "--json").stdout)
    assert (listed["id"], listed["group"], listed["why"], listed["bytes"]) == (
        id,
        "learner",
        "ValueError: no",
        len(value),
    )
    assert json.loads(run(config, "log", "dlq", "list", ROLLOUT, "--json").stdout) == []
    shown = run(config, "log", "dlq", "show", id[:6]).stdout
    assert "ValueError: no" in shown
    assert FEEDBACK in shown
    assert "ce_type" in shown
    assert '  "schema_version": "9.0",' in shown
    assert json.loads(run(config, "log", "dlq", "show", id, "--json").stdout)["original"]["value"] == value.decode()
    raw = subprocess.run(command(config, "log", "dlq", "show", id, "--raw"), capture_output=True, check=True)
    assert raw.stdout == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"\x00\xff\x1b[2J", "00000000  00 ff 1b 5b 32 4a"),
        ("grün\x1b".encode(), "'grün\\x1b'"),
        (b"", "''"),
        (b"\xff" * 10_000, "5904 bytes more"),
    ],
)
def test_bytes_that_are_no_json_are_shown_and_do_not_reach_the_terminal(
    value: bytes, words: str, tmp_path: Path
) -> None:
    config = configure(tmp_path)
    log = open_log(load(config))
    id = dead(log, value)
    log.close()
    show = ["--config", str(config), "log", "dlq", "show", id]
    shown = CliRunner().invoke(cli, show).stdout
    assert words in shown
    assert "\x1b" not in shown
    assert CliRunner().invoke(cli, [*show, "--raw"]).stdout_bytes == value


def test_a_dead_letter_is_replayed_once_and_again_only_when_asked(config: Path, log: Log) -> None:
    first, second = dead(log), dead(log, id="m2")

    def count() -> int:
        return sum(log.ends(FEEDBACK, partition)[1] for partition in range(log.partitions(FEEDBACK)))

    (sent,) = json.loads(run(config, "log", "dlq", "replay", first[:8], first, "--json").stdout)
    assert sent == {"id": first, "topic": FEEDBACK, "key": "r9", "sent": True}
    assert count() == 3
    done = run(config, "log", "dlq", "replay", "--all", FEEDBACK)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["left", first], ["sent", second]]
    assert count() == 4
    assert "nothing" not in run(config, "log", "dlq", "replay", "--all", ROLLOUT).stdout
    assert count() == 4
    run(config, "log", "dlq", "replay", "--all", "--again")
    assert count() == 6
    assert run(config, "log", "dlq", "list").stdout.count("(replayed)") == 2


def test_the_start_of_an_id_has_to_be_of_one_letter(tmp_path: Path) -> None:
    config = configure(tmp_path)
    log = open_log(load(config))
    ids = [dead(log, id=f"m{i}") for i in range(20)]  # more than there are first digits
    log.close()
    first = next(id[0] for id in ids if sum(other[0] == id[0] for other in ids) > 1)
    done = run(config, "log", "dlq", "show", first)
    assert done.returncode == 2
    assert "dead letters start with" in done.stderr
