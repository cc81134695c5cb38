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

pytestmark = pytest.mark.slow

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

KAFKA: dict[str, Any] = {
    "settings": {"log": {"backend": "kafka", "kafka": {"bootstrap": "kafka:9092"}}},
    "storage": {"adaptersAccessMode": "ReadWriteMany"},
}
"""What it takes at least to have the log on Kafka."""
SECURE_KAFKA: dict[str, Any] = {
    "settings": {
        "log": {
            "backend": "kafka",
            "outbox_max_bytes": 5_000_000_000,
            "kafka": {
                "bootstrap": "k0.example:9093, k1.example:9093,k2.example:9094",
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "SCRAM-SHA-256",
                "username": "thumbwheel",
                "prefix": "staging.",
                "response_retention_days": 7.5,
            },
        },
    },
    "kafka": {"passwordSecret": "kafka-password", "tlsSecret": "kafka-tls", "clientCertificate": True},
    "gateway": {"replicas": 3},
    "storage": {
        "className": "block",
        "adaptersClassName": "files",
        "adaptersAccessMode": "ReadWriteMany",
        "outbox": "40Gi",
    },
    "networkPolicy": {
        "kafkaTo": [{"ipBlock": {"cidr": "10.1.0.0/16"}}],
        "gatewayFrom": [{"podSelector": {}}],
        "metricsFrom": [{"namespaceSelector": {}}],
    },
}


def kafka(more: dict[str, Any], **secrets: Any) -> dict[str, Any]:
    """`KAFKA` with more `[log.kafka]`, and secrets."""
    values: dict[str, Any] = json.loads(json.dumps(KAFKA))
    values["settings"]["log"]["kafka"] |= more
    return values | {"kafka": secrets}


VARIANTS = pytest.mark.parametrize(
    "values",
    [{}, EVERYTHING, BARE, KAFKA, SECURE_KAFKA],
    ids=["defaults", "everything", "bare", "kafka", "secure-kafka"],
)
ON_KAFKA = pytest.mark.parametrize("values", [KAFKA, SECURE_KAFKA], ids=["kafka", "secure-kafka"])


def hooks_of(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What helm runs before it applies the rest."""
    return [manifest for manifest in manifests if "helm.sh/hook" in manifest["metadata"].get("annotations", {})]


def toml_of(manifests: list[dict[str, Any]]) -> str:
    """The settings file that the programs get."""
    hooks = hooks_of(manifests)
    (config,) = [manifest for manifest in manifests if manifest["kind"] == "ConfigMap" and manifest not in hooks]
    return str(config["data"]["thumbwheel.toml"])


def settings_of(manifests: list[dict[str, Any]], folder: Path) -> Settings:
    """The settings as a program in the cluster would load them."""
    file = folder / "thumbwheel.toml"
    file.write_text(toml_of(manifests))
    return load(file)


def pods_of(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod specifications by component."""
    return {
        manifest["metadata"]["labels"]["app.kubernetes.io/component"]: manifest["spec"]["template"]["spec"]
        for manifest in manifests
        if manifest["kind"] in ("Deployment", "StatefulSet")
    }


def set_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The specification of the gateways' set."""
    (found,) = [manifest["spec"] for manifest in manifests if manifest["kind"] == "StatefulSet"]
    return dict(found)


def policies_of(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The network policies by component."""
    return {
        manifest["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: manifest["spec"]
        for manifest in manifests
        if manifest["kind"] == "NetworkPolicy"
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


def given_in(settings: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Of what was loaded, what was given."""
    return {
        name: given_in(value, loaded[name]) if isinstance(value, dict) and name != "environment" else loaded[name]
        for name, value in settings.items()
    }


@pytest.mark.parametrize("values", [EVERYTHING, SECURE_KAFKA], ids=["everything", "secure-kafka"])
def test_the_settings_arrive_as_they_were_given(values: dict[str, Any], tmp_path: Path) -> None:
    settings = settings_of(rendered(values=values), tmp_path)
    assert given_in(values["settings"], settings.model_dump()) == values["settings"]


def test_paths_and_addresses_are_the_charts(tmp_path: Path) -> None:
    settings = settings_of(rendered(values=EVERYTHING), tmp_path)
    assert str(settings.engine.model) == "/model/llama/8b"
    assert settings.learner.device == "cuda"
    assert settings.guardrails.gateway == "http://x-thumbwheel-gateway:8443"


@VARIANTS
def test_what_is_not_given_is_the_programs_default(values: dict[str, Any], tmp_path: Path) -> None:
    toml = tomllib.loads(toml_of(rendered(values=values)))
    settings = settings_of(rendered(values=values), tmp_path)
    for section, defaults in Settings().model_dump().items():
        if isinstance(defaults, dict):
            loaded = getattr(settings, section).model_dump()
            assert {name: loaded[name] for name in defaults if name not in toml.get(section, {})} == {
                name: value for name, value in defaults.items() if name not in toml.get(section, {})
            }


def log_files(settings: Settings, component: str) -> list[Path]:
    """What a component writes of the log on a volume."""
    if settings.log.backend == "sqlite":
        return [settings.path(settings.log.path)]
    return [settings.path(settings.log.outbox), settings.path(settings.log.mirror)] if component == "gateway" else []


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
        port, *others = container["ports"]
        assert port["containerPort"] == ports[component]
        if component == "gateway" and settings.log.backend == "kafka":
            assert others == [{"name": "forwarder", "containerPort": settings.log.forwarder_metrics_port}]
        else:
            assert not others
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in pod["volumes"]}
        if component == "gateway":
            volumes |= {claim["metadata"]["name"] for claim in set_of(manifests).get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in mounts.values()} == volumes
        for path in log_files(settings, component):
            assert not mounts[str(path.parent)].get("readOnly", False)
        store = str(settings.path(settings.store.path))
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
    jobs = [manifest["spec"]["template"]["spec"] for manifest in manifests if manifest["kind"] == "Job"]
    assert len({pod["serviceAccountName"] for pod in [*pods.values(), *jobs]}) == 4 + len(jobs)
    for pod in [*pods.values(), *jobs]:
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
    policies = policies_of(rendered())
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
    guardrails, given = policies_of(rendered(values=EVERYTHING))["gateway"]["ingress"][0]["from"]
    assert guardrails["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "guardrails"
    assert given == {"namespaceSelector": {}}


@pytest.mark.parametrize("values", [{}, KAFKA], ids=["defaults", "kafka"])
def test_a_pod_monitor_is_there_on_request_alone(values: dict[str, Any]) -> None:
    monitors = rendered(values=values | {"podMonitor": {"enabled": True, "labels": {"team": "a"}}})
    (monitor,) = [manifest for manifest in monitors if manifest["kind"] == "PodMonitor"]
    assert monitor["metadata"]["labels"]["team"] == "a"
    ports = {port["name"] for pod in pods_of(monitors).values() for port in pod["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == ports
    assert not [manifest for manifest in rendered() if manifest["kind"] == "PodMonitor"]


@ON_KAFKA
def test_with_kafka_no_volume_ties_the_programs_to_one_node(values: dict[str, Any]) -> None:
    manifests = rendered(values=values)
    claims = {manifest["metadata"]["name"]: manifest["spec"] for manifest in manifests if "Claim" in manifest["kind"]}
    assert claims.keys() == {"x-thumbwheel-adapters", "x-thumbwheel-learner"}
    assert claims["x-thumbwheel-adapters"]["accessModes"] == ["ReadWriteMany"]
    assert claims["x-thumbwheel-learner"]["accessModes"] == ["ReadWriteOnce"]
    for component, pod in pods_of(manifests).items():
        assert "affinity" not in pod
        used = {
            volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistent" in str(volume)
        }
        assert "x-thumbwheel-log" not in used
        assert ("x-thumbwheel-learner" in used) == (component == "learner")


def test_the_adapters_may_have_a_class_of_their_own() -> None:
    def classes(storage: dict[str, str]) -> dict[str, Any]:
        manifests = rendered(values=SECURE_KAFKA | {"storage": storage | {"adaptersAccessMode": "ReadWriteMany"}})
        (outbox,) = set_of(manifests)["volumeClaimTemplates"]
        found = {
            manifest["metadata"]["name"]: manifest["spec"] for manifest in manifests if "Claim" in manifest["kind"]
        }
        found["outbox"] = outbox["spec"]
        return {name.removeprefix("x-thumbwheel-"): spec.get("storageClassName") for name, spec in found.items()}

    assert classes({}) == {"adapters": None, "learner": None, "outbox": None}
    assert classes({"className": "a"}) == {"adapters": "a", "learner": "a", "outbox": "a"}
    assert classes({"className": "a", "adaptersClassName": "b"}) == {"adapters": "b", "learner": "a", "outbox": "a"}


@ON_KAFKA
def test_what_a_gateway_acknowledged_outlives_its_pod_and_a_scale_down(values: dict[str, Any]) -> None:
    gateways = set_of(rendered(values=values))
    (outbox,) = gateways["volumeClaimTemplates"]
    assert outbox["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert outbox["spec"]["resources"]["requests"]["storage"] == values["storage"].get("outbox", "20Gi")
    assert gateways["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_by_default_the_outbox_has_room_for_what_the_settings_allow(tmp_path: Path) -> None:
    manifests = rendered(values=KAFKA)
    (outbox,) = set_of(manifests)["volumeClaimTemplates"]
    room = int(outbox["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) * 2**30
    assert room >= 2 * settings_of(manifests, tmp_path).log.outbox_max_bytes


@ON_KAFKA
def test_a_member_keeps_its_name_and_is_never_there_twice(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = rendered(values=values)
    names = set()
    for component, pod in pods_of(manifests).items():
        (entry,) = [one for one in pod["containers"][0]["env"] if one["name"] == "THUMBWHEEL_LOG__KAFKA__MEMBER"]
        if component == "gateway":
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            continue
        names.add(entry["value"])
        monkeypatch.setenv(entry["name"], entry["value"])
        kafka = settings_of(manifests, tmp_path).log.kafka
        assert (kafka.member, kafka.bootstrap) == (entry["value"], values["settings"]["log"]["kafka"]["bootstrap"])
    assert len(names) == 3
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            assert (manifest["spec"]["replicas"], manifest["spec"]["strategy"]) == (1, {"type": "Recreate"})


def test_password_and_certificates_come_from_secrets_to_where_the_settings_look(tmp_path: Path) -> None:
    manifests = rendered(values=SECURE_KAFKA)
    kafka = settings_of(manifests, tmp_path).log.kafka
    wanted = {str(path) for path in (kafka.password_file, kafka.ca_file, kafka.certificate_file, kafka.key_file)}
    (job,) = [manifest["spec"]["template"]["spec"] for manifest in manifests if manifest["kind"] == "Job"]
    for pod in [*pods_of(manifests).values(), job]:
        secrets = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
        found = {}
        for mount in pod["containers"][0]["volumeMounts"]:
            for item in secrets.get(mount["name"], {}).get("items", []):
                assert mount["readOnly"]
                found[f"{mount['mountPath']}/{item['path']}"] = (secrets[mount["name"]]["secretName"], item["key"])
        assert found.keys() == wanted
        assert found[str(kafka.password_file)] == ("kafka-password", "password")
        assert found[str(kafka.ca_file)] == ("kafka-tls", "ca.crt")
        assert found[str(kafka.certificate_file)] == ("kafka-tls", "tls.crt")
        assert found[str(kafka.key_file)] == ("kafka-tls", "tls.key")


def test_a_certificate_of_ours_is_looked_for_on_request_alone(tmp_path: Path) -> None:
    manifests = rendered(values=kafka({"security_protocol": "SSL"}, tlsSecret="kafka-tls"))
    settings = settings_of(manifests, tmp_path).log.kafka
    assert str(settings.ca_file) == "/etc/thumbwheel-kafka-tls/ca.crt"
    assert settings.certificate_file is settings.key_file is settings.password_file is None
    assert "tls.key" not in str(pods_of(manifests))


@ON_KAFKA
def test_the_topics_are_made_before_anything_is_applied(values: dict[str, Any]) -> None:
    manifests = rendered(values=values)
    hooks = {manifest["kind"]: manifest for manifest in hooks_of(manifests)}
    assert hooks.keys() == {"ServiceAccount", "ConfigMap", "NetworkPolicy", "Job"}
    weights = {}
    for kind, hook in hooks.items():
        annotations = hook["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
        weights[kind] = int(annotations.get("helm.sh/hook-weight", 0))
    assert all(weights[kind] < weights["Job"] for kind in hooks.keys() - {"Job"})

    pod = hooks["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["log", "init"]
    assert container["image"] == pods_of(manifests)["controller"]["containers"][0]["image"]
    # It may lean on nothing that is applied after it.
    assert pod["serviceAccountName"] == hooks["ServiceAccount"]["metadata"]["name"]
    configs = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert configs == [hooks["ConfigMap"]["metadata"]["name"]]
    assert "persistentVolumeClaim" not in str(pod)
    assert hooks["ConfigMap"]["data"]["thumbwheel.toml"] == toml_of(manifests)


def test_the_job_ends_before_helm_gives_up_waiting() -> None:
    (job,) = [manifest for manifest in rendered(values=KAFKA) if manifest["kind"] == "Job"]
    helms_default_s = 300
    assert job["spec"]["activeDeadlineSeconds"] < helms_default_s


def test_with_kafka_every_program_may_call_the_brokers_and_nobody_else_new() -> None:
    policies = policies_of(rendered(values=SECURE_KAFKA))
    assert policies.keys() == {"gateway", "learner", "guardrails", "controller", "log-init"}
    for component, policy in policies.items():
        *to_gateway, brokers, dns = policy["egress"]
        assert brokers == {"ports": [{"port": 9093}, {"port": 9094}], "to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}]}
        assert {port["port"] for port in dns["ports"]} == {53}
        assert len(to_gateway) == (component == "guardrails")
    assert policies["log-init"]["ingress"] == []
    http, forwarder = policies["gateway"]["ingress"]
    assert http["ports"] == [{"port": "http"}]
    assert forwarder == {"ports": [{"port": "forwarder"}], "from": [{"namespaceSelector": {}}]}

    others = KAFKA | {"networkPolicy": {"kafkaPorts": [19092]}}
    for policy in policies_of(rendered(values=others)).values():
        assert {"ports": [{"port": 19092}]} in policy["egress"]


@VARIANTS
def test_the_sqlite_log_brings_nothing_of_kafka(values: dict[str, Any]) -> None:
    manifests = rendered(values=values)
    backend = values.get("settings", {}).get("log", {}).get("backend", "sqlite")
    assert ("kafka" in json.dumps(manifests).lower()) == (backend == "kafka")
    assert bool(hooks_of(manifests)) == (backend == "kafka")
    assert any("podAffinity" in str(pod) for pod in pods_of(manifests).values()) == (backend == "sqlite")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"settings": {"learner": {"bata": 1}}}, "settings.learner: Additional property bata is not allowed"),
        (
            {"settings": {"learner": {"rank": 7}}},
            "settings.learner.rank must be one of the following: 1, 8, 16, 32, 64",
        ),
        ({"settings": {"deploy": {"approval": "yes"}}}, 'one of the following: "manual", "auto"'),
        ({"settings": {"log": {"backend": "redis"}}}, 'one of the following: "sqlite", "kafka"'),
        ({"settings": {"log": {"backend": "kafka"}}}, "settings.log: kafka is required"),
        (KAFKA | {"storage": {}}, 'storage.adaptersAccessMode does not match: "ReadWriteMany"'),
        (kafka({"bootstrap": ""}), "settings.log.kafka.bootstrap: Does not match pattern"),
        (kafka({"bootstrap": "kafka"}), "settings.log.kafka.bootstrap: Does not match pattern"),
        (kafka({"security_protocol": "SASL_SSL"}), "settings.log.kafka: username is required"),
        (
            kafka({"security_protocol": "SASL_SSL", "username": "a"}),
            "kafka.passwordSecret: String length must be greater than or equal to 1",
        ),
        (
            kafka({"security_protocol": "SSL"}, passwordSecret="a"),
            'security_protocol must be one of the following: "SASL_PLAINTEXT", "SASL_SSL"',
        ),
        (kafka({}, tlsSecret="a"), "settings.log.kafka: security_protocol is required"),
        (
            kafka({"security_protocol": "SSL"}, clientCertificate=True),
            "kafka.tlsSecret: String length must be greater than or equal to 1",
        ),
        (kafka({"password_file": "/p"}), "settings.log.kafka: Additional property password_file is not allowed"),
        (kafka({"member": "m"}), "settings.log.kafka: Additional property member is not allowed"),
        ({"settings": {"log": {"outbox": "/o"}}}, "settings.log: Additional property outbox is not allowed"),
        ({"storage": {"adaptersAccessMode": "ReadOnlyMany"}}, '"ReadWriteOnce", "ReadWriteMany"'),
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
