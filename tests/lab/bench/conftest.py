"""A suite of two methods on the digits, and a run of it that was killed after its first cell and resumed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from lab.bench.plan import SuiteRun
from lab.bench.suite import load_suite
from tests.support.made_once import made_once

SUITE = {
    "format": "salun.suite/v1",
    "name": "digits",
    "title": "Digits: forgetting a class",
    "about": "Small.",
    "kind": "classification",
    "methods": [
        {"name": "SalUn", "method": "salun", "mask": "saliency", "density": 0.3, "config": {"epochs": 1}},
        {"name": "SalUn, random mask", "method": "salun", "mask": "random", "density": 0.3, "config": {"epochs": 1}},
        {"name": "RL", "method": "random_label", "config": {"epochs": 1}},
    ],
    "sizes": {
        "cpu": {
            "data": {"source": "digits", "train_limit": 400, "test_limit": 100},
            "model": {"architecture": "resnet8", "training": {"epochs": 1}, "per_seed": False},
            "forget": {"kind": "class", "class_id": "3"},
            "seeds": [0, 1],
            "retrain": {},
            "references": 2,
            "threads": 1,
        }
    },
}


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "digits.yaml"
    path.write_text(json.dumps(SUITE))
    return path


@pytest.fixture(scope="session")
def plan(suite_file):
    return SuiteRun(
        load_suite(suite_file), "cpu", suite_file.parent, only=("SalUn", "RL")
    )  # without the control: cheaper


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of every file below a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.fixture(scope="session")
def resumed(plan, tmp_path_factory):
    """The folder of the run, what it held when it was killed, and what the second run came to.

    One worker makes it for all, and each has a copy: tests lock it, and write tables into it.
    """
    made = made_once(tmp_path_factory, "bench-resumed", lambda folder: _run_twice(plan, folder))
    out = shutil.copytree(made / "out", tmp_path_factory.mktemp("bench") / "out")
    return out, *pickle.loads((made / "outcome").read_bytes())  # noqa: S301 - written below


def _run_twice(plan: SuiteRun, folder: Path) -> None:
    import torch

    from lab.bench.runner import run_suite

    torch.set_num_threads(1)
    out = folder / "out"

    def die(_name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(plan, out, lambda text: None, on_cell=die)
    killed = files(out)
    (out / "work" / "rl-0").mkdir(parents=True)  # as SIGKILL leaves it
    (out / "work" / "rl-0" / "evidence.json").write_text("{")
    outcome = run_suite(plan, out, lambda text: None)
    (folder / "outcome").write_bytes(pickle.dumps((killed, outcome)))
