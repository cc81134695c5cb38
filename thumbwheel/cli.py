"""The command line. It imports what a command needs when the command runs, so that `--help` is instant.

Exit codes: 0 done · 1 failed · 2 usage or settings · 3 log · 4 adapter · 5 the decision does not fit the rollout ·
6 nothing was learned · 130 ended by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from thumbwheel import __version__
from thumbwheel.cli_context import Context, as_json, pass_context
from thumbwheel.cli_log import log
from thumbwheel.errors import ThumbwheelError

if TYPE_CHECKING:
    from thumbwheel.settings import Settings


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="Settings file [./thumbwheel.toml].")
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Thumbs in, better adapters out: an online feedback loop around vLLM and LoRA adapters."""
    context.obj = Context(config)


@cli.command()
@pass_context
def up(context: Context) -> None:
    """Run the whole loop on this machine: gateway and engine, learner, guardrails, controller."""
    from serve.auth import ensure
    from thumbwheel.daemon import configure_logging
    from thumbwheel.up import Supervisor

    settings = context.settings
    configure_logging("up")
    keys = settings.path(settings.gateway.keys)
    for name, scopes in {
        "app": ("inference", "feedback"),
        "operator": ("inference", "operator"),
        "evaluator": ("inference", "evaluator"),
    }.items():
        ensure(keys, name, scopes, settings.data.absolute() / f"{name}.key")
    gateway = settings.gateway
    click.echo(f"gateway   http://{gateway.host}:{gateway.port}/v1   model {gateway.model_name}", err=True)
    click.echo(f"API key   in {settings.data.absolute() / 'app.key'}", err=True)
    Supervisor(context.config, grace_s=gateway.drain_s + 30).run()


@cli.command()
@pass_context
def serve(context: Context) -> None:
    """Run the gateway, and the engine behind it."""
    from serve.main import run

    run(context.settings, context.config)


@cli.command()
@pass_context
def forward(context: Context) -> None:
    """Run the forwarder, which carries a gateway's outbox to Kafka. The gateway starts one by itself."""
    from thumbwheel.log.kafka.forwarder import run

    run(context.settings)


@cli.command()
@click.option(
    "--algorithm",
    metavar="NAME",
    help="kto, bco, dpo, ppo, ppo-logged, grpo or gspo [the one that the settings name].",
)
@click.option(
    "--from",
    "source",
    metavar="LOG",
    help="Make one update over this recorded log and show what came of it: the path of a SQLite log, or `log` for the "
    "log that the settings name. The log stays as it is, and no candidate comes of it.",
)
@click.option("--dry-run", is_flag=True, help="With --from: only say what it would learn from, and what is missing.")
@as_json
@pass_context
def learn(context: Context, algorithm: str | None, source: str | None, dry_run: bool, json_: bool) -> None:
    """Run the learner: votes in, candidates out. With --from, one update and its figures."""
    settings = context.settings
    if algorithm is not None:
        chosen = settings.learner.model_copy(update={"algorithm": algorithm})
        settings = settings.model_copy(update={"learner": chosen})
    if source is None:
        if dry_run or json_:
            raise click.UsageError("--dry-run and --json go with --from LOG")
        from learner.daemon import run

        run(settings)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("--from runs in one process: start it without torchrun")
    try:
        _learn_once(settings, source, dry_run, json_)
    except KeyboardInterrupt:
        click.echo("thumbwheel: stopped; nothing was kept, and the log is as it was", err=True)
        sys.exit(130)


def _learn_once(settings: Settings, source: str, dry_run: bool, json_: bool) -> None:
    from learner import table
    from learner.daemon import check
    from learner.once import NothingLearned, learn
    from learner.survey import survey

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing stays behind in the temporary directory
    check(settings)
    if not dry_run:
        outcome = learn(settings, source)
        click.echo(table.as_json(outcome) if json_ else table.of_outcome(outcome))
        return
    found = survey(settings, source)
    click.echo(table.as_json(found) if json_ else table.of_survey(found))
    sys.exit(0 if found.ready else NothingLearned.exit_code)


@cli.command()
@click.argument("version", required=False)
@as_json
@pass_context
def evaluate(context: Context, version: str | None, json_: bool) -> None:
    """Run the guardrails over every new candidate, or once over VERSION without reporting it to the log."""
    if version is None:
        from guardrails.daemon import run

        run(context.settings)
        return
    from guardrails.daemon import evaluate_once
    from guardrails.report import render

    report = evaluate_once(context.settings, version)
    click.echo(report.model_dump_json(indent=2) if json_ else render(report))
    sys.exit(0 if report.verdict == "pass" else 1)


@cli.command()
@pass_context
def control(context: Context) -> None:
    """Run the controller: approved candidates that every replica has proved become the champion."""
    from deploy.controller import run

    run(context.settings)


@cli.group()
def adapters() -> None:
    """Look at versions and decide about them."""


@adapters.command("list")
@as_json
@pass_context
def list_adapters(context: Context, json_: bool) -> None:
    """Every version, its state, and who serves what."""
    from deploy.view import as_json as to_json
    from deploy.view import table

    settings = context.settings
    state = context.rollout(context.log(settings))
    silence_s = settings.deploy.replica_silence_s
    view = json.dumps(to_json(state, silence_s=silence_s), indent=2) if json_ else table(state, silence_s=silence_s)
    click.echo(view)


@adapters.command()
@click.argument("version")
@as_json
@pass_context
def show(context: Context, version: str, json_: bool) -> None:
    """One version: what it learned from, how far it moved, what each gate saw, what was decided."""
    from deploy.view import detail
    from deploy.view import detail_json as to_json
    from thumbwheel.store import AdapterStore

    settings = context.settings
    state = context.rollout(context.log(settings))
    manifest = AdapterStore(settings.path(settings.store.path)).open(version).manifest
    click.echo(json.dumps(to_json(state, version, manifest), indent=2) if json_ else detail(state, version, manifest))


def _decision(function: Any) -> Any:
    """The options that every decision takes."""
    function = as_json(function)
    function = click.option("--actor", help="Who decides [the user who is logged in].")(function)
    return click.option("--reason", required=True, help="Why; kept in the audit trail.")(function)


def _decide(context: Context, verb: str, json_: bool, **arguments: Any) -> None:
    import getpass

    from deploy import decisions
    from thumbwheel.log.port import message_of

    arguments["actor"] = arguments["actor"] or getpass.getuser()
    events = context.log(context.settings)
    event = getattr(decisions, verb)(context.rollout(events), **arguments)
    events.append(event.topic, [message_of(event)])
    decisions.confirm(context.rollout(events), event)  # somebody else may have decided in between
    click.echo(event.model_dump_json(indent=2) if json_ else f"{event.type}: {event.version} {event.digest}")


@adapters.command()
@click.argument("version")
@click.option("--digest", help="The digest that you looked at; refused where the version has another.")
@click.option("--force", is_flag=True, help="Skip gates that failed or did not settle; stays in the audit trail.")
@_decision
@pass_context
def approve(context: Context, /, json_: bool, **arguments: Any) -> None:
    """Let VERSION go live."""
    _decide(context, "approve", json_, **arguments)


@adapters.command()
@click.argument("version")
@click.option("--digest", help="The digest that you looked at; refused where the version has another.")
@_decision
@pass_context
def reject(context: Context, /, json_: bool, **arguments: Any) -> None:
    """Decide that VERSION will not go live."""
    _decide(context, "reject", json_, **arguments)


@adapters.command()
@click.option("--to", "version", help="An earlier champion, or `base` [the previous champion].")
@_decision
@pass_context
def rollback(context: Context, /, json_: bool, **arguments: Any) -> None:
    """Put an earlier champion back."""
    _decide(context, "roll_back", json_, **arguments)


cli.add_command(log)


@cli.group()
def keys() -> None:
    """API keys of the gateway. Only their hashes are kept."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(["inference", "feedback", "evaluator", "operator"]),
    help="What it may do; may be given several times.",
)
@pass_context
def add_key(context: Context, name: str, scopes: tuple[str, ...]) -> None:
    """Make a key and print it, once."""
    from serve.auth import create

    settings = context.settings
    click.echo(create(settings.path(settings.gateway.keys), name, scopes))


@cli.command()
@as_json
@click.option("--settings", "in_force", is_flag=True, help="Print the settings that are in force, as JSON.")
@pass_context
def doctor(context: Context, json_: bool, in_force: bool) -> None:
    """Check what a start would need, and say in words what is wrong and how to mend it."""
    from thumbwheel.doctor import examine

    if in_force:
        click.echo(context.settings.model_dump_json(indent=2))
        return
    findings = examine(context.settings)
    if json_:
        click.echo(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{'ok     ' if finding.ok else 'PROBLEM'} {finding.what}: {finding.words}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@cli.command()
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".cache"), help="Where the model is kept.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the run's data in this directory.")
@click.option("--short", is_flag=True, help="A fraction of the traffic: shows that it runs, measures nothing.")
@click.option(
    "--log",
    "log_",
    type=click.Choice(["sqlite", "kafka"]),
    default="sqlite",
    help="Where the events go. kafka: one broker from $KAFKA_HOME, or the cluster that "
    "$THUMBWHEEL_LOG__KAFKA__BOOTSTRAP names.",
)
def demo(cache: Path, keep: Path | None, short: bool, log_: Literal["sqlite", "kafka"]) -> None:
    """The main job on real input, from chats and thumbs to a swap, with a table of before and after."""
    from learner.gguf import demo_model
    from thumbwheel.demo.play import play

    play(demo_model(cache / "models"), keep, short, log_)


def main() -> None:
    """Entry point: an error that explains itself is printed without a traceback."""
    try:
        cli()
    except ThumbwheelError as error:
        click.echo(f"thumbwheel: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
