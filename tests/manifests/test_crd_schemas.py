"""`PodDefault` and `AuthorizationPolicy` fit the published fields, and a typo in either is found."""

from copy import deepcopy

import jsonschema
import kubernetes_validate
import pytest

from tests.manifests.crd_schemas import SPECS, schema_of
from tests.manifests.tree import everything

OURS = [found for found in everything() if (found.document["apiVersion"], found.kind) in SPECS]
BY_NAME = {(found.kind, found.name): found.document for found in OURS}
POD_DEFAULT = ("PodDefault", "salun-pipelines")
POLICY = ("AuthorizationPolicy", "salun-exporter")
OF_THE_POD = ("volumes", "tolerations", "imagePullSecrets", "initContainers")
OF_A_CONTAINER = ("env", "envFrom", "volumeMounts")


def check(document):
    """Fields of the kind itself by our schema, what is Kubernetes' own in a pod that holds it."""
    jsonschema.validate(document, schema_of(document["apiVersion"], document["kind"]))
    if document["kind"] == "PodDefault":
        kubernetes_validate.validate(pod_of(document["spec"]), kubernetes_validate.latest_version(), strict=True)


def pod_of(spec):
    container = {"name": "notebook", "image": "notebook"} | {key: spec[key] for key in OF_A_CONTAINER if key in spec}
    pod = {key: spec[key] for key in OF_THE_POD if key in spec}
    pod |= {"containers": [container, *spec.get("sidecars", [])]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "notebook"}, "spec": pod}


def test_there_is_one_of_each_kind_and_more():
    assert {kind for kind, _ in BY_NAME} == {kind for _, kind in SPECS}
    assert {POD_DEFAULT, POLICY} <= BY_NAME.keys()


@pytest.mark.parametrize("found", OURS, ids=str)
def test_shipped_objects_fit(found):
    check(found.document)


def misspelt(place, wrong):
    """Rename the last word of a path."""

    def damage(document):
        *above, last = place
        node = document
        for step in above:
            node = node[step]
        node[wrong] = node.pop(last)

    return damage


def put(place, value):
    """Set the last word of a path."""

    def damage(document):
        *above, last = place
        node = document
        for step in above:
            node = node[step]
        node[last] = value

    return damage


RULE = ("spec", "rules", 0)
OPERATION = (*RULE, "to", 0, "operation")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (POD_DEFAULT, misspelt(("spec", "desc"), "description"), "description"),
        (POD_DEFAULT, misspelt(("spec", "envFrom"), "envfrom"), "envfrom"),
        (POD_DEFAULT, misspelt(("spec", "selector"), "selectors"), "selectors"),
        (POD_DEFAULT, misspelt(("spec", "selector", "matchLabels"), "matchLabel"), "matchLabel"),
        (POD_DEFAULT, put(("spec", "selector", "matchLabels"), {"salun-pipelines": True}), "True is not of type"),
        (POD_DEFAULT, put(("spec", "automountServiceAccountToken"), "false"), "'false' is not of type"),
        (POD_DEFAULT, misspelt(("spec", "volumeMounts", 0, "mountPath"), "path"), "path"),
        (POD_DEFAULT, misspelt(("spec", "volumes", 0, "projected"), "projection"), "projection"),
        (POD_DEFAULT, put(("apiVersion",), "kubeflow.org/v1beta1"), None),
        (POLICY, misspelt(("spec", "action"), "actions"), "actions"),
        (POLICY, put(("spec", "action"), "Allow"), "'Allow' is not one of"),
        (POLICY, misspelt((*OPERATION, "ports"), "port"), "port"),
        (POLICY, put((*OPERATION, "ports"), [9400]), "9400 is not of type"),
        (POLICY, misspelt((*RULE, "to", 0, "operation"), "operations"), "operations"),
        (POLICY, put((*RULE, "from"), [{"principals": ["cluster.local/ns/monitoring/sa/x"]}]), "principals"),
        (POLICY, put((*RULE, "when"), [{"key": "request.headers[x]"}]), "request.headers"),
        (POLICY, misspelt(("metadata", "labels"), "label"), "label"),
        (POLICY, put(("status",), {}), "status"),
    ],
)
def test_a_typo_is_found(name, damage, said):
    document = deepcopy(BY_NAME[name])
    damage(document)
    if said is None:
        assert schema_of(document["apiVersion"], document["kind"]) is None
        return
    with pytest.raises(
        (jsonschema.ValidationError, kubernetes_validate.ValidationError), match=said.replace("[", r"\[")
    ):
        check(document)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        (POLICY, (*RULE, "from"), [{"source": {"namespaces": ["monitoring"], "notPrincipals": ["*"]}}]),
        (POLICY, (*RULE, "when"), [{"key": "source.ip", "notValues": ["10.1.2.3"]}]),
        (POD_DEFAULT, ("spec", "tolerations"), [{"key": "gpu", "operator": "Exists"}]),
        (POD_DEFAULT, ("spec", "sidecars"), [{"name": "side", "image": "side"}]),
    ],
)
def test_other_published_fields_are_accepted(name, place, value):
    document = deepcopy(BY_NAME[name])
    put(place, value)(document)
    check(document)
