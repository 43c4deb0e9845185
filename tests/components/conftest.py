"""A chain of real artifacts, each made by the component before; made once, and copied for each test that goes on."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.compute_mask import compute_mask
from components.evaluate import evaluate
from components.fetch_model import fetch_model
from components.unlearn import unlearn
from salun_core.models import load_model
from salun_core.pods.reference import Reference, read_reference
from salun_core.storage import open_store
from salun_core.storage.s3 import S3Store
from salun_core.tasks import register_model
from tests.support.api_server import account, kubernetes
from tests.support.made_once import made_once

__all__ = ["account", "kubernetes"]

LINE = "digits"
QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005})


@dataclass
class Run:
    """A run on a fresh store, and the artifacts of its steps so far."""

    store: S3Store
    parent: str
    forget_uri: str
    forgotten: list[str]
    folder: Path
    name: str = "run-1"
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> dict[str, str]:
        return {"store_uri": self.store.uri, "model_line": LINE, "run_id": self.name}

    def artifact(self, name: str, kind: Any = dsl.Artifact) -> Any:
        self.made[name] = kind(uri=str(self.folder / name))
        return self.made[name]

    def reference(self, name: str) -> Reference:
        return read_reference(self.made[name].path)

    def fetch(self, **changes: Any) -> Any:
        given = {"forget_manifest_uri": self.forget_uri, "method": "salun", "method_config": QUICK, **changes}
        return fetch_model.python_func(**self.address, **given, inputs=self.artifact("inputs"))

    def mask(self, **changes: Any) -> None:
        compute_mask.python_func(self.made["inputs"], **self.address, mask=self.artifact("mask"), **changes)

    def unlearn(self, **changes: Any) -> None:
        given = {"method": "salun", "method_config": QUICK, **changes}
        unlearn.python_func(self.made["mask"], **self.address, unlearned=self.artifact("after"), **given)

    def evaluate(self, **changes: Any) -> None:
        self.made |= {"metrics": dsl.Metrics(), "classification": dsl.ClassificationMetrics()}
        measured = {name: self.made[name] for name in ("metrics", "classification")}
        report, evidence = self.artifact("report", dsl.HTML), self.artifact("evidence")
        evaluate.python_func(
            self.made["after"], **self.address, evidence=evidence, report=report, **measured, **changes
        )


def new_run(model: Path, folder: Path) -> Run:
    """Return a run on a fresh store with one model line, and a tenth of its training data to forget."""
    store = open_store(f"s3://salun/{secrets.token_hex(8)}")
    split = load_model(model).split
    parent = register_model(store, LINE, model, "train", len(split.train))
    ids = sorted(split.train)[::10]
    store.put_new("forget.json", json.dumps({"kind": "samples", "ids": ids}).encode())
    return Run(store, parent, f"{store.uri}/forget.json", ids, folder)


@pytest.fixture
def run(s3_server, digits_model, tmp_path):
    return new_run(digits_model, tmp_path)


FACTS = "run.json"
KINDS = {"report": dsl.HTML, "metrics": dsl.Metrics, "classification": dsl.ClassificationMetrics}


def work(model: Path, folder: Path) -> None:
    """Let the first four components of a run work; leave its artifacts in a folder, with what copies need to know."""
    made = new_run(model, folder)
    assert made.fetch()[0] == 0
    made.mask()
    made.unlearn()
    made.evaluate()
    shown = {name: item.metadata for name, item in made.made.items()}
    facts = {"store": made.store.uri, "parent": made.parent, "forgotten": made.forgotten, "shown": shown}
    (folder / FACTS).write_text(json.dumps(facts))


def copy_of(made: Path, folder: Path) -> Run:
    """Return a copy of a run on a fresh store of its own.

    Its artifacts name the new store. Only the frozen forget set is still read from the old one, because the pinned
    inputs, whose digest is keyed, have its address.
    """
    facts = json.loads((made / FACTS).read_text())
    before, store = open_store(facts["store"]), open_store(f"s3://salun/{secrets.token_hex(8)}")
    for entry in before.list(""):
        store.put_new(entry.key, before.get(entry.key).data)
    run = Run(store, facts["parent"], f"{store.uri}/forget.json", facts["forgotten"], folder)
    for name, metadata in facts["shown"].items():
        if (made / name).is_file():
            (folder / name).write_text((made / name).read_text("utf-8").replace(before.uri, store.uri), "utf-8")
        run.artifact(name, KINDS.get(name, dsl.Artifact)).metadata |= {
            key: value.replace(before.uri, store.uri) if isinstance(value, str) else value
            for key, value in metadata.items()
        }
    return run


@pytest.fixture(scope="session")
def four_steps(s3_server, digits_model, tmp_path_factory):
    """The folder of a run whose first four components have worked, for all workers."""
    return made_once(tmp_path_factory, "four-steps", lambda folder: work(digits_model, folder))


@pytest.fixture
def worked(four_steps, tmp_path):
    """A run whose first four components have worked; it holds its line."""
    return copy_of(four_steps, tmp_path)


@pytest.fixture(scope="module")
def chain(four_steps, tmp_path_factory):
    """The same for tests that only look at it."""
    return copy_of(four_steps, tmp_path_factory.mktemp("chain"))
