"""The Deployments of the manifests as containers of podman: the laptop's store, the Pushgateway and the exporter.

`.ci/pods` makes their images and runs this. `podman kube play` gets the documents as they are, but for what it cannot
do. It knows no Services: here their names are aliases on the pods' network. It asks probes with a curl inside the
container, which the images lack: here the test asks them, from outside as a kubelet does. An emptyDir of the same name
is one and the same in all of its pods: here the pod's name goes before it. And it keeps no NetworkPolicies.
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import yaml

from lab.seaweedfs import free_ports
from salun_core.data.targets import ClassTarget
from salun_core.requests.ledger import Ledger
from salun_core.storage import open_store
from salun_core.tasks import register_model
from salun_core.times import utc_clock
from tests.manifests.tree import MANIFESTS, containers, default, everything, named, pod, read

PODMAN = shutil.which("podman")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(PODMAN is None, reason="podman is not installed"),
    pytest.mark.skipif(os.environ.get("SALUN_TEST_PODS") != "1", reason="needs images: `make image`, or .ci/pods"),
]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
NAMESPACE, EMPTY = "salun", "emptyDir"
PUSH = """
from salun_core.telemetry.push import StepMetrics
assert StepMetrics().push("unlearn", "digits"), "the gateway did not take it"
"""


def podman(*arguments, given=None):
    done = subprocess.run([PODMAN, *arguments], input=given, capture_output=True, text=True)
    assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def playable(found):
    """The document without what podman does in another way: probes, and the names of emptyDirs."""
    changed = replace(found, document=copy.deepcopy(found.document))
    if pod(found):
        own = {item["name"]: f"{found.name}-{item['name']}" for item in pod(found)["spec"]["volumes"] if EMPTY in item}
        mounts = [mount for item in containers(changed) for mount in item["volumeMounts"]]
        for item in (*pod(changed)["spec"]["volumes"], *mounts):
            item["name"] = own.get(item["name"], item["name"])
        for item in containers(changed):
            for probe in PROBES:
                item.pop(probe, None)
    return changed.document


class Pods:
    """Plays manifests on a network of their own, and reaches them by loopback as a port-forward does."""

    def __init__(self):
        self.network, self.played, self.ports = f"salun-{secrets.token_hex(4)}", [], {}

    def play(self, file, *options):
        """Start a file's Deployment under the name of its Service."""
        documents = read(MANIFESTS / file)
        (deployment,) = (found for found in documents if found.kind == "Deployment")
        (service,) = (found for found in documents if found.kind == "Service")
        (item,), (port,) = containers(deployment), service.document["spec"]["ports"]
        assert port["port"] == item["ports"][0]["containerPort"]  # an alias renames, it does not translate ports
        here = free_ports(None)["s3.port"]
        text = yaml.safe_dump_all([playable(found) for found in documents])
        alias = f"{self.network}:alias={service.name}.{NAMESPACE}"
        self.played.insert(0, text)
        publish = f"127.0.0.1:{here}:{port['port']}"
        podman("kube", "play", "--quiet", f"--network={alias}", f"--publish={publish}", *options, "-", given=text)
        self.ports[item["name"]] = f"http://127.0.0.1:{here}"
        return f"{deployment.name}-pod-{item['name']}"

    def end(self):
        for text in self.played:
            subprocess.run([PODMAN, "kube", "down", "--force", "-"], input=text, capture_output=True, text=True)
        for kind, name in (("network", self.network), ("volume", "salun-seaweedfs")):  # a mounted Secret is a volume
            subprocess.run([PODMAN, kind, "rm", "--force", name], capture_output=True)


@pytest.fixture
def pods():
    made = Pods()
    podman("network", "create", made.network)
    try:
        yield made
    finally:
        made.end()


def get(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return answer.status, answer.read().decode()


def becomes_ready(pods, name, container):
    """Ask a container's own probes until they all answer."""
    (item,) = (one for found in everything() if pod(found) for one in containers(found) if one["name"] == name)
    for path in {item[probe]["httpGet"]["path"] for probe in PROBES if probe in item}:
        wait(lambda path=path: get(pods.ports[name] + path)[0] == 200, container)


def wait(condition, container):
    for _ in range(600):
        try:
            if condition():
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert podman("inspect", "--format={{.State.Status}}", container) == "running", log_of(container)
        time.sleep(0.2)
    raise AssertionError(f"{container} does not come to it: {log_of(container)}")


def log_of(container):
    done = subprocess.run([PODMAN, "logs", "--tail=20", container], capture_output=True, text=True)
    return done.stdout + done.stderr


def is_confined(container, uid):
    """What the kernel says of its process, and of its root."""
    lines = podman("exec", container, "cat", "/proc/1/status").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    assert status["Uid"].split() == [uid] * 4
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    tried = subprocess.run([PODMAN, "exec", "--user=0", container, "touch", "/x"], capture_output=True, text=True)
    assert "Read-only file system" in tried.stderr


def test_the_deployments_start_and_serve(pods, digits_model, monkeypatch):
    """One story, for the exporter needs the store."""
    keys = named("Secret", "salun-s3", everything())["stringData"]
    secret = MANIFESTS / "dev" / "10-secret.yaml"
    pods.played.append(secret.read_text())
    podman("kube", "play", f"--network={pods.network}", str(secret))
    store = pods.play("dev/20-seaweedfs.yaml")
    becomes_ready(pods, "seaweedfs", store)
    gateway = pods.play("30-pushgateway.yaml")
    exporter = pods.play("40-exporter.yaml", f"--configmap={MANIFESTS / '10-config.yaml'}")
    becomes_ready(pods, "pushgateway", gateway)
    becomes_ready(pods, "exporter", exporter)
    is_confined(gateway, "65534")
    is_confined(exporter, "10001")
    file_a_request(pods, keys, digits_model, monkeypatch)
    wait(lambda: 'salun_requests{status="queued"} 1.0' in get(pods.ports["exporter"] + "/metrics")[1], exporter)
    assert 'salun_unlearning_debt_ratio{model_line="digits"} 0.0' in get(pods.ports["exporter"] + "/metrics")[1]
    podman("exec", exporter, "python3", "-c", PUSH)  # to the address in the ConfigMap
    pushed = get(pods.ports["pushgateway"] + "/metrics")[1]
    assert 'salun_last_success_timestamp_seconds{instance="",job="salun",model="digits"' in pushed


def file_a_request(pods, keys, digits_model, monkeypatch):
    for name, value in {**keys, "AWS_ENDPOINT_URL": pods.ports["seaweedfs"], "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    store = open_store(named("ConfigMap", "salun-config", default())["data"]["SALUN_STORE_URI"])
    register_model(store, "digits", digits_model, "train", 1)
    Ledger(store, utc_clock).submit("r-1", "digits", ClassTarget(class_id=3))
