"""The chart on a real control plane: what is scheduled where, what an upgrade changes, who may do what."""

from collections.abc import Iterator
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


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace with what the chart expects to find: volumes, and the claim of the base model."""
    name = f"test-{next(NAMESPACES)}"
    cluster.call("/api/v1/namespaces", {"metadata": {"name": name}})
    for claim in (f"{NAME}-log", f"{NAME}-adapters", f"{NAME}-learner", "thumbwheel-model"):
        volume = {
            "metadata": {"name": f"{name}-{claim}"},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": "test",
                "hostPath": {"path": f"/volumes/{name}/{claim}"},
                "claimRef": {"namespace": name, "name": claim},
            },
        }
        cluster.call("/api/v1/persistentvolumes", volume)
    model = {
        "metadata": {"name": "thumbwheel-model"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
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
