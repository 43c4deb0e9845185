"""A store with a trained model line and a forget set, and the compiled pipelines that run on them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.local import LocalRun, run_compiled
from pipelines.packages import COMPILED, load_documents
from salun_core.models import load_model
from salun_core.registry.lookup import read_head
from salun_core.storage.s3 import S3Store
from salun_core.tasks import register_model
from tests.support.compiled_once import compiled_once

__all__ = ["compiled_once"]

LINE = "digits"
SHIPPED = COMPILED / "salun-unlearning.yaml"


@dataclass(frozen=True)
class TrainedLine:
    """A fresh store whose line holds one version, and one tenth of its training data to forget."""

    store: S3Store
    parent: str
    forget_uri: str
    forgotten: tuple[str, ...]
    model: Path

    @property
    def head(self) -> str:
        return read_head(self.store, LINE)[0].version

    def arguments(self, **changes: object) -> dict[str, object]:
        quick = json.dumps({"epochs": 1, "learning_rate": 0.0005})
        common = {"model_line": LINE, "store_uri": self.store.uri, "forget_manifest_uri": self.forget_uri}
        return {**common, "method": "salun", "method_config": quick, **changes}

    def run(self, folder: Path, say=lambda line: None, *, forked: bool = True, **changes: object) -> LocalRun:
        return run_compiled(SHIPPED, self.arguments(**changes), folder, say, forked=forked)


@pytest.fixture
def trained(store, digits_model):
    split = load_model(digits_model).split
    parent = register_model(store, LINE, digits_model, "train", len(split.train))
    ids = sorted(split.train)[::10]
    store.put_new("forget.json", json.dumps({"kind": "samples", "ids": ids}).encode())
    return TrainedLine(store, parent, f"{store.uri}/forget.json", tuple(ids), digits_model)


def messages(run):
    """The log lines of the steps, which kfp.local indents."""
    lines = (line.strip() for line in run.files["run.log"].read_text(encoding="utf-8").splitlines())
    return [json.loads(line) for line in lines if line.startswith("{") and '"event": ' in line]


@functools.lru_cache
def _as_json(name):
    text = (COMPILED / f"{name}.yaml").read_text(encoding="utf-8")
    return json.dumps(load_documents(text))


def read(name):
    """Spec and platform of a pipeline that ships; the file is parsed once for all tests."""
    return json.loads(_as_json(name))


@pytest.fixture
def documents():
    """Spec and platform of the unlearning pipeline, to be damaged by a test."""
    return read("salun-unlearning")


@pytest.fixture
def sweep():
    """Spec and platform of the deletion sweep, to be damaged by a test."""
    return read("salun-deletion-sweep")


@pytest.fixture(params=["salun-unlearning", "salun-deletion-sweep", "salun-deletion-sweep-compact"])
def each(request):
    """Spec and platform of each pipeline that ships."""
    return read(request.param)
