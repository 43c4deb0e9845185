"""The evaluation step with the measurements that are off by default, and a policy that requires one."""

import json
import shutil

import pytest
import torch

from salun_core.data import DataSpec
from salun_core.data.split import SplitManifest
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation.evidence import Evidence, SampleCount
from salun_core.gate import Policy, decide, load_policy
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model, save_model
from salun_core.models.architectures import build_classifier
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks.classification.training import train_model

pytestmark = pytest.mark.slow

ALL = "lira=4,relearn=3,probe,decile,kl,tow,seeds=2"
NEW = {
    *("lira_auc", "lira_offline_auc", "lira_tpr", "relearn", "probe_auc", "worst_decile", "worst_class_drop"),
    *("KL_forget", "KL_test", "ToW", "UA_seeds", "RA_seeds", "TA_seeds", "attack_auc_seeds"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small base model, single digits to forget, an unlearned and a retrained model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("further")
    config = UnlearnConfig(epochs=3, learning_rate=0.1, batch_norm="update", batch_size=16, device="cpu")
    result = train_model(DataSpec(source="digits", train_limit=150, test_limit=100), "resnet8", config, folder / "base")
    assert result is not None
    ids = load_model(folder / "base").split.ids("train")[:20]
    (folder / "forget.json").write_text(json.dumps({"kind": "samples", "ids": ids}))
    for name, method, overrides in (
        ("after", "random_label", {"epochs": 1, "batch_size": 16}),
        ("retrained", "retrain", {"epochs": 3, "batch_size": 16, "schedule": "constant"}),
    ):
        recipe = Recipe(method=method, method_config={**overrides, "device": "cpu"}, seed=4)
        run_unlearning(context(folder), recipe, None, folder / name)
    return folder


def context(folder):
    return RunContext(folder / "base", str(folder / "forget.json"), device="cpu")


def measured(folder, tmp_path, **extra):
    return evaluate(context(folder), folder / "after", tmp_path / "evidence.json", tmp_path / "report.html", **extra)


@pytest.fixture(scope="module")
def everything(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return measured(small, out, extra_metrics=ALL, reference=small / "retrained"), (out / "report.html").read_text(
        "utf-8"
    )


def test_a_sample_of_retained_images_is_stated_everywhere(small, tmp_path):
    """115 images are retained, and 100 tested."""
    reference = small / "retrained"
    found = measured(small, tmp_path, reference=reference, extra_metrics="decile,kl,tow", evaluation_samples="100")
    (split,) = found.sampling.splits.items()
    assert split == ("retain", SampleCount(n=100, of=len(load_model(small / "base").split.train) - 20))
    of_sample = {name: (item.n, item.population) for name, item in found.metrics.items() if item.population}
    assert of_sample == dict.fromkeys(("RA", "RA_loss", "gap", "ToW"), (100, split[1].of))
    report = (tmp_path / "report.html").read_text("utf-8")
    assert f"n 100 of {split[1].of}" in report
    assert f"measured 100 of {split[1].of} retained images, drawn with seed {found.sampling.seed}" in report
    assert Evidence.model_validate_json((tmp_path / "evidence.json").read_text()).digest == found.digest


def test_all_of_them_are_in_the_evidence_with_n(everything):
    evidence, _ = everything
    assert set(evidence.metrics) >= NEW
    assert {name for name in NEW if not evidence.metrics[name].n} == set()
    assert {name for name in NEW if evidence.metrics[name].after is None} == set()
    assert evidence.further.shadow_models == 4
    assert evidence.further.unseen == evidence.metrics["lira_auc"].n == 20
    assert evidence.further.seeds == [4, 5]
    assert set(evidence.further.relearning) == {"before", "after", "reference"}


def test_the_first_of_the_seeds_is_the_model_itself_and_the_next_another(everything):
    evidence, _ = everything
    metric = evidence.metrics["TA_seeds"]
    other = 2 * metric.after - evidence.metrics["TA"].after
    assert 0 <= other <= 1
    assert evidence.metrics["attack_auc_seeds"].low < evidence.metrics["attack_auc_seeds"].high
    assert metric.low <= min(evidence.metrics["TA"].after, other) <= max(metric.low, other) <= metric.high


def test_the_report_says_what_each_cannot_show(everything):
    _, page = everything
    for words in ("4 shadow models", "3 steps at one learning rate", "nonlinear one may succeed", "2 seeds repeat"):
        assert words in page
    for title in ("Per-sample attack (LiRA)", "Tug of war (ToW)", "Most familiar tenth", "Linear probe"):
        assert title in page


def test_off_by_default(small, tmp_path):
    evidence = measured(small, tmp_path)
    assert not NEW & set(evidence.metrics)
    assert evidence.further is None
    assert "shadow models" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_policy_can_require_one(small, tmp_path, everything):
    rule = {"metric": "lira_auc", "op": "<=", "value": 1.0, "reason": "no sample may be found out"}
    policy = Policy.model_validate({"name": "attacked", "rules": [rule]})
    assert decide(everything[0], policy).passed
    refused = decide(measured(small, tmp_path), policy)
    assert not refused.passed
    assert "the evidence has no metric lira_auc" in refused.summary


def test_a_retraining_is_repeated_with_its_own_settings_and_a_forged_one_has_other_bits(small, tmp_path):
    paths = {"evidence_out": tmp_path / "evidence.json", "report_out": tmp_path / "report.html"}
    found = evaluate(context(small), small / "retrained", retrain_reference=True, **paths)
    assert (found.integrity.repeated, found.integrity.distance > 0.9) == (True, True)
    assert decide(found, load_policy("classifier")).verdicts[4].rule == "retrained again"
    forged = tmp_path / "forged"
    shutil.copytree(small / "after", forged)
    shutil.copy(small / "retrained" / "run.json", forged / "run.json")  # the record of another run
    found = evaluate(context(small), forged, retrain_reference=True, **paths)
    assert (found.integrity.repeated, found.run.method) == (False, "retrain")
    refused = decide(found, load_policy("classifier")).refusals
    assert any("its weights continue those before" in refusal.words for refusal in refused)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("another architecture", "the reference has another architecture: resnet20 instead of resnet8"),
        ("other data", "the reference was trained on other data"),
        (None, "the reference was trained on the forget set: on 20 of its samples"),
    ],
    ids=["architecture", "data", "saw the forget set"],
)
def test_a_reference_that_cannot_be_one_is_refused_before_anything_is_measured(small, tmp_path, change, why):
    other, given = small / "base", load_model(small / "retrained")
    card, split, network = given.card, given.split, given.model
    if change:
        other = tmp_path / "other"
        if change == "other data":
            split = SplitManifest.model_validate({**split.model_dump(mode="json"), "dataset_digest": "0" * 64})
        else:
            card = card.model_copy(update={"architecture": "resnet20"})
            network = build_classifier("resnet20", 10, 1, 8)
        save_model(other, network, card.model_copy(update={"split_digest": split.digest}), split)
    with pytest.raises(ModelError, match=why):
        measured(small, tmp_path, reference=other)
    assert not (tmp_path / "evidence.json").exists()


def test_distances_need_a_reference_and_names_must_exist(small, tmp_path):
    with pytest.raises(UsageError, match="kl cannot be measured"):
        measured(small, tmp_path, extra_metrics="kl")
    with pytest.raises(UsageError, match="did you mean 'probe'"):
        measured(small, tmp_path, extra_metrics="prob")
    assert list(tmp_path.iterdir()) == []
