"""The manifests fit together: names, namespaces, references, ports, rights, and what the compiled pipelines ask for."""

import json
import re
from functools import cache
from urllib.parse import urlsplit

import pytest
import yaml

from pipelines.packages import Package, load_package
from pipelines.parameters import read_parameters
from pipelines.resources import USER
from pipelines.volumes import CACHE_CLAIM, CACHE_FOLDER, CACHE_MOUNT
from tests.manifests.tree import (
    LOADER,
    MANIFESTS,
    ROOT,
    Found,
    containers,
    default,
    everything,
    named,
    native,
    pod,
    read,
    walk,
    workloads,
)

NAMESPACE = "salun"
# Made by their owner, and described in docs/tutorials/cluster.md, secret.yaml.example and kfp-launcher.yaml.example.
THE_USERS = {("Secret", "salun-s3"), ("Secret", "salun-signing")}
KUBEFLOWS = {("Secret", "mlpipeline-minio-artifact"), ("ConfigMap", "kfp-launcher")}
# Those that can be applied; openshift/ is a component, which changes what others build.
FOLDERS = sorted(path.parent for path in MANIFESTS.rglob("Kustomization") if "kind: Component" not in path.read_text())
PIPELINES = sorted((ROOT / "pipelines" / "compiled").glob("*.yaml"))
REFERENCES = {
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "configMap": "ConfigMap",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
    "secret": "Secret",
    "persistentVolumeClaim": "PersistentVolumeClaim",
}


@cache
def executors(path):
    return list(yaml.load_all(path.read_text(), LOADER))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def config():
    return named("ConfigMap", "salun-config", default())["data"]


def services():
    return {found.name: found.document["spec"] for found in everything() if found.kind == "Service"}


def policies():
    return [found.document["spec"] for found in everything() if found.kind == "NetworkPolicy"]


def selected(labels):
    """The workloads whose pods carry these labels."""
    return [found for found in workloads() if labels.items() <= pod(found)["metadata"]["labels"].items()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomization_lists_every_file_that_apply_reads(folder):
    listed = yaml.safe_load((folder / "Kustomization").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.yaml"))


def test_apply_finds_no_kustomization_with_an_ending():
    assert not [path for path in MANIFESTS.rglob("*") if path.stem.lower() == "kustomization" and path.suffix]


def test_the_default_apply_can_be_repeated_and_owns_its_objects():
    kinds = {found.kind for found in default()}
    assert not kinds & {"Secret", "Job", "Pod"}
    assert [found.name for found in default() if found.namespace is None] == [NAMESPACE]
    assert default()[0].kind == "Namespace"


def test_no_rights_or_objects_outside_the_namespace():
    assert not {found.kind for found in everything()} & {"ClusterRole", "ClusterRoleBinding", "Profile"}
    assert {found.namespace for found in everything() if found.kind != "Namespace"} == {NAMESPACE}


def test_names_are_unique():
    seen = [(found.kind, found.name) for found in everything()]
    assert len(seen) == len(set(seen))


def test_roles_name_what_they_allow():
    for rule in (rule for found in everything() if found.kind == "Role" for rule in found.document["rules"]):
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        if {"secrets", "configmaps"} & {*rule["resources"]}:
            assert rule["resourceNames"]
            assert rule["verbs"] == ["get"]


def granted(role):
    """The verbs of a role, by group and kind of object."""
    found = {}
    for rule in named("Role", role, everything())["rules"]:
        for kind in ((group, resource) for group in rule["apiGroups"] for resource in rule["resources"]):
            found.setdefault(kind, set()).update(rule["verbs"])
    return found


@pytest.mark.parametrize(
    ("role", "call", "kind"),
    [
        ("salun-submitter", r"\brun_service_([a-z]+)_runs?\b", "runs"),
        ("salun-submitter", r"\bexperiment_service_([a-z]+)_experiments?\b", "experiments"),
        ("salun-publisher", r"\brecurring_run_service_([a-z]+)_recurring_runs?\b", "jobs"),
    ],
)
def test_a_role_allows_every_call_of_our_client(role, call, kind):
    """A multi-user Kubeflow asks Kubernetes for the verb of the call."""
    client = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "pipelines").glob("*.py"))
    verbs = set(re.findall(call, client))
    assert verbs, "the client makes no such call"
    assert verbs <= granted(role)["pipelines.kubeflow.org", kind]


def test_a_step_may_look_at_workflows_and_change_none():
    assert granted("salun-runner")["argoproj.io", "workflows"] == {"get"}


def test_the_quota_has_room_for_four_runs_with_the_defaults():
    hard = named("ResourceQuota", "salun", default())["spec"]["hard"]
    form = {name: item["defaultValue"] for name, item in load_package("deletion-sweep").inputs.items()
            if name in ("cpu", "memory", "gpu_count")}  # fmt: skip
    assert int(hard["requests.nvidia.com/gpu"]) >= 4 * int(form["gpu_count"])
    for kind in ("requests", "limits"):  # on CPUs eight
        assert int(hard[f"{kind}.cpu"]) >= 8 * int(form["cpu"])
        assert int(hard[f"{kind}.memory"].removesuffix("Gi")) >= 8 * int(form["memory"].removesuffix("Gi"))


def test_only_the_runner_gets_a_token_by_itself():
    accounts = [found for found in everything() if found.kind == "ServiceAccount"]
    given = {found.name for found in accounts if found.document.get("automountServiceAccountToken") is not False}
    assert given == {"salun-runner"}
    assert all(pod(found)["spec"]["automountServiceAccountToken"] is False for found in workloads())


def test_everything_that_is_referenced_exists():
    there = {(found.kind, found.name) for found in everything((".yaml", ".example"))} | THE_USERS | KUBEFLOWS
    for found in everything():
        for node in walk(found.document.get("spec", {})):
            for field, kind in REFERENCES.items():
                if isinstance(node.get(field), dict):
                    asked = next(node[field][key] for key in ("name", "secretName", "claimName") if key in node[field])
                    assert (kind, asked) in there, f"{found} asks for {kind} {asked}"
            if "serviceAccountName" in node:
                assert ("ServiceAccount", node["serviceAccountName"]) in there, found
        if found.kind == "RoleBinding":
            assert ("Role", found.document["roleRef"]["name"]) in there
            for subject in found.document["subjects"]:
                assert (subject["kind"], subject["name"]) in there
                assert subject["namespace"] == NAMESPACE
        for rule in found.document.get("rules", []):
            kinds = {"secrets": "Secret", "configmaps": "ConfigMap"}
            for name in rule.get("resourceNames", []):
                assert (kinds[rule["resources"][0]], name) in there


def test_what_the_user_makes_is_documented():
    said = (MANIFESTS / "secret.yaml.example").read_text() + (ROOT / "docs" / "how-to" / "production.md").read_text()
    assert all(name in said for _, name in THE_USERS | KUBEFLOWS)


def test_the_copy_for_the_runs_of_a_standalone_kubeflow_holds_both_objects():
    files = (MANIFESTS / "10-config.yaml", MANIFESTS / "dev" / "10-secret.yaml")
    copied = "".join(path.read_text() for path in files).replace("namespace: salun", "namespace: kubeflow")
    found = [(item["kind"], item["metadata"]["namespace"]) for item in yaml.safe_load_all(copied) if item]
    assert found == [("ConfigMap", "kubeflow"), ("Secret", "kubeflow")]
    assert (
        "manifests/10-config.yaml manifests/dev/10-secret.yaml | kubectl apply"
        in (ROOT / "docs" / "tutorials" / "cluster.md").read_text()
    )


def test_a_service_and_its_policy_mean_the_same_pods_and_ports():
    assert services()
    for name, service in services().items():
        (workload,) = selected(service["selector"])
        ports = {port["name"]: port["containerPort"] for item in containers(workload) for port in item["ports"]}
        (policy,) = (one for one in policies() if one["podSelector"]["matchLabels"] == service["selector"])
        open_ports = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert open_ports == {ports[port["targetPort"]] for port in service["ports"]}, name
        assert open_ports == {port["port"] for port in service["ports"]}, name


def test_every_workload_has_a_policy_and_every_policy_a_workload():
    matched = [selected(policy["podSelector"]["matchLabels"]) for policy in policies()]
    assert sorted(found.name for (found,) in matched) == sorted(found.name for found in workloads())
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies())


def test_policies_allow_the_store_and_kubeflow():
    reached = {
        found.name: {
            port["port"] for policy in policies() if found in selected(policy["podSelector"]["matchLabels"])
            for rule in policy.get("egress", []) for port in rule["ports"]
        }
        for found in workloads()
    }  # fmt: skip
    assert {urlsplit(config()["AWS_ENDPOINT_URL"]).port, 53} <= reached["salun-exporter"]
    assert {urlsplit(config()["KFP_ENDPOINT"]).port, 53} <= reached["salun-sweep"]


def test_probes_and_monitors_name_ports_that_exist():
    for found in workloads():
        for item in containers(found):
            ports = {port["name"] for port in item.get("ports", [])}
            probes = [item[key] for key in ("startupProbe", "readinessProbe", "livenessProbe") if key in item]
            assert {probe["httpGet"]["port"] for probe in probes} <= ports
            assert not ports or {"readinessProbe", "livenessProbe"} <= item.keys(), f"{found} is served unprobed"
    for found in everything():
        if found.kind == "ServiceMonitor":
            wanted = found.document["spec"]["selector"]["matchLabels"].items()
            (service,) = (item for item in everything() if item.kind == "Service" and wanted <= item.labels.items())
            asked = {endpoint["port"] for endpoint in found.document["spec"]["endpoints"]}
            assert asked <= {port["name"] for port in service.document["spec"]["ports"]}
        if found.kind == "PodMonitor":
            (workload,) = selected(found.document["spec"]["selector"]["matchLabels"])
            asked = {endpoint["port"] for endpoint in found.document["spec"]["podMetricsEndpoints"]}
            assert asked <= {port["name"] for item in containers(workload) for port in item["ports"]}


def test_the_pushgateway_keeps_the_labels_that_were_pushed():
    monitor = named("PodMonitor", "salun-pushgateway", everything())
    assert [endpoint["honorLabels"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == [True]


def test_the_addresses_of_the_config_are_services_of_the_tree():
    for variable in ("AWS_ENDPOINT_URL", "PUSHGATEWAY_URL"):
        name, namespace = urlsplit(config()[variable]).hostname.split(".")
        assert urlsplit(config()[variable]).port in {port["port"] for port in services()[name]["ports"]}
        assert namespace == NAMESPACE


def test_the_dev_store_accepts_the_keys_of_the_steps_and_creates_both_buckets():
    keys = named("Secret", "salun-s3", everything())["stringData"]
    (identity,) = json.loads(named("Secret", "salun-seaweedfs", everything())["stringData"]["s3.json"])["identities"]
    assert identity["credentials"] == [
        {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}
    ]
    args = containers(selected(services()["salun-s3"]["selector"])[0])[0]["args"]
    launcher = named("ConfigMap", "kfp-launcher", everything((".example",)))["data"]
    wanted = [urlsplit(config()["SALUN_STORE_URI"]).netloc, urlsplit(launcher["defaultPipelineRoot"]).netloc]
    assert f"-bucket={','.join(wanted)}" in args


def test_the_secret_template_has_the_keys_of_the_real_one():
    template = yaml.safe_load((MANIFESTS / "secret.yaml.example").read_text())
    real = named("Secret", "salun-s3", everything())
    assert template["stringData"].keys() == real["stringData"].keys()
    assert set(template["stringData"].values()) == {""}


def test_the_quota_has_room_for_the_default_limits():
    quota = named("ResourceQuota", "salun", default())["spec"]["hard"]
    (limit,) = named("LimitRange", "salun", default())["spec"]["limits"]
    counted = {name.split(".", 1)[1] for name in quota if name.startswith(("requests.", "limits."))}
    assert counted == {"cpu", "memory", "nvidia.com/gpu"}
    assert limit["default"].keys() == limit["defaultRequest"].keys() == {"cpu", "memory"}
    assert "max" not in limit  # of accelerators it would become every container's default


def test_the_sweeps_schedule_starts_one_at_a_time_and_can_be_suspended_for_good():
    spec = named("CronJob", "salun-sweep", default())["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 0
    assert spec["timeZone"]
    assert "suspend" not in spec
    template = spec["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = template["containers"]
    tokens = [source["serviceAccountToken"] for volume in template["volumes"] if "projected" in volume
              for source in volume["projected"]["sources"]]  # fmt: skip
    assert [token["audience"] for token in tokens] == ["pipelines.kubeflow.org"]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    (mount,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "token")
    assert environment["KF_PIPELINES_SA_TOKEN_PATH"] == f"{mount}/{tokens[0]['path']}"


def test_the_sweep_is_a_valid_command():
    (container,) = pod(Found(MANIFESTS, named("CronJob", "salun-sweep", default())))["spec"]["containers"]
    words = [re.sub(r"\$\((\w+)\)", lambda found: config()[found[1]], word) for word in container["args"]]
    pipeline = next(word.partition("=")[2] for word in words if word.startswith("--pipeline="))
    form = [word for word in words if word.split("=")[0] not in ("--pipeline", "--no-wait")]
    given = read_parameters(load_package(pipeline), form, config())
    assert given["model_line"] == config()["SALUN_SWEEP_LINE"]
    assert given["store_uri"] == config()["SALUN_STORE_URI"]
    ours = {item["name"] for item in container["env"]} | config().keys()
    assert {"KFP_ENDPOINT", "KFP_NAMESPACE", "KF_PIPELINES_SA_TOKEN_PATH"} <= ours
    assert container["command"] == ["python", "-m", "pipelines", "submit"]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_native_objects_hold_the_compiled_pipeline_and_its_digest(path):
    pipeline, version = (found.document for found in native() if found.path.name == path.name)
    spec, platform = (document.document for document in read(path))
    for one in (spec := dict(spec), held := dict(version["spec"]["pipelineSpec"])):
        one.pop("sdkVersion")
    assert (held, version["spec"]["platformSpec"]) == (spec, platform)
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == spec["pipelineInfo"]["name"]
    assert version["metadata"]["name"] == Package(spec, platform).version


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_the_steps_find_their_config_and_their_keys(path):
    secret = yaml.safe_load((MANIFESTS / "secret.yaml.example").read_text())
    for executor in executors(path).values():
        (asked,) = executor["configMapAsEnv"]
        assert asked["configMapNameParameter"]["runtimeValue"]["constant"] == "salun-config"
        assert {pair["configMapKey"] for pair in asked["keyToEnv"]} <= config().keys()
        (asked,) = executor["secretAsEnv"]
        assert asked["secretNameParameter"]["runtimeValue"]["constant"] == secret["metadata"]["name"]
        assert {pair["secretKey"] for pair in asked["keyToEnv"]} <= secret["stringData"].keys()
        mounted = {one["secretNameParameter"]["runtimeValue"]["constant"] for one in executor.get("secretAsVolume", [])}
        assert {("Secret", name) for name in mounted} <= THE_USERS
        labels = executor["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "salun"  # the Pushgateway's policy lets these in


def test_the_job_of_the_cache_creates_the_folder_that_the_steps_use():
    job = Found(MANIFESTS, named("Job", "salun-data-cache", everything()))
    (container,), (mount,) = containers(job), containers(job)[0]["volumeMounts"]
    assert (mount["mountPath"], container["command"][-1]) == (CACHE_MOUNT, CACHE_FOLDER)
    context = pod(job)["spec"]["securityContext"]
    assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    claim = named("PersistentVolumeClaim", "salun-data-cache", everything())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # the steps of a run may run on several nodes
    assert config()[CACHE_CLAIM] == ""
