"""The commands under `thumbwheel log`. As in `cli.py`, a command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import json
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thumbwheel.cli_context import Context, as_json, known_topic, pass_context, until_closed
from thumbwheel.cli_dlq import dlq
from thumbwheel.errors import LogError

if TYPE_CHECKING:
    from thumbwheel.log.port import Log, Record
    from thumbwheel.log.tail import Tail
    from thumbwheel.settings import Settings

POLL_S = 0.5


@click.group()
def log() -> None:
    """Look at the event log, make it, move it."""


log.add_command(dlq)


# --- making ------------------------------------------------------------------------------------------------------


@log.command()
@as_json
@pass_context
def init(context: Context, json_: bool) -> None:
    """Make what is missing of the log: the topics in Kafka, or the SQLite file. Changes nothing that is there."""
    settings = context.settings
    if settings.log.backend == "sqlite":
        path = settings.path(settings.log.path)
        there = path.is_file()
        context.log(settings)
        said = {"backend": "sqlite", "path": str(path), "made": not there}
        click.echo(json.dumps(said) if json_ else f"{'there' if there else 'made '}  {path}")
        return
    from thumbwheel.log.kafka.topics import check, make, wanted

    made = make(settings)
    names = [settings.log.kafka.prefix + topic.name for topic in wanted(settings)]
    problems = check(settings)
    if json_:
        there_ = [name for name in names if name not in made]
        said = {"backend": "kafka", "made": made, "there": there_, "problems": [asdict(one) for one in problems]}
        click.echo(json.dumps(said))
    else:
        for name in names:
            click.echo(f"{'made ' if name in made else 'there'}  {name}")
        for problem in problems:
            click.echo(f"{'PROBLEM' if problem.fatal else 'note   '}  {problem.topic} {problem.words}", err=True)
    sys.exit(LogError.exit_code if any(problem.fatal for problem in problems) else 0)


# --- looking -----------------------------------------------------------------------------------------------------


@log.command()
@click.argument("topic", required=False)
@click.option("--from", "start", type=int, default=0, help="The first offset of each partition.")
@click.option("--partition", type=int, help="Only this one [all].")
@as_json
@pass_context
def read(context: Context, topic: str | None, start: int, partition: int | None, json_: bool) -> None:
    """Print a topic (or TOPIC.dlq) from an offset on; without TOPIC, say what each topic holds."""
    from thumbwheel.log.port import read_all

    if topic is not None:
        known_topic(topic)
    with until_closed():
        events = context.log(context.settings)
        if topic is None:
            _overview(events, json_)
            return
        for index in range(events.partitions(topic)) if partition is None else [partition]:
            for record in read_all(events, topic, start, index):
                words = _shown(record, json_)
                click.echo(words if json_ else f"{record.partition}/{record.offset:<8} {words}")


@log.command()
@click.argument("topic", required=False)
@click.option("--key", default="", help="Only events of this response, version or replica.")
@click.option("--type", "type_", default="", help="Only events of this type, such as feedback.submitted.")
@click.option("--version", default="", help="Only events about this adapter version.")
@click.option("--user", default="", help="Only events of the user with this hash, or one that starts so.")
@click.option("--grep", default="", metavar="TEXT", help="Only events with TEXT in a value, in upper or lower case.")
@click.option("--since", metavar="WHEN", help="From then on: 45s, 10m, 2h, 3d ago, or an ISO time.")
@click.option("--from-start", is_flag=True, help="From the oldest event on.")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many.")
@click.option(
    "--follow/--no-follow", default=True, help="Wait for new events, or end where the log ends now [--follow]."
)
@as_json
@pass_context
def tail(
    context: Context,
    /,
    topic: str | None,
    since: str | None,
    from_start: bool,
    limit: int | None,
    follow: bool,
    json_: bool,
    type_: str,
    **wanted: str,
) -> None:
    """Follow TOPIC, or all three, and say what happens. Nobody else's place on the log moves.

    It begins with what comes next; with --no-follow, --since or --from-start with what is there.
    """
    with until_closed():
        from thumbwheel.events import TOPICS, schemas
        from thumbwheel.log.tail import Filter, Tail, look, moment

        if topic is not None:
            known_topic(topic)
        if type_ and type_ not in schemas():
            raise click.BadParameter(f"no event is a {type_!r}; there are {', '.join(schemas())}", param_hint="--type")
        if since is not None and from_start:
            raise click.UsageError("--since and --from-start are two beginnings: give one")
        try:
            begin = None if since is None else moment(since, time.time())
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--since") from error
        chosen = Filter(type=type_, **wanted)
        events = context.log(context.settings)

        def start(topic: str, partition: int) -> int:
            if begin is not None:
                return events.offset_at(topic, begin, partition)
            first, end = events.ends(topic, partition)
            return first if from_start or not follow else end

        reader = Tail(events, TOPICS if topic is None else [topic], start)
        shown = 0
        for record in _follow(reader) if follow else reader.fresh():
            if chosen.takes(look(record)):
                click.echo(_shown(record, json_))
                shown += 1
                if shown == limit:
                    return


def _follow(reader: Tail) -> Iterator[Record]:
    """For ever, or until nobody reads standard output. A log that is away is waited for; that is said once."""
    away = False
    while True:
        try:
            for record in reader.fresh():
                away = _back(away)
                yield record
            away = _back(away)
        except LogError as error:
            if not away:
                click.echo(f"thumbwheel: {error}; waiting for it", err=True)
            away = True
        if not _wait(POLL_S):
            return


def _back(away: bool) -> bool:
    if away:
        click.echo("thumbwheel: the log is back", err=True)
    return False


def _wait(seconds: float) -> bool:
    """Wait; False as soon as standard output is a pipe that nobody reads any more."""
    closed = select.poll()
    try:
        closed.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file behind it
        time.sleep(seconds)
        return True
    return not closed.poll(seconds * 1000)


def _overview(events: Log, json_: bool) -> None:
    from thumbwheel.log.copy import ALL

    topics = {
        topic: [
            dict(zip(("partition", "first", "next"), (index, *events.ends(topic, index)), strict=True))
            for index in range(events.partitions(topic))
        ]
        for topic in ALL
    }
    if json_:
        click.echo(json.dumps(topics))
        return
    for topic, partitions in topics.items():
        click.echo(f"{topic}: {sum(one['next'] - one['first'] for one in partitions)} records")
        for one in partitions:
            if one["next"] > one["first"]:
                click.echo(f"  partition {one['partition']}: offsets {one['first']} to {one['next'] - 1}")


def _shown(record: Record, json_: bool) -> str:
    from thumbwheel.log import tail
    from thumbwheel.log.deadletter import is_dlq

    if is_dlq(record.topic):
        letter = tail.Seen(record, None)
        return json.dumps(tail.as_json(letter)) if json_ else tail.letter_line(record)
    seen = tail.look(record)
    return json.dumps(tail.as_json(seen)) if json_ else tail.line(seen)


# --- moving ------------------------------------------------------------------------------------------------------


@log.command()
@click.argument("source", type=click.Choice(["sqlite", "kafka"]))
@click.argument("target", type=click.Choice(["sqlite", "kafka"]))
@as_json
@pass_context
def copy(context: Context, source: str, target: str, json_: bool) -> None:
    """Copy everything from SOURCE to TARGET, dead letters too; `sqlite` is [log] path, `kafka` is [log.kafka].

    Run it again and it goes on where it was, or takes what is new.
    """
    from thumbwheel.log import copy as moving

    if source == target:
        raise click.UsageError(f"source and target are both {source}: nothing to copy")
    settings = context.settings
    origin, goal = _opened(settings, source, moving.source), _opened(settings, target, moving.place)
    said = []
    with _progress() as tick:
        for one in moving.copy(origin, goal, tick):
            said.append(asdict(one))
            if not json_:
                there = f", {one.duplicates} of them there already" if one.duplicates else ""
                click.echo(f"{one.topic}: {one.read} records{there}")
    if json_:
        click.echo(json.dumps(said, indent=2))


def _opened(settings: Settings, name: str, opening: Callable[[Settings, str], Log]) -> Log:
    opened = opening(settings, name)
    click.get_current_context().call_on_close(opened.close)
    return opened


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a topic on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def tick(topic: str, done: int, total: int) -> None:
            if topic not in tasks:
                tasks[topic] = progress.add_task(topic)
            progress.update(tasks[topic], completed=done, total=total)

        yield tick


# --- schemas -----------------------------------------------------------------------------------------------------


@log.command()
@click.option("--write", type=click.Path(file_okay=False, path_type=Path), help="Write TYPE.json into this directory.")
def schemas(write: Path | None) -> None:
    """Print the JSON Schema of every event, or write each to a file."""
    from thumbwheel import events

    major = events.SCHEMA_VERSION.split(".")[0]
    published = {
        type: {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": f"urn:thumbwheel:event:{type}:{major}",
            **schema,
        }
        for type, schema in events.schemas().items()
    }
    if write is None:
        click.echo(json.dumps(published, indent=2))
        return
    write.mkdir(parents=True, exist_ok=True)
    for type, schema in published.items():
        (write / f"{type}.json").write_text(json.dumps(schema, indent=2) + "\n")
    click.echo(f"{len(published)} schemas in {write}")
