"""The chart on a real control plane: what is scheduled where, what an upgrade changes, who may do what."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from tests.helm.kube import Cluster, until
from tests.helm.values_schema import CHART

pytestmark = pytest.mark.kube

NAME = "tw-thumbwheel"
COMPONENTS = {"gateway", "learner", "guardrails", "controller"}
VALUES: dict[str, Any] = {"storage": {"className": "test", "log": "1Gi", "adapters": "1Gi", "learner": "1Gi"}}
NAMESPACES = count(1)


ONE_NODE = dict.fromkeys((f"{NAME}-log", f"{NAME}-adapters", f"{NAME}-learner", "thumbwheel-model"), "ReadWriteOnce")
OUTBOXES = [f"outbox-{NAME}-gateway-{number}" for number in range(3)]
MANY_NODES = {
    f"{NAME}-adapters": "ReadWriteMany",
    f"{NAME}-learner": "ReadWriteOnce",
    "thumbwheel-model": "ReadWriteMany",
    **dict.fromkeys(OUTBOXES, "ReadWriteOnce"),
}
KAFKA: dict[str, Any] = {
    "settings": {
        "log": {
            "backend": "kafka",
            "kafka": {"bootstrap": "kafka:9093", "security_protocol": "SASL_SSL", "username": "thumbwheel"},
        }
    },
    "kafka": {"passwordSecret": "kafka-password", "tlsSecret": "kafka-tls"},
    "storage": VALUES["storage"] | {"adaptersAccessMode": "ReadWriteMany", "outbox": "1Gi"},
}


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for the SQLite log."""
    with prepared(cluster, ONE_NODE) as name:
        yield name


@pytest.fixture
def kafka_namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for the log on Kafka."""
    with prepared(cluster, MANY_NODES) as name:
        yield name


@contextmanager
def prepared(cluster: Cluster, claims: Mapping[str, str]) -> Iterator[str]:
    """A fresh namespace with what the chart expects to find: volumes for its claims, given with their access modes,
    and the claim of the base model."""
    name = f"test-{next(NAMESPACES)}"
    cluster.call("/api/v1/namespaces", {"metadata": {"name": name}})
    for claim, mode in claims.items():
        volume = {
            "metadata": {"name": f"{name}-{claim}"},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": [mode],
                "storageClassName": "test",
                "hostPath": {"path": f"/volumes/{name}/{claim}"},
                "claimRef": {"namespace": name, "name": claim},
            },
        }
        cluster.call("/api/v1/persistentvolumes", volume)
    model = {
        "metadata": {"name": "thumbwheel-model"},
        "spec": {
            "accessModes": [claims["thumbwheel-model"]],
            "storageClassName": "test",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    cluster.call(f"/api/v1/namespaces/{name}/persistentvolumeclaims", model)
    yield name
    cluster.call(f"/api/v1/namespaces/{name}", method="DELETE")
    until(lambda: not cluster.pods(name))  # or its GPUs are missing in the next test


def install(cluster: Cluster, namespace: str, values: dict[str, Any] | None = None, wait: bool = True) -> None:
    """Install, or upgrade to, these values."""
    waiting = ["--wait", "--timeout", "60s"] if wait else []
    command = ("upgrade", "--install", "tw", CHART, "-n", namespace, *waiting)
    cluster.helm(*command, values=VALUES | (values or {}))


def config(cluster: Cluster, namespace: str) -> str:
    return str(cluster.call(f"/api/v1/namespaces/{namespace}/configmaps/{NAME}")["data"]["thumbwheel.toml"])


def by_component(pods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in pods.values()}


def unscheduled(pod: dict[str, Any]) -> str:
    """Why the scheduler found no node for a pod; empty when it did, or has not looked yet."""
    conditions = pod["status"].get("conditions", [])
    return " ".join(seen.get("message", "") for seen in conditions if seen["type"] == "PodScheduled")


def test_it_installs_upgrades_rolls_back_and_uninstalls(cluster: Cluster, namespace: str) -> None:
    install(cluster, namespace)
    first = by_component(cluster.pods(namespace))
    assert first.keys() == COMPONENTS
    assert {pod["status"]["phase"] for pod in first.values()} == {"Running"}
    assert 'approval = "manual"' in config(cluster, namespace)

    install(cluster, namespace, {"settings": {"deploy": {"approval": "auto"}}})
    assert 'approval = "auto"' in config(cluster, namespace)
    second = by_component(cluster.pods(namespace))
    assert second.keys() == COMPONENTS
    for component, pod in second.items():  # each was started again with the new settings
        assert pod["metadata"]["uid"] != first[component]["metadata"]["uid"]

    cluster.helm("rollback", "tw", "1", "-n", namespace, "--wait", "--timeout", "60s")
    assert 'approval = "manual"' in config(cluster, namespace)

    cluster.helm("uninstall", "tw", "-n", namespace, "--wait", "--timeout", "60s")
    until(lambda: not cluster.pods(namespace))
    kept = {claim["metadata"]["name"] for claim in cluster.list("persistentvolumeclaims", namespace)}
    assert kept == {f"{NAME}-log", f"{NAME}-adapters", f"{NAME}-learner", "thumbwheel-model"}
    for kind in ("services", "serviceaccounts", "configmaps"):
        left = {item["metadata"]["name"] for item in cluster.list(kind, namespace)}
        assert not {name for name in left if name.startswith(NAME)}

    install(cluster, namespace)  # and it takes what it kept up again
    assert by_component(cluster.pods(namespace)).keys() == COMPONENTS


def test_all_pods_share_one_node_and_gateways_take_its_gpus_and_no_more(cluster: Cluster, namespace: str) -> None:
    install(cluster, namespace, {"gateway": {"replicas": 2}})
    pods = cluster.pods(namespace)
    assert len(pods) == 5
    assert len({pod["spec"]["nodeName"] for pod in pods.values()}) == 1
    assert {f"{NAME}-gateway-0", f"{NAME}-gateway-1"} < pods.keys()

    # The other node has two GPUs left, but not the log.
    install(cluster, namespace, {"gateway": {"replicas": 3}}, wait=False)

    third = f"{NAME}-gateway-2"
    until(lambda: "Insufficient nvidia.com/gpu" in unscheduled(cluster.pods(namespace).get(third, {"status": {}})))


def test_the_others_follow_the_gateway_and_do_not_choose_a_node_before_it(cluster: Cluster, namespace: str) -> None:
    install(cluster, namespace, {"gateway": {"replicas": 0}}, wait=False)
    until(lambda: len(cluster.pods(namespace)) == 3)
    until(
        lambda: all("didn't match pod affinity rules" in unscheduled(pod) for pod in cluster.pods(namespace).values())
    )
    install(cluster, namespace)
    pods = by_component(cluster.pods(namespace))
    assert {pod["spec"]["nodeName"] for pod in pods.values()} == {pods["gateway"]["spec"]["nodeName"]}


def test_no_program_has_a_right_on_the_kubernetes_api(cluster: Cluster, namespace: str) -> None:
    install(cluster, namespace)
    accounts = {pod["spec"]["serviceAccountName"] for pod in cluster.pods(namespace).values()}
    assert accounts == {f"{NAME}-{component}" for component in COMPONENTS}
    for account in accounts:
        for verb in ("get", "list", "create", "delete", "*"):
            for resource, group in (
                ("pods", ""),
                ("secrets", ""),
                ("configmaps", ""),
                ("deployments", "apps"),
                ("*", "*"),
            ):
                assert not cluster.may(account, namespace, verb, resource, group), (account, verb, resource)
    for pod in cluster.pods(namespace).values():  # nor a token to try with
        assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume]


def test_one_gateway_at_a_time_may_be_taken_away(cluster: Cluster, namespace: str) -> None:
    install(cluster, namespace, {"gateway": {"replicas": 2}})

    def status() -> dict[str, Any]:
        (budget,) = cluster.list("poddisruptionbudgets", namespace, "/apis/policy/v1")
        return dict(budget.get("status", {}))

    until(lambda: status().get("currentHealthy") == 2)
    assert (status()["expectedPods"], status()["disruptionsAllowed"]) == (2, 1)


def test_with_kafka_it_installs_upgrades_and_uninstalls(cluster: Cluster, kafka_namespace: str) -> None:
    namespace = kafka_namespace
    install(cluster, namespace, KAFKA)  # helm waits for the job that makes the topics
    until(lambda: by_component(cluster.pods(namespace)).keys() == COMPONENTS)
    first = by_component(cluster.pods(namespace))
    assert 'backend = "kafka"' in config(cluster, namespace)

    install(cluster, namespace, KAFKA | {"learner": {"gpus": 1}})
    until(lambda: by_component(cluster.pods(namespace)).keys() == COMPONENTS)
    second = by_component(cluster.pods(namespace))
    assert second["gateway"]["metadata"]["name"] == first["gateway"]["metadata"]["name"]  # and so the same member
    ran = [
        event["involvedObject"]["name"] for event in cluster.list("events", namespace) if event["reason"] == "Completed"
    ]
    assert ran == [f"{NAME}-log-init"] * 2

    cluster.helm("uninstall", "tw", "-n", namespace, "--wait", "--timeout", "60s")
    until(lambda: not cluster.pods(namespace))
    kept = {claim["metadata"]["name"] for claim in cluster.list("persistentvolumeclaims", namespace)}
    assert kept == {f"{NAME}-adapters", f"{NAME}-learner", OUTBOXES[0], "thumbwheel-model"}
    for kind, api in (
        ("services", "/api/v1"),
        ("serviceaccounts", "/api/v1"),
        ("configmaps", "/api/v1"),
        ("jobs", "/apis/batch/v1"),
        ("networkpolicies", "/apis/networking.k8s.io/v1"),
    ):
        left = {item["metadata"]["name"] for item in cluster.list(kind, namespace, api)}
        assert not {name for name in left if name.startswith(NAME)}, kind


def test_with_kafka_gateways_go_to_any_node_and_each_keeps_its_outbox(cluster: Cluster, kafka_namespace: str) -> None:
    namespace = kafka_namespace
    install(cluster, namespace, KAFKA | {"gateway": {"replicas": 3}})  # two GPUs a node: one has to go to the other
    gateways = {name: pod for name, pod in cluster.pods(namespace).items() if "-gateway-" in name}
    assert len(gateways) == 3
    assert len({pod["spec"]["nodeName"] for pod in gateways.values()}) == 2

    def outboxes() -> dict[str, str]:
        claims = {claim["metadata"]["name"]: claim for claim in cluster.list("persistentvolumeclaims", namespace)}
        return {name: claims[name]["metadata"]["uid"] for name in OUTBOXES if name in claims}

    before = outboxes()
    assert list(before) == OUTBOXES
    for name, pod in gateways.items():
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["spec"]["volumes"]]
        assert f"outbox-{name}" in claims

    install(cluster, namespace, KAFKA | {"gateway": {"replicas": 1}})
    until(lambda: len([name for name in cluster.pods(namespace) if "-gateway-" in name]) == 1)
    assert outboxes() == before

    install(cluster, namespace, KAFKA | {"gateway": {"replicas": 3}})  # what waited in them goes out now
    assert outboxes() == before


def test_with_kafka_the_others_do_not_wait_for_a_gateway(cluster: Cluster, kafka_namespace: str) -> None:
    install(cluster, kafka_namespace, KAFKA | {"gateway": {"replicas": 0}})
    until(lambda: by_component(cluster.pods(kafka_namespace)).keys() == COMPONENTS - {"gateway"})
    pods = by_component(cluster.pods(kafka_namespace))
    assert {pod["status"]["phase"] for pod in pods.values()} == {"Running"}
