"""Every object against its schema: Kubernetes' own strictly, custom kinds against the CRDs where these lie."""

from copy import deepcopy
from functools import cache

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.manifests.crd_schemas import SPECS
from tests.manifests.tree import CRDS, LOADER, everything

ALL = everything((".yaml", ".example"))
VERSIONS = ("1.29", kubernetes_validate.latest_version())


def built_in(found):
    """Whether Kubernetes itself has the kind."""
    group = found.document["apiVersion"].rpartition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


@cache
def definitions():
    found = (document for path in sorted(CRDS.glob("*.yaml")) for document in yaml.load_all(path.read_text(), LOADER))
    return {document["spec"]["names"]["kind"]: document["spec"] for document in found if document}


def strict(schema):
    """The schema as an API server reads it: a field that it does not name is an error, not silently dropped."""
    if not isinstance(schema, dict):
        return schema
    if "pattern" in schema:  # Go takes a flag anywhere, Python at the head alone
        schema = {**schema, "pattern": schema["pattern"].replace("^(?i)", "(?i)^")}
    schema = {
        key: strict(value) if key in ("items", "additionalProperties") else value for key, value in schema.items()
    }
    if "properties" in schema:
        schema["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_own_kinds(version):
    ours = [found for found in ALL if built_in(found)]
    assert len(ours) > 20
    for found in ours:
        kubernetes_validate.validate(found.document, version, strict=True)


@pytest.mark.parametrize("found", [found for found in ALL if not built_in(found)], ids=str)
def test_custom_kinds(found):
    if (found.document["apiVersion"], found.kind) in SPECS:
        return  # tests/manifests/test_crd_schemas.py checks them
    if not CRDS.is_dir():
        pytest.skip(f"the CRDs are not at hand: {CRDS} is missing")
    if found.kind not in definitions():
        pytest.skip(f"no CRD of {found.kind} is at hand")
    definition = definitions()[found.kind]
    group, version = found.document["apiVersion"].split("/")
    assert group == definition["group"]
    (served,) = (item for item in definition["versions"] if item["name"] == version and item["served"])
    schema = deepcopy(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(found.document, strict(schema))
