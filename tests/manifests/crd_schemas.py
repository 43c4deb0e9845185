"""The published fields of two custom kinds whose CRDs are not beside the checkout, as far as anybody may use them.

`PodDefault`: kubeflow.org/v1alpha1 of Kubeflow's admission webhook. `AuthorizationPolicy`: security.istio.io/v1. A
field that is not listed is one that an API server would drop or refuse. What lies inside a field of Kubernetes' own
kind, such as a volume, is left to Kubernetes' schemas: see test_crd_schemas.py.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "array", "items": TEXT, "minItems": 1}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(properties: Schema, *required: str, **more: Any) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


_EXPRESSION = closed(
    {
        "key": TEXT,
        "operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
        "values": {"type": "array", "items": {"type": "string"}},
    },
    "key",
    "operator",
)
_POD_DEFAULT = closed(
    {
        "selector": closed({"matchLabels": LABELS, "matchExpressions": {"type": "array", "items": _EXPRESSION}}),
        "desc": TEXT,
        "serviceAccountName": TEXT,
        "automountServiceAccountToken": {"type": "boolean"},
        "labels": LABELS,
        "annotations": LABELS,
        "command": TEXTS,
        "args": TEXTS,
        "env": OBJECTS,
        "envFrom": OBJECTS,
        "volumes": OBJECTS,
        "volumeMounts": OBJECTS,
        "tolerations": OBJECTS,
        "imagePullSecrets": OBJECTS,
        "sidecars": OBJECTS,
        "initContainers": OBJECTS,
    },
    "selector",
)


def _with_negations(*names: str) -> Schema:
    return closed(
        {name: TEXTS for stem in names for name in (stem, f"not{stem[0].upper()}{stem[1:]}")}, minProperties=1
    )


_SOURCE = _with_negations(
    "principals", "requestPrincipals", "namespaces", "ipBlocks", "remoteIpBlocks", "serviceAccounts"
)
_OPERATION = _with_negations("hosts", "ports", "methods", "paths")
_RULE = closed(
    {
        "from": {"type": "array", "minItems": 1, "items": closed({"source": _SOURCE}, "source")},
        "to": {"type": "array", "minItems": 1, "items": closed({"operation": _OPERATION}, "operation")},
        "when": {
            "type": "array",
            "minItems": 1,
            "items": closed({"key": TEXT, "values": TEXTS, "notValues": TEXTS}, "key", minProperties=2),
        },
    }
)
_AUTHORIZATION = closed(
    {
        "selector": closed({"matchLabels": LABELS}),
        "action": {"enum": ["ALLOW", "DENY", "AUDIT", "CUSTOM"]},
        "rules": {"type": "array", "items": _RULE},
    }
)
SPECS: dict[tuple[str, str], Schema] = {
    ("kubeflow.org/v1alpha1", "PodDefault"): _POD_DEFAULT,
    ("security.istio.io/v1", "AuthorizationPolicy"): _AUTHORIZATION,
}
"""The schema of `spec` by version and kind."""


def schema_of(version: str, kind: str) -> Schema | None:
    """The schema of a whole object, or None where it is none of these."""
    spec = SPECS.get((version, kind))
    metadata = closed({"name": TEXT, "namespace": TEXT, "labels": LABELS, "annotations": LABELS}, "name")
    fields = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    return closed(fields, *fields) if spec else None
