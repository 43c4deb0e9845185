"""A small trained model with all that the verbs make of it, and a runner that leaves no settings behind.

Stores are in memory, except in tests that ask for `real_store`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from salun_core.errors import SalunError
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test
from tests.support.made_once import made_once
from tests.support.memory_s3 import memory_s3, store

__all__ = ["memory_s3", "store"]


@pytest.fixture
def salun(tmp_path, monkeypatch):
    """Runs a verb in an empty folder of its own."""
    for name in ("SALUN_STORE_URI", "SALUN_CONFIG", "PUSHGATEWAY_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture
def form_of(salun, monkeypatch):
    """Returns the form that a call of `salun run` or `salun sweep` ends up with."""
    seen = []

    def stop(form, *args, **kwargs):
        seen.append(form)
        raise SalunError("stopped")

    monkeypatch.setattr("salun_core.steps.run.run_all", stop)
    monkeypatch.setattr("salun_core.steps.sweep.sweep_once", stop)

    def call(*words):
        result = salun(*words)
        assert result.stderr.splitlines()[-1:] == ["Error: stopped."], result.stderr
        return seen.pop()

    return call


@dataclass(frozen=True)
class World:
    """Files that one run of all verbs made, on scikit-learn's digits."""

    folder: Path

    def __getattr__(self, name):
        return self.folder / name.replace("_", ".")

    def listing(self):
        return {path.relative_to(self.folder): path.stat().st_mtime_ns for path in self.folder.rglob("*")}


def _made(*args):
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(made_once(tmp_path_factory, "world", _make_world))


def _make_world(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = World(folder)
    here.forget_json.write_text(json.dumps({"kind": "class", "class_id": 3}))
    _made("train", "--data", "digits", "--arch", "resnet8", "--epochs", 10, "--out", here.base)
    _made("mask", "--model", here.base, "--forget", here.forget_json, "--out", here.mask_st)
    common = ("--mask", here.mask_st, "--forget", here.forget_json)
    _made("unlearn", "--model", here.base, *common, "--out", here.after)
    paths = ("--before", here.base, "--after", here.after, "--out", here.evidence_json, "--report", here.report_html)
    _made("evaluate", *paths, *common)
    torch.set_num_threads(threads)


@pytest.fixture
def untouched(tmp_path, world):
    """Fails a test that leaves a file behind, or changes one that was there."""
    before = world.listing()
    yield
    assert sorted(path.name for path in tmp_path.rglob("*")) == []
    assert world.listing() == before
