"""A chain of real artifacts, each made by the component before."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest
from kfp import dsl

from components.compute_mask import compute_mask
from components.evaluate import evaluate
from components.fetch_model import fetch_model
from components.unlearn import unlearn
from salun_core.models import load_model
from salun_core.storage import open_store
from salun_core.storage.s3 import S3Store
from salun_core.tasks import register_model

LINE = "digits"
QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005})


@dataclass(frozen=True)
class Chain:
    """What the first four components made on a fresh store."""

    store: S3Store
    forget_uri: str
    parent: str
    fetched: str
    before: dsl.Model
    mask: dsl.Artifact
    after: dsl.Model
    evidence: dsl.Artifact
    metrics: dsl.Metrics
    classification: dsl.ClassificationMetrics
    report: dsl.HTML


@pytest.fixture(scope="module")
def chain(s3_server, digits_model, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("chain")
    store = open_store(f"s3://salun/{secrets.token_hex(8)}")
    split = load_model(digits_model).split
    parent = register_model(store, LINE, digits_model, "train", len(split.train))
    forget_uri = f"{store.uri}/forget.json"
    store.put_new("forget.json", json.dumps({"kind": "samples", "ids": sorted(split.train)[::10]}).encode())
    uris = {name: str(folder / name) for name in ("before", "mask", "after", "evidence", "report")}
    before, after = dsl.Model(uri=uris["before"]), dsl.Model(uri=uris["after"])
    mask, evidence = dsl.Artifact(uri=uris["mask"]), dsl.Artifact(uri=uris["evidence"])
    measured = dsl.Metrics(), dsl.ClassificationMetrics(), dsl.HTML(uri=uris["report"])
    fetched = fetch_model.python_func(store.uri, LINE, forget_uri, before)
    compute_mask.python_func(before, forget_uri, 0.5, mask)
    unlearn.python_func(before, mask, forget_uri, after, method_config=QUICK)
    evaluate.python_func(before, after, mask, forget_uri, evidence, *measured)
    return Chain(store, forget_uri, parent, fetched, before, mask, after, evidence, *measured)
