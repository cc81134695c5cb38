"""The rollout for a person (text, with colours that `click.echo` leaves out off a terminal) and for a script (JSON)."""

import shutil
import sys
import time
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from thumbwheel.errors import RolloutError
from thumbwheel.events import (
    BASE,
    AdapterPromoted,
    AdapterRolledBack,
    CandidateApproved,
    CandidateRejected,
    CandidateSubmitted,
    CheckResult,
    EvaluationReported,
    ReplicaReported,
    RolloutEvent,
)
from thumbwheel.manifest import Manifest
from thumbwheel.rollout import Candidate, Rollout
from thumbwheel.settings import DeploySettings

STYLES = {
    "pass": "green",
    "fail": "red",
    "inconclusive": "yellow",
    "promoted": "green",
    "pending_approval": "bold yellow",
    "rejected": "red",
    "rolled_back": "red",
}
"""Colours of verdicts and states; a word without one stays plain."""


SILENCE_S = DeploySettings().replica_silence_s


def table(state: Rollout, now: float | None = None, silence_s: float = SILENCE_S) -> str:
    """Every version, newest first, and the replicas. A replica is live when it spoke within `silence_s` seconds."""
    now = time.time() if now is None else now
    live = state.live(now, silence_s)
    versions = Table("version", "status", "parent", "gates", "votes", "KL≤", "proved", "submitted", "digest", box=None)
    for candidate in reversed(state.candidates.values()):
        proved = sum(_holds(replica, candidate) == "proved" for replica in live)
        _add(
            versions,
            _name(state, candidate.version),
            _word(candidate.status),
            candidate.parent,
            _word(candidate.report.verdict if candidate.report else "–"),
            str(candidate.submitted.learned_from),
            f"{candidate.submitted.kl_upper:.2f}",
            f"{proved}/{len(live)}",
            _when(candidate.submitted.time),
            _short(candidate.digest),
        )
    _add(versions, _name(state, BASE), *["–"] * 8)
    return _text(Group(versions, "", _replicas(state, now, silence_s)))


def detail(state: Rollout, version: str, manifest: Manifest | None = None) -> str:
    """One version: where it came from, its gates, and everything that was decided about it.

    Raises RolloutError where it is unknown.
    """
    candidate = _candidate(state, version)
    facts = Table.grid(padding=(0, 2))
    for label, value in (
        ("version", _name(state, version)),
        ("status", _word(candidate.status)),
        ("digest", candidate.digest),
        ("parent", candidate.parent),
        ("learned", _learned(candidate, manifest)),
        ("KL", _moved(candidate, manifest)),
    ):
        _add(facts, label, value)
    history = Table("time", "event", "by", "what", box=None)
    for event in candidate.history:
        _add(history, _when(event.time), event_name(event), *_account(event))
    return _text(Group(facts, "", _gates(candidate.report), "", history))


def as_json(state: Rollout, now: float | None = None, silence_s: float = SILENCE_S) -> dict[str, Any]:
    """All of the rollout as plain data."""
    live = {replica.replica for replica in state.live(time.time() if now is None else now, silence_s)}
    return {
        "champion": state.champion,
        "previous": state.previous,
        "versions": [_plain(state, candidate) for candidate in state.candidates.values()],
        "replicas": [
            {**replica.model_dump(mode="json", include={"replica", "serving", "versions", "leaving", "time"}),
             "live": replica.replica in live}
            for replica in state.replicas.values()
        ],
        "ignored": [{"id": id, "why": why} for id, why in state.ignored],
    }  # fmt: skip


def detail_json(state: Rollout, version: str, manifest: Manifest | None = None) -> dict[str, Any]:
    """One version as plain data; the probes of the manifest, for engines alone, are left out.

    Raises RolloutError where it is unknown.
    """
    plain = _plain(state, _candidate(state, version))
    return plain | {"manifest": manifest.model_dump(mode="json", exclude={"probes"}) if manifest else None}


def _text(view: RenderableType) -> str:
    """As wide as the terminal; off a terminal wide enough that nothing is cut for a script that reads it."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(width=width, force_terminal=True)
    with console.capture() as capture:
        console.print(view)
    return capture.get().rstrip()


def event_name(event: RolloutEvent) -> str:
    """`candidate.approved` of an approval."""
    return str(type(event).model_fields["type"].default)


def _plain(state: Rollout, candidate: Candidate) -> dict[str, Any]:
    return {
        "version": candidate.version,
        "digest": candidate.digest,
        "parent": candidate.parent,
        "status": candidate.status,
        "champion": candidate.version == state.champion,
        "algorithm": candidate.submitted.algorithm,
        "learned_from": candidate.submitted.learned_from,
        "kl_upper": candidate.submitted.kl_upper,
        "report": candidate.report.model_dump(mode="json") if candidate.report else None,
        "history": [event.model_dump(mode="json") for event in candidate.history],
    }


def _candidate(state: Rollout, version: str) -> Candidate:
    candidate = state.candidates.get(version)
    if candidate is None:
        known = ", ".join(state.candidates) or "none yet"
        raise RolloutError(f"no version {version} was ever submitted; known are: {known}")
    return candidate


def _learned(candidate: Candidate, manifest: Manifest | None) -> str:
    line = f"{candidate.submitted.algorithm}, {candidate.submitted.learned_from} votes"
    if manifest is None:
        return line
    return f"{line}: {manifest.learned_from.ups} up, {manifest.learned_from.downs} down"


def _moved(candidate: Candidate, manifest: Manifest | None) -> str:
    if manifest is None:
        return f"at most {candidate.submitted.kl_upper:.3g} nats per sequence"
    kl = manifest.kl
    scaled = f"; scaled back to {kl.scale:.3g} of the update to hold it" if kl.scale != 1 else ""
    return (
        f"{kl.mean:.3g}, at most {kl.upper:.3g} nats per sequence (n={kl.n}, {kl.per_token:.3g} per token); "
        f"budget {kl.budget:.3g}{scaled}"
    )


def _replicas(state: Rollout, now: float, silence_s: float) -> Table:
    replicas = Table("replica", "serving", "holds", "last seen", box=None)
    live = state.live(now, silence_s)
    for replica in state.replicas.values():
        age = f"{max(0.0, now - replica.time):.0f} s ago"
        _add(
            replicas,
            replica.replica,
            replica.serving,
            ", ".join(f"{held.version} {held.state}" for held in replica.versions) or "–",
            age if replica in live else Text(f"{age}, {'left' if replica.leaving else 'silent'}", "red"),
        )
    return replicas


def _gates(report: EvaluationReported | None) -> RenderableType:
    if report is None:
        return Text("not evaluated yet", "yellow")
    gates = Table("gate", "verdict", "n", "estimate", "interval", "limit", "why", box=None)
    for check in report.checks:
        _add(
            gates,
            check.name,
            _word(check.verdict),
            str(check.n),
            _number(check.estimate, check.unit),
            _interval(check),
            _number(check.limit, check.unit),
            check.why,
        )
    return gates


def _account(event: RolloutEvent) -> tuple[str, str]:
    """Who did it, and what it was."""
    match event:
        case CandidateSubmitted():
            return event.source, f"trained from {event.parent} on {event.learned_from} votes"
        case EvaluationReported():
            return event.source, event.verdict
        case CandidateApproved():
            return event.actor, f"FORCED past the gates: {event.reason}" if event.forced else event.reason
        case CandidateRejected():
            return event.actor, event.reason
        case AdapterPromoted():
            return event.actor, f"in place of {event.previous}"
        case AdapterRolledBack():
            return event.actor, f"back to {event.version}: {event.reason}"
    return event.source, ""


def _holds(replica: ReplicaReported, candidate: Candidate) -> str | None:
    for held in replica.versions:
        if held.version == candidate.version and held.digest == candidate.digest:
            return held.state
    return None


def _add(table: Table, *cells: str | Text) -> None:
    """A row of plain text: what people and programs wrote is not markup, nor may it steer the terminal."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(_printable(cell)) for cell in cells))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "·" for character in text)


def _name(state: Rollout, version: str) -> Text:
    if version == state.champion:
        return Text(f"{version} champion", "bold green")
    return Text(f"{version} previous") if version == state.previous else Text(version)


def _word(word: str) -> Text:
    return Text(word, STYLES.get(word, ""))


def _interval(check: CheckResult) -> str:
    if check.low is None and check.high is None:
        return "–"
    return f"[{'–' if check.low is None else f'{check.low:.3g}'}, {'–' if check.high is None else f'{check.high:.3g}'}]"


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.3g} {unit}".strip()


def _short(digest: str) -> str:
    """`sha256:0123456789ab…`: enough to tell versions apart by eye; `detail` has all of it."""
    return digest if len(digest) <= 20 else f"{digest[:19]}…"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
