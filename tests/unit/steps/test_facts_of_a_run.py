"""What a run says of itself: the passes that it made, and the share of weights that it moved."""

import json

import pytest
import torch

from salun_core.config import load
from salun_core.data import DataSpec
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import Forgotten, Integrity, Measured, Metric, RunFacts
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.report import wording
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks.classification.training import train_model

SETTINGS = {"epochs": 1, "batch_size": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model of the digits, and some digits to forget."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("facts")
    config = UnlearnConfig(epochs=1, learning_rate=0.1, batch_norm="update", batch_size=16, device="cpu")
    train_model(DataSpec(source="digits", train_limit=120, test_limit=60), "resnet8", config, folder / "base")
    ids = load_model(folder / "base").split.ids("train")[:10]
    (folder / "forget.json").write_text(json.dumps({"kind": "samples", "ids": ids}))
    return folder


def context(folder):
    return RunContext(folder / "base", str(folder / "forget.json"), device="cpu")


def unlearnt(folder, out, method="salun", **mask):
    path = out / "mask"
    if method == "salun":
        compute_mask(context(folder), Recipe(density=0.3), path, **mask)
    recipe = Recipe(method=method, method_config=SETTINGS)
    result = run_unlearning(context(folder), recipe, path if method == "salun" else None, out / "after")
    return result, load(RunFacts, out / "after" / "run.json")


def test_only_a_mask_of_scores_costs_a_pass_over_the_forget_set(small, tmp_path):
    train = len(load_model(small / "base").split.train)
    (tmp_path / "scored").mkdir()
    (tmp_path / "random").mkdir()
    (tmp_path / "none").mkdir()
    _, scored = unlearnt(small, tmp_path / "scored")
    _, drawn = unlearnt(small, tmp_path / "random", random_seed=1)
    _, free = unlearnt(small, tmp_path / "none", "random_label")
    assert (scored.passes, drawn.passes, free.passes) == (train + 10, train, train)
    assert drawn.density == pytest.approx(0.3, abs=1e-4)


def test_the_share_that_moved_is_in_facts_evidence_and_report(small, tmp_path):
    result, facts = unlearnt(small, tmp_path)
    assert 0 < result.changed_fraction <= 0.3001
    assert facts.changed_fraction == result.changed_fraction
    paths = tmp_path / "after", tmp_path / "e.json", tmp_path / "r.html"
    evidence = evaluate(context(small), *paths, mask=tmp_path / "mask")
    assert (
        evidence.run.changed_fraction
        == load(Evidence, tmp_path / "e.json").run.changed_fraction
        == result.changed_fraction
    )
    shown = f"<dt>Changed weights</dt><dd>{wording.number(None, result.changed_fraction)}"
    assert shown in (tmp_path / "r.html").read_text("utf-8")


def test_evidence_without_optional_facts_has_a_fixed_digest():
    plain = Evidence(
        created_at="2026-01-31T00:00:00Z",
        measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e"),
        forgotten=Forgotten(count=1, train_count=2, kinds=["class"]),
        integrity=Integrity(weights=4, weights_changed=2, non_finite=0, buffers_changed=0),
        metrics={"UA": Metric(before=0.0, after=1.0, n=1)},
        run=RunFacts(method="salun", passes=7),
    )
    assert plain.digest == "632b73c0b985dbc1b5493435c5a795428f8c40d455c6a70c81554ae4da15ba89"
    moved = plain.model_copy(update={"run": plain.run.model_copy(update={"changed_fraction": 0.5})})
    assert moved.digest != plain.digest
