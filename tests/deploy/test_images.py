"""What the Dockerfile and compose.yaml promise, read from the files: no container engine is needed."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from thumbwheel.cli import cli
from thumbwheel.settings import Settings, load

ROOT = Path(__file__).parents[2]
PORTS = {
    "serve": Settings().gateway.port,
    "learner": Settings().learner.metrics_port,
    "guardrails": Settings().guardrails.metrics_port,
    "control": Settings().deploy.metrics_port,
}
PROGRAMS = pytest.mark.parametrize("program", PORTS)
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """The instructions of each stage, those that it inherits first."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "deploy/Dockerfile").read_text()))
    found: dict[str, list[Instruction]] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            parent, _, name = rest.split()
            found[name] = [*found.get(parent, [])] or [("FROM", parent)]
        else:
            found[name].append((word, rest))
    return found


def last(program: str, word: str) -> str:
    return [rest for instruction, rest in stages()[program] if instruction == word][-1]


@PROGRAMS
def test_each_program_has_an_image_that_starts_it_as_nobody_special(program: str) -> None:
    (command,) = json.loads(last(program, "CMD"))
    assert command in cli.commands
    assert json.loads(last(program, "ENTRYPOINT")) == ["thumbwheel"]
    assert stages()[program].index(("USER", "10001:10001")) > max(
        place for place, (word, _) in enumerate(stages()[program]) if word in ("RUN", "COPY")
    )


@PROGRAMS
def test_each_image_is_healthy_by_its_own_port(program: str) -> None:
    assert last(program, "EXPOSE") == str(PORTS[program])
    path = "healthz" if program == "serve" else "metrics"
    assert f"http://127.0.0.1:{PORTS[program]}/{path}" in last(program, "HEALTHCHECK")


@PROGRAMS
def test_each_image_stands_on_a_pinned_release(program: str) -> None:
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", last(program, "FROM"))


def test_the_extras_that_the_images_install_exist_and_only_two_carry_torch() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for program in PORTS:
        installs = " ".join(rest for word, rest in stages()[program] if word == "RUN")
        wanted = set(re.findall(r"--extra (\S+)", installs))
        assert wanted <= extras.keys()
        assert bool(wanted) == (program in ("serve", "learner"))


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    allowed = {
        line[1:] for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {path for word, rest in stages()["source"] if word == "COPY" for path in rest.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    return document


def test_compose_runs_every_image_locked_down() -> None:
    services = compose()["services"]
    assert services.keys() == PORTS.keys()
    for name, service in services.items():
        assert service["build"]["target"] == name
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_settings_in_compose_load_and_fit_the_containers(tmp_path: Path) -> None:
    document = compose()
    file = tmp_path / "thumbwheel.toml"
    file.write_text(document["configs"]["settings"]["content"])
    settings = load(file)
    for service in document["services"].values():
        targets = [volume["target"] for volume in service["volumes"]]
        assert str(settings.data) in targets
    assert str(settings.engine.model) in [volume["target"] for volume in document["services"]["serve"]["volumes"]]
    assert settings.guardrails.gateway == f"http://serve:{settings.gateway.port}"
    grace = float(document["services"]["serve"]["stop_grace_period"].removesuffix("s"))
    assert grace > settings.gateway.drain_s + 10


@pytest.mark.parametrize("path", ["deploy/Dockerfile", "deploy/compose.yaml"])
def test_no_secret_is_written_down(path: str) -> None:
    assert not re.search(
        r"tw-[A-Za-z0-9_-]{8}|(?i:key|token|password|secret)\w*\s*[=:]\s*[\"']?\w{8}", (ROOT / path).read_text()
    )
