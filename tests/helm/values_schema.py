"""The part of the chart's `values.schema.json` that follows from the settings: `python -m tests.helm.values_schema`.

So a mistake in `settings` is refused by helm before anything is installed, by the very rules of the program.
"""

import json
from pathlib import Path
from typing import Any

from thumbwheel.settings import Settings

CHART = Path(__file__).parents[2] / "helm" / "thumbwheel"
FILE = CHART / "values.schema.json"

OWNED = {
    "Settings": {"data", "store"},
    "LogSettings": {"path", "outbox", "mirror", "forwarder_metrics_port"},
    "KafkaSettings": {"ca_file", "certificate_file", "key_file", "password_file", "member"},
    "EngineSettings": {"model", "url", "port"},
    "GatewaySettings": {"host", "port", "replica", "keys"},
    "LearnerSettings": {"metrics_port", "device"},
    "GuardrailSettings": {"metrics_port", "gateway", "key_file"},
    "DeploySettings": {"metrics_port"},
}
"""What the chart itself decides: refused in the values."""


def settings_schemas() -> dict[str, Any]:
    """The JSON Schemas of the settings and their sections, by name, without what the chart decides."""
    whole = Settings.model_json_schema()
    schemas = {**whole.pop("$defs"), "Settings": whole}
    for name, owned in OWNED.items():
        for field in owned:
            del schemas[name]["properties"][field]
    for schema in schemas.values():
        for field in schema["properties"].values():
            field.pop("default", None)  # the program has them; beside a $ref they have no meaning
    del schemas["StoreSettings"]
    return schemas


def updated() -> str:
    """The file as it should be."""
    schema = json.loads(FILE.read_text())
    schema["$defs"] = {"Size": schema["$defs"]["Size"], **settings_schemas()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(updated())
