"""The chart without a cluster: what it renders, and what it refuses."""

import json
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.helm.kube import helm, rendered
from tests.helm.values_schema import CHART, FILE, updated
from thumbwheel.settings import Settings, load

EVERYTHING: dict[str, Any] = {
    "image": {"prefix": "registry.example/thumbwheel-", "tag": "9"},
    "imagePullSecrets": [{"name": "registry"}],
    "settings": {
        "log": {"backend": "sqlite"},
        "engine": {"max_loras": 4, "max_lora_rank": 32, "arguments": ["--enforce-eager"], "environment": {"A": "b"}},
        "gateway": {"max_body_bytes": 123456789, "drain_s": 90.5, "model_name": "helper"},
        "learner": {"rank": 16, "batch": 32, "beta": 0.25, "learning_rate": 1e-5, "kl_budget": 5},
        "guardrails": {"suites": ["default"], "concurrency": 4},
        "deploy": {"approval": "auto", "replica_silence_s": 45},
    },
    "model": {"claim": "weights", "path": "llama/8b"},
    "gateway": {"replicas": 2, "gpus": 2, "service": {"type": "LoadBalancer", "port": 8443}},
    "learner": {"gpus": 1, "resources": {"limits": {"memory": "64Gi"}}},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "storage": {"className": "fast", "log": "1Ti"},
    "networkPolicy": {"gatewayFrom": [{"namespaceSelector": {}}], "metricsFrom": [{"namespaceSelector": {}}]},
}  # fmt: skip
BARE: dict[str, Any] = {"gateway": {"gpus": 0}, "networkPolicy": {"enabled": False}, "settings": {}}

VARIANTS = pytest.mark.parametrize("values", [{}, EVERYTHING, BARE], ids=["defaults", "everything", "bare"])


def settings_of(manifests: list[dict[str, Any]], folder: Path) -> Settings:
    """The settings as a program in the cluster would load them."""
    (config,) = [manifest for manifest in manifests if manifest["kind"] == "ConfigMap"]
    file = folder / "thumbwheel.toml"
    file.write_text(config["data"]["thumbwheel.toml"])
    return load(file)


def pods_of(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod specifications by component."""
    return {
        manifest["metadata"]["labels"]["app.kubernetes.io/component"]: manifest["spec"]["template"]["spec"]
        for manifest in manifests
        if manifest["kind"] in ("Deployment", "StatefulSet")
    }


def test_the_chart_lints_without_a_warning() -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@VARIANTS
def test_every_manifest_is_valid_kubernetes_and_of_a_known_kind(values: dict[str, Any]) -> None:
    manifests = rendered(values=values)
    assert len(manifests) >= 14
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.37", strict=True)  # raises on unknown kinds and fields


def test_the_validator_would_see_an_unknown_kind_and_an_unknown_field() -> None:
    (service,) = [manifest for manifest in rendered() if manifest["kind"] == "Service"]
    for wrong in (service | {"kind": "Servise"}, service | {"spec": service["spec"] | {"prots": []}}):
        with pytest.raises((kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)):
            kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_the_settings_arrive_as_they_were_given(tmp_path: Path) -> None:
    settings = settings_of(rendered(values=EVERYTHING), tmp_path)
    given = EVERYTHING["settings"]
    for section, fields in given.items():
        loaded = getattr(settings, section).model_dump()
        assert {name: loaded[name] for name in fields} == fields
    assert str(settings.engine.model) == "/model/llama/8b"
    assert settings.learner.device == "cuda"
    assert settings.guardrails.gateway == "http://x-thumbwheel-gateway:8443"


@VARIANTS
def test_what_is_not_given_is_the_programs_default(values: dict[str, Any], tmp_path: Path) -> None:
    toml = tomllib.loads(
        next(m for m in rendered(values=values) if m["kind"] == "ConfigMap")["data"]["thumbwheel.toml"]
    )
    settings = settings_of(rendered(values=values), tmp_path)
    for section, defaults in Settings().model_dump().items():
        if isinstance(defaults, dict):
            loaded = getattr(settings, section).model_dump()
            assert {name: loaded[name] for name in defaults if name not in toml.get(section, {})} == {
                name: value for name, value in defaults.items() if name not in toml.get(section, {})
            }


@VARIANTS
def test_ports_probes_and_files_are_where_the_settings_say(values: dict[str, Any], tmp_path: Path) -> None:
    manifests = rendered(values=values)
    settings, pods = settings_of(manifests, tmp_path), pods_of(manifests)
    ports = {
        "gateway": settings.gateway.port,
        "learner": settings.learner.metrics_port,
        "guardrails": settings.guardrails.metrics_port,
        "controller": settings.deploy.metrics_port,
    }
    assert pods.keys() == ports.keys()
    needed = {
        "gateway": [settings.engine.model, settings.gateway.keys],
        "learner": [settings.engine.model],
        "guardrails": [settings.guardrails.key_file],
        "controller": [],
    }
    for component, pod in pods.items():
        (container,) = pod["containers"]
        (port,) = container["ports"]
        assert port["containerPort"] == ports[component]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
        log, store = str(settings.path(settings.log.path).parent), str(settings.path(settings.store.path))
        assert not mounts[log].get("readOnly", False)
        assert mounts[store].get("readOnly", False) == (component != "learner")
        assert str(settings.data) in mounts
        for path in needed[component]:
            assert any(path.is_relative_to(mount) for mount in mounts), path


@VARIANTS
def test_a_gateway_has_time_to_drain_and_to_end_its_engine(values: dict[str, Any], tmp_path: Path) -> None:
    manifests = rendered(values=values)
    gateway = pods_of(manifests)["gateway"]
    leaves = gateway["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    engine_s = 10.0
    assert gateway["terminationGracePeriodSeconds"] > (
        leaves + settings_of(manifests, tmp_path).gateway.drain_s + engine_s
    )


@VARIANTS
def test_no_pod_may_more_than_it_has_to(values: dict[str, Any]) -> None:
    manifests = rendered(values=values)
    pods = pods_of(manifests)
    assert len({pod["serviceAccountName"] for pod in pods.values()}) == 4
    for pod in pods.values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] or container["resources"]["limits"]
    kinds = {manifest["kind"] for manifest in manifests}
    assert not kinds & {"Secret", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


def test_the_gpus_are_asked_for_by_the_name_that_was_given() -> None:
    pods = pods_of(rendered(values=EVERYTHING | {"gpuResource": "amd.com/gpu"}))
    assert pods["gateway"]["containers"][0]["resources"]["limits"] == {"amd.com/gpu": 2, "memory": "32Gi"}
    assert pods["learner"]["containers"][0]["resources"]["limits"] == {"amd.com/gpu": 1, "memory": "64Gi"}
    assert "nvidia.com/gpu" not in str(pods_of(rendered(values=BARE)))


def test_only_the_guardrails_may_call_out_and_only_the_gateway() -> None:
    policies = {
        manifest["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: manifest["spec"]
        for manifest in rendered()
        if manifest["kind"] == "NetworkPolicy"
    }
    assert {component: policy["ingress"][0]["ports"] for component, policy in policies.items()} == {
        "gateway": [{"port": "http"}],
        "learner": [{"port": "metrics"}],
        "guardrails": [{"port": "metrics"}],
        "controller": [{"port": "metrics"}],
    }
    to_gateway, dns = policies.pop("guardrails")["egress"]
    (peer,) = to_gateway["to"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert {port["port"] for port in dns["ports"]} == {53}
    assert all(policy["egress"] == [] for policy in policies.values())


def test_narrowing_who_calls_the_gateway_never_shuts_the_guardrails_out() -> None:
    (policy,) = [
        manifest["spec"]
        for manifest in rendered(values=EVERYTHING)
        if manifest["kind"] == "NetworkPolicy" and manifest["metadata"]["name"].endswith("-gateway")
    ]
    guardrails, given = policy["ingress"][0]["from"]
    assert guardrails["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "guardrails"
    assert given == {"namespaceSelector": {}}


def test_a_pod_monitor_is_there_on_request_alone() -> None:
    monitors = rendered(values={"podMonitor": {"enabled": True, "labels": {"team": "a"}}})
    (monitor,) = [manifest for manifest in monitors if manifest["kind"] == "PodMonitor"]
    assert monitor["metadata"]["labels"]["team"] == "a"
    ports = {pod["containers"][0]["ports"][0]["name"] for pod in pods_of(monitors).values()}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == ports
    assert not [manifest for manifest in rendered() if manifest["kind"] == "PodMonitor"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"settings": {"learner": {"bata": 1}}}, "settings.learner: Additional property bata is not allowed"),
        (
            {"settings": {"learner": {"rank": 7}}},
            "settings.learner.rank must be one of the following: 1, 8, 16, 32, 64",
        ),
        ({"settings": {"deploy": {"approval": "yes"}}}, 'one of the following: "manual", "auto"'),
        ({"settings": {"log": {"backend": "kafka"}}}, 'settings.log.backend does not match: "sqlite"'),
        ({"settings": {"gateway": {"port": 9}}}, "settings.gateway: Additional property port is not allowed"),
        ({"settings": {"engine": {"url": "http://x"}}}, "settings.engine: Additional property url is not allowed"),
        ({"gateway": {"replicas": -1}}, "gateway.replicas: Must be greater than or equal to 0"),
        ({"gateway": {"keysSecret": ""}}, "gateway.keysSecret: String length must be greater than or equal to 1"),
        ({"storage": {"log": "big"}}, "storage.log: Does not match pattern"),
        ({"model": {"path": "/model"}}, "model.path: Does not match pattern"),
        ({"replicas": 2}, "Additional property replicas is not allowed"),
    ],
)
def test_a_bad_value_is_refused_in_words(values: dict[str, Any], words: str) -> None:
    done = helm("template", "x", CHART, "-f", "-", input=json.dumps(values))
    assert done.returncode != 0
    assert words in done.stderr


def test_the_schema_of_the_values_follows_the_settings() -> None:
    assert FILE.read_text() == updated(), "the settings changed: run python -m tests.helm.values_schema"
