"""The manifests name what the compiled pipeline asks for."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"


def executors():
    documents = list(yaml.safe_load_all((ROOT / "pipelines/compiled/salun-unlearning.yaml").read_text()))
    return documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def applied():
    return {path.name: yaml.safe_load(path.read_text()) for path in MANIFESTS.glob("*.yaml")}


def test_kustomization_lists_every_file_that_apply_reads():
    listed = yaml.safe_load((MANIFESTS / "Kustomization").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in MANIFESTS.glob("*.yaml"))


def test_no_secret_is_applied():
    assert "Secret" not in {document["kind"] for document in applied().values()}


def test_everything_lies_in_the_namespace():
    namespace = next(document for document in applied().values() if document["kind"] == "Namespace")
    for document in applied().values():
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == namespace["metadata"]["name"]


@pytest.mark.parametrize("name", ["fetch-model", "compute-mask", "unlearn", "evaluate", "gate-publish"])
def test_the_steps_find_their_config_and_their_keys(name):
    executor = executors()[f"exec-{name}"]
    config = applied()["10-config.yaml"]
    secret = yaml.safe_load((MANIFESTS / "secret.yaml.example").read_text())
    for field, keys, document in (
        ("configMapAsEnv", "configMapKey", config["data"] | {"kind": config["metadata"]["name"]}),
        ("secretAsEnv", "secretKey", secret["stringData"] | {"kind": secret["metadata"]["name"]}),
    ):
        (asked,) = executor[field]
        parameter = asked["configMapNameParameter" if field == "configMapAsEnv" else "secretNameParameter"]
        assert parameter["runtimeValue"]["constant"] == document["kind"]
        assert {pair[keys] for pair in asked["keyToEnv"]} <= document.keys()
