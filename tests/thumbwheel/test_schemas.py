"""The published schemas, held against the code and against a validator that knows nothing of it."""

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from tests.thumbwheel.samples import EVERY, response, vote
from thumbwheel.cli import cli
from thumbwheel.events import Event, encode, schemas

PUBLISHED = Path(__file__).parents[2] / "docs" / "schemas"


def validator(type: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((PUBLISHED / f"{type}.json").read_text()))


def as_read(event: Event) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(encode(event))
    return value


def test_the_published_schemas_are_those_of_the_code(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["log", "schemas", "--write", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    published = {file.name: file.read_text() for file in PUBLISHED.iterdir()}
    assert published == written, "run `thumbwheel log schemas --write docs/schemas`"
    assert json.loads(CliRunner().invoke(cli, ["log", "schemas"]).output) == {
        name.removesuffix(".json"): json.loads(text) for name, text in written.items()
    }


@pytest.mark.parametrize("type", schemas())
def test_each_is_a_schema_with_an_id_and_a_title_of_its_own(type: str) -> None:
    schema = json.loads((PUBLISHED / f"{type}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:thumbwheel:event:{type}:1"
    assert schema["title"]


@pytest.mark.parametrize("event", EVERY, ids=lambda event: event.type)
def test_an_event_as_it_is_written_is_valid(event: Event) -> None:
    validator(event.type).validate(as_read(event))  # type: ignore[attr-defined]


def test_there_is_an_example_of_every_type() -> None:
    assert {event.type for event in EVERY} == set(schemas())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("event", "change"),
    [
        (vote(), {"rating": "sideways"}),
        (vote(), {"type": "response.generated"}),
        (vote(), {"user": None}),
        (response(), {"sampling": None}),
        (response(), {"choices": [{"index": "first"}]}),
        (response(), {"timings": {}}),
    ],
)
def test_what_is_no_such_event_is_not_valid(event: Event, change: dict[str, Any]) -> None:
    check = validator(event.type)  # type: ignore[attr-defined]
    assert check.is_valid(as_read(event))
    assert not check.is_valid(as_read(event) | change)


def test_a_field_of_a_newer_minor_version_is_no_mistake() -> None:
    assert validator("feedback.submitted").is_valid(as_read(vote()) | {"schema_version": "1.7", "colour": "red"})
