"""What the Dockerfile and compose.yaml promise, read from the files: no container engine is needed."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kafka import kafka, needs_release
from tests.launch import wait_for
from thumbwheel.cli import cli
from thumbwheel.cli_log import log
from thumbwheel.demo.broker import Broker, free_ports
from thumbwheel.log.kafka import topics
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
    forwarder = Settings().log.forwarder_metrics_port
    assert last(program, "EXPOSE") == (f"{PORTS[program]} {forwarder}" if program == "serve" else str(PORTS[program]))
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


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / name).read_text())
    return document


KAFKA = "compose.kafka.yaml"


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


def test_the_file_for_kafka_adds_a_pinned_broker_that_nobody_outside_reaches() -> None:
    services = compose(KAFKA)["services"]
    assert services.keys() == PORTS.keys() | {"kafka", "log-init"}
    assert re.fullmatch(r"apache/kafka:\d+\.\d+\.\d+", services["kafka"]["image"])
    for service in services.values():
        assert "ports" not in service
    for name in ("kafka", "log-init"):
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
    (volume,) = services["kafka"]["volumes"]
    assert volume["target"] == services["kafka"]["environment"]["KAFKA_LOG_DIRS"]
    assert volume["source"] in compose(KAFKA)["volumes"]


def test_the_file_for_kafka_changes_nothing_of_the_programs_but_their_log() -> None:
    for name in PORTS:
        assert compose(KAFKA)["services"][name].keys() <= {"environment", "depends_on"}
    init, control = compose(KAFKA)["services"]["log-init"], compose()["services"]["control"]
    for what in ("image", "build", "init", "read_only", "cap_drop", "security_opt", "tmpfs", "configs"):
        assert init[what] == control[what]


def test_the_programs_find_the_broker_and_are_members_by_names_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = compose(KAFKA)["services"]
    broker = document["kafka"]
    file = tmp_path / "thumbwheel.toml"
    file.write_text(compose()["configs"]["settings"]["content"])
    members = set()
    for name in PORTS:
        with monkeypatch.context() as environment:
            for variable, value in document[name]["environment"].items():
                environment.setenv(variable, value)
            settings = load(file)
        kafka = settings.log.kafka
        assert settings.log.backend == "kafka"
        assert f"PLAINTEXT://{kafka.bootstrap}" == broker["environment"]["KAFKA_ADVERTISED_LISTENERS"]
        assert kafka.bootstrap == f"{broker['hostname']}:9092"
        assert kafka.min_insync_replicas <= kafka.replication == 1  # there is one broker
        members.add(kafka.member)
    assert members == PORTS.keys()


def test_the_topics_come_after_the_broker_and_no_chat_waits_for_either() -> None:
    services = compose(KAFKA)["services"]
    assert services["log-init"]["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert services["log-init"]["restart"] == "no"
    assert services["log-init"]["command"] == ["log", "init"]
    assert "init" in log.commands
    assert "depends_on" not in services["serve"]
    for name in PORTS.keys() - {"serve"}:
        assert services[name]["depends_on"]["log-init"] == {"condition": "service_completed_successfully"}


@pytest.mark.kafka
def test_a_broker_with_what_is_in_the_file_starts_and_takes_our_topics(tmp_path: Path) -> None:
    needs_release()
    given = compose(KAFKA)["services"]["kafka"]["environment"]
    # As the image does it: KAFKA_NODE_ID becomes node.id.
    properties = {name.removeprefix("KAFKA_").lower().replace("_", "."): value for name, value in given.items()}
    home, (plain, control) = Path(os.environ["KAFKA_HOME"]), free_ports(2)
    for name, value in properties.items():
        here = value.replace("kafka:9092", f"127.0.0.1:{plain}").replace("kafka:9093", f"127.0.0.1:{control}")
        properties[name] = here.replace("://:9092", f"://127.0.0.1:{plain}").replace(
            "://:9093", f"://127.0.0.1:{control}"
        )
    properties["log.dirs"] = str(tmp_path / "data")
    text = "".join(f"{name}={value}\n" for name, value in properties.items())
    broker = Broker(home, tmp_path, 1, plain, text, "-Xmx512m -Xms128m")
    broker.format("5L6g3nShT-eMCtK--X86sw")
    broker.start()
    try:
        wait_for(broker.ready, 60, "the broker is up")
        topics.make(Settings(log=kafka(broker.address)))
    finally:
        broker.stop()


@pytest.mark.parametrize("path", ["deploy/Dockerfile", "deploy/compose.yaml", "deploy/compose.kafka.yaml"])
def test_no_secret_is_written_down(path: str) -> None:
    assert not re.search(
        r"tw-[A-Za-z0-9_-]{8}|(?i:key|token|password|secret)\w*\s*[=:]\s*[\"']?\w{8}", (ROOT / path).read_text()
    )
