"""The commands under `thumbwheel log dlq`. As in `cli.py`, a command imports what it needs when it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from thumbwheel.cli_context import Context, as_json, known_topic, pass_context, until_closed

if TYPE_CHECKING:
    from thumbwheel.log.deadletter import Letter
    from thumbwheel.log.port import Log

_SHOWN_BYTES = 4096
"""How much of a dead letter that is no JSON is shown."""


@click.group()
def dlq() -> None:
    """Records that a program could not read: kept whole, with why and where."""


@dlq.command("list")
@click.argument("topic", required=False)
@as_json
@pass_context
def list_letters(context: Context, topic: str | None, json_: bool) -> None:
    """Every dead letter, or those of TOPIC."""
    from thumbwheel.log.tail import local, plain

    with until_closed():
        found = _letters(context.log(context.settings), [topic] if topic else [])
        if json_:
            click.echo(json.dumps([_letter_json(letter) for letter in found], indent=2))
            return
        for letter in found:
            words = f"{letter.id}  {local(letter.original.time)}  {_place(letter)}  {letter.group}  {letter.why}"
            click.echo(plain(words) + ("  (replayed)" if letter.replayed else ""))
        if not found:
            click.echo("no dead letters", err=True)


@dlq.command("show")
@click.argument("id")
@click.option("--raw", is_flag=True, help="Write exactly the original bytes, and nothing else.")
@as_json
@pass_context
def show_letter(context: Context, id: str, raw: bool, json_: bool) -> None:
    """The dead letter ID (the start of it will do): why, where, and what was in it."""
    from thumbwheel.log.tail import local, parts, plain

    letter = _one(_letters(context.log(context.settings), []), id)
    original = letter.original
    if raw:
        click.echo(original.value, nl=False)
        return
    if json_:
        click.echo(json.dumps({**_letter_json(letter), "original": parts(original)}, indent=2))
        return
    rows = {
        "letter": letter.id,
        "why": letter.why,
        "where": _place(letter),
        "group": letter.group,
        "replayed": "yes" if letter.replayed else "no",
        "id": original.id,
        "key": original.key,
        "time": local(original.time),
        **{f"header {name}": repr(content.decode(errors="replace")) for name, content in original.headers},
    }
    width = max(map(len, rows))
    for name, words in rows.items():
        click.echo(f"{plain(name):<{width}}  {plain(words)}")
    click.echo(f"\n{_readable(original.value)}")


@dlq.command("replay")
@click.argument("ids", nargs=-1, metavar="ID... | --all [TOPIC]...")
@click.option("--all", "all_", is_flag=True, help="Every letter, or every one of the topics that are named.")
@click.option("--again", is_flag=True, help="Also letters that were replayed already.")
@as_json
@pass_context
def replay_letters(context: Context, ids: tuple[str, ...], all_: bool, again: bool, json_: bool) -> None:
    """Send originals to their topics again, unchanged: do so once what could not read them is mended."""
    from thumbwheel.log.deadletter import replay
    from thumbwheel.log.tail import plain

    if not ids and not all_:
        raise click.UsageError("name the letters by their ids, or give --all")
    events = context.log(context.settings)
    letters = _letters(events, ids if all_ else [])
    if not all_:
        named = {_one(letters, id).id for id in ids}
        letters = [letter for letter in letters if letter.id in named]
    said: list[dict[str, Any]] = []
    for letter in letters:
        send = again or not letter.replayed
        if send:
            replay(events, letter)
        said.append({"id": letter.id, "topic": letter.topic, "key": letter.original.key, "sent": send})
        if not json_:
            verb = "sent   " if send else "left   "
            why = "" if send else "  (was replayed; --again sends it once more)"
            click.echo(plain(f"{verb}{letter.id}  to {letter.topic}  key {letter.original.key}") + why)
    if json_:
        click.echo(json.dumps(said, indent=2))
    elif not letters:
        click.echo("no dead letters", err=True)


def _letters(events: Log, topics: Sequence[str]) -> list[Letter]:
    from thumbwheel.events import TOPICS
    from thumbwheel.log.deadletter import is_dlq, letters, source

    for topic in topics:
        known_topic(topic)
    chosen = [source(topic) if is_dlq(topic) else topic for topic in topics] or TOPICS
    return [letter for topic in dict.fromkeys(chosen) for letter in letters(events, topic)]


def _one(letters: Sequence[Letter], id: str) -> Letter:
    found = [letter for letter in letters if letter.id == id] or [one for one in letters if one.id.startswith(id)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise click.UsageError(f"no dead letter {id}; `thumbwheel log dlq list` names them")
    raise click.UsageError(f"{len(found)} dead letters start with {id!r}: {', '.join(one.id for one in found[:5])}")


def _place(letter: Letter) -> str:
    return f"{letter.topic} partition {letter.partition} offset {letter.offset}"


def _letter_json(letter: Letter) -> dict[str, Any]:
    said = asdict(letter)
    del said["original"]
    return said | {"key": letter.original.key, "time": letter.original.time, "bytes": len(letter.original.value)}


def _readable(value: bytes) -> str:
    """Bytes for a person: JSON indented, text with its control characters escaped, else a hex dump."""
    try:
        return json.dumps(json.loads(value), indent=2)
    except (ValueError, RecursionError):
        pass
    shown, more = value[:_SHOWN_BYTES], ""
    if len(value) > _SHOWN_BYTES:
        more = f"\n… {len(value) - _SHOWN_BYTES} bytes more; --raw writes them all"
    try:
        value.decode()
        return repr(shown.decode(errors="ignore")) + more
    except UnicodeDecodeError:
        rows = [shown[start : start + 16] for start in range(0, len(shown), 16)]
        return (
            "\n".join(f"{16 * index:08x}  {row.hex(' '):<47}  {_ascii(row)}" for index, row in enumerate(rows)) + more
        )


def _ascii(row: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
