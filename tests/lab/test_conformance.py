"""The contract finds what a plug-in does wrong, and each fault fails the check that is about it."""

import pytest

from lab.conformance import check_plugins
from tests.support.plugins import package, write_metadata

pytestmark = pytest.mark.usefixtures("forked_runs")  # the process that resumes a run

HEAD = """
import random, pathlib
import numpy as np
import torch
from torch import nn
from salun_core.data.images import ImageSet
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.optional_metrics import AddedAttack, AddedMetric
from salun_core.methods.classification.method import ClassifierMethod, classification_loss

state = []
def row(loss, **more):
    return ClassifierMethod(lambda context, generator: [context.phase("retain", context.retain, loss)], **more)
"""
FAULTS = {
    "random numbers of another generator": (
        "X = row(lambda m, i, l: classification_loss(m, i, l) * random.random())",
        {"equal seeds, equal weights", "resume after a kill"},
    ),
    "state that a resume loses": (
        "def begin(context):\n    state.clear()\n    return context\n"
        "def loss(m, i, l):\n    state.append(1)\n    return classification_loss(m, i, l) * len(state)\n"
        "X = row(loss, begin=begin)",
        {"resume after a kill"},
    ),
    "weights changed outside the mask": (
        "def loss(m, i, l):\n    with torch.no_grad():\n        next(m.parameters()).mul_(0.99)\n"
        "    return classification_loss(m, i, l)\nX = row(loss, needs_mask=True)",
        {"frozen bits"},
    ),
    "passes that it does not declare": (
        "X = row(lambda m, i, l: classification_loss(m, i, l) + 0 * m(i).sum())",
        {"cost counted"},
    ),
    "a file that it reads": (
        "X = row(lambda m, i, l: classification_loss(m, i, l) + 0 * len(open('test.npz', 'w+').read()))",
        {"no test data"},
    ),
    "a cache that another process fills otherwise": (
        "cache = {}\ndef loss(m, i, l):\n"
        "    first = cache.setdefault('weights', [p.detach().clone() for p in m.parameters()])\n"
        "    pull = sum(((p - q) ** 2).sum() for p, q in zip(m.parameters(), first))\n"
        "    return classification_loss(m, i, l) + pull\nX = row(loss)",
        {"resume after a kill"},
    ),
    "a value of the first epoch that another process lacks": (
        "def phases(context, generator):\n    context.epoch or state.append(1)\n    state[0]\n"
        "    return [context.phase('retain', context.retain)]\nX = ClassifierMethod(phases)",
        {"resume after a kill"},
    ),
    "a process that ends when it resumes": (
        "import os\ndef phases(context, generator):\n    context.epoch or state.append(1)\n    state or os._exit(3)\n"
        "    return [context.phase('retain', context.retain)]\nX = ClassifierMethod(phases)",
        {"resume after a kill"},
    ),
    "weights that stay as they are": (
        "X = row(lambda m, i, l: 0 * classification_loss(m, i, l))",
        {"changes weights"},
    ),
    "masked weights that stay as they are": (
        "X = row(lambda m, i, l: 0 * classification_loss(m, i, l), needs_mask=True)",
        {"changes weights"},
    ),
    "data that it reads at import": (
        "open('test.npz', 'w+').read()\nX = row(classification_loss)",
        {"no test data"},
    ),
    "data with the name of code": (
        "open('test.py', 'w+').read()\nX = row(classification_loss)",
        {"no test data"},
    ),
    "a connection at import": (
        "import contextlib, socket\nwith contextlib.suppress(OSError), socket.socket() as s:\n"
        "    s.connect(('127.0.0.1', 9))\nX = row(classification_loss)",
        {"no test data"},
    ),
    "a metric that reads data at import": (
        "open('test.npz', 'w+').read()\nX = AddedMetric(lambda s, seed: Metric.of(dict.fromkeys(s.models, 0.5), 3))",
        {"no other data"},
    ),
    "a network with weights from a file": (
        "def X(num_classes):\n    open('test.npz', 'w+').read()\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, num_classes))",
        {"no other data"},
    ),
    "images changed in place": (
        "def begin(context):\n    context.retain.images.add_(1)\n    return context\n"
        "X = row(classification_loss, begin=begin)",
        {"inputs stay as they are", "equal seeds, equal weights", "resume after a kill"},
    ),
    "an error": ("X = row(lambda m, i, l: m.nothing)", {"runs"}),
    "a metric of another form": ("X = AddedMetric(lambda subject, seed: 0.5)", {"runs"}),
    "a metric without a value": (
        "X = AddedMetric(lambda subject, seed: Metric.of({}, 3))",
        {"a value", "measures a retra"},
    ),
    "a metric with random numbers": (
        "X = AddedMetric(lambda s, seed: Metric.of({n: random.random() for n in s.models}, 3))",
        {"equal seeds, equal values"},
    ),
    "a metric that changes a model": (
        "def measure(s, seed):\n    [p.data.add_(1) for m in s.models.values() for p in m.parameters()]\n"
        "    return Metric.of(dict.fromkeys(s.models, 0.5), 3)\nX = AddedMetric(measure)",
        {"inputs stay as they are"},
    ),
    "an attack with too few scores": ("X = AddedAttack(lambda r, u, f: (np.zeros(2), np.zeros(3)))", {"runs"}),
    "an attack with NaN": (
        "X = AddedAttack(lambda r, u, f: (np.full(len(f), np.nan), np.zeros(len(u))))",
        {"runs"},
    ),
    "a network with other outputs": ("X = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7))", {"logits"}),
    "a network for no image": ("X = lambda: nn.Linear(3, 3)", {"logits"}),
    "a network that differs each time": (
        "def X(num_classes):\n    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, num_classes))\n"
        "    m[2].bias.data.fill_(random.random())\n    return m",
        {"equal seeds, equal weights"},
    ),
    "no network": ("X = lambda: 3", {"runs"}),
}


@pytest.mark.parametrize(("code", "failing"), FAULTS.values(), ids=FAULTS)
def test_each_fault_fails_its_check(tmp_path, monkeypatch, code, failing):
    (tmp_path / "faulty.py").write_text(HEAD + code)
    monkeypatch.chdir(tmp_path)
    with package(tmp_path, monkeypatch):
        found = check_plugins("faulty:X")
    failed = {check.check[:16] for check in found if check.state == "fails"}
    assert failed == {name[:16] for name in failing}, found
    assert all(check.found for check in found if check.state == "fails")


OWN = """
import importlib.metadata, linecache
from pathlib import Path
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.optional_metrics import AddedMetric
from own.more import VALUE

importlib.metadata.version("own")
linecache.getlines(__file__)
X = AddedMetric(lambda s, seed: Metric.of(dict.fromkeys(s.models, VALUE), 3))
"""


@pytest.mark.parametrize(
    ("data", "state"),
    [("packages/own/more.py", "holds"), ("packages/other/data.json", "holds"), ("packages/own/data.json", "fails"),
     ("data.json", "fails")],
)  # fmt: skip
def test_a_package_may_read_code_and_what_other_packages_bring(tmp_path, monkeypatch, data, state):
    """As `pip install --target` lays packages out."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    for folder in ("own", "other"):
        (tmp_path / "packages" / folder).mkdir(parents=True)
    write_metadata(tmp_path / "packages", "own", "1.0", {})
    (tmp_path / data).write_text("VALUE = 0.5")
    (tmp_path / "packages" / "own" / "more.py").write_text("VALUE = 0.5")
    (tmp_path / "packages" / "own" / "__init__.py").write_text(f"{OWN}Path({str(tmp_path / data)!r}).read_text()")
    with package(tmp_path / "packages", monkeypatch):
        (verdict,) = [check for check in check_plugins("own:X") if check.check == "no other data"]
    assert (verdict.state, data in verdict.found) == (state, state == "fails")
    assert (tmp_path / "packages" / "own" / "__pycache__").is_dir()  # importing wrote files


@pytest.mark.parametrize("name", ["salun", "scrub", "lotus", "influence", "boundary_expanding", "retrain"])
def test_methods_that_ship_hold_the_contract(monkeypatch, name):
    monkeypatch.setenv("SALUN_PLUGINS", "")
    found = check_plugins(f"salun_core.methods.classification.{name}:METHOD")
    assert [check for check in found if check.state == "fails"] == []
    assert len(found) == 8


@pytest.mark.slow
def test_a_diffusion_method_holds_the_contract(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("SALUN_PLUGINS", "")
    found = check_plugins("salun_core.methods.diffusion.salun:METHOD")
    assert {check.check: check.state for check in found} == dict.fromkeys(
        [
            "loads",
            "equal seeds, equal weights",
            "inputs stay as they are",
            "changes weights",
            "frozen bits",
            "resume after a kill",
            "cost counted",
            "no test data",
        ],
        "holds",
    )
