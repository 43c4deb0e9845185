"""The contract finds what a plug-in does wrong, and each fault fails the check that is about it."""

import pytest

from salun_core import plugins
from salun_core.contract import check_plugin, chosen
from tests.support.plugins import package

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


def results(reference):
    plugins.allow(reference)
    (offer,) = chosen(reference)
    return check_plugin(offer)


@pytest.mark.parametrize(("code", "failing"), FAULTS.values(), ids=FAULTS)
def test_each_fault_fails_its_check(tmp_path, monkeypatch, code, failing):
    (tmp_path / "faulty.py").write_text(HEAD + code)
    monkeypatch.chdir(tmp_path)
    with package(tmp_path, monkeypatch):
        found = results("faulty:X")
    failed = {check.check[:16] for check in found if check.state == "fails"}
    assert failed == {name[:16] for name in failing}, found
    assert all(check.found for check in found if check.state == "fails")


@pytest.mark.parametrize("name", ["salun", "scrub", "lotus", "influence", "boundary_expanding", "retrain"])
def test_methods_that_ship_hold_the_contract(monkeypatch, name):
    monkeypatch.setenv("SALUN_PLUGINS", "")
    found = results(f"salun_core.methods.classification.{name}:METHOD")
    assert [check for check in found if check.state == "fails"] == []
    assert len(found) == 7


@pytest.mark.slow
def test_a_diffusion_method_holds_the_contract(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("SALUN_PLUGINS", "")
    found = results("salun_core.methods.diffusion.salun:METHOD")
    assert {check.check: check.state for check in found} == dict.fromkeys(
        [
            "loads",
            "equal seeds, equal weights",
            "inputs stay as they are",
            "frozen bits",
            "resume after a kill",
            "cost counted",
            "no test data",
        ],
        "holds",
    )
