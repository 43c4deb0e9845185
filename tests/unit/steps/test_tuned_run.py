"""A run whose settings were searched for: what it writes, which mask counts, and when it writes nothing."""

import json
import shutil

import pytest
import torch

from salun_core.config import load
from salun_core.data import DataSpec, LoadedData, load_data
from salun_core.errors import DataError, GateRefusedError, IntegrityError, UsageError
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.registry.lookup import read_version
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.publishing import gate_and_publish
from salun_core.steps.unlearning import _tune, run_unlearning
from salun_core.storage.keys import run_key
from salun_core.tasks import register_model
from salun_core.tasks.classification.training import train_model
from salun_core.tasks.masks import require_nested, used_mask
from salun_core.tasks.task import TuningOptions
from salun_core.tuning import TuningLog
from salun_core.tuning.space import PORTFOLIO

pytestmark = pytest.mark.slow

SETTINGS = {"batch_size": 32, "epochs": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A base model of the digits, a class to forget, and a tuned run of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tuned")
    config = UnlearnConfig(
        epochs=6, learning_rate=0.1, schedule="cosine", batch_norm="update", batch_size=32, device="cpu"
    )
    train_model(DataSpec(source="digits", train_limit=600), "resnet8", config, folder / "base")
    (folder / "forget.json").write_text(json.dumps({"kind": "class", "class_id": 3}))
    tuned(folder, folder / "after", TuningOptions("8e"))
    return folder


def context(folder, **of_run):
    return RunContext(folder / "base", str(folder / "forget.json"), device="cpu", **of_run)


def tuned(folder, out, options, mask=None, method="salun", settings=SETTINGS, **of_run):
    recipe = Recipe(method=method, method_config=settings, seed=1)
    return run_unlearning(context(folder, **of_run), recipe, mask, out, tuning=options)


def masked(folder, density, path, method="salun", **more):
    compute_mask(context(folder), Recipe(method=method, density=density), path, **more)
    return path


def measured(folder, tmp_path, after=None, **extra):
    paths = after or folder / "after", tmp_path / "evidence.json", tmp_path / "report.html"
    return evaluate(context(folder), *paths, **extra)


def test_all_that_was_tried_lies_beside_the_model(bench):
    log, facts = load(TuningLog, bench / "after" / "tuning.json"), load(RunFacts, bench / "after" / "run.json")
    chosen = log.trials[log.chosen]
    assert (facts.tuning.trials, facts.tuning.passes) == (len(log.trials), log.passes)
    assert facts.passes == log.passes >= sum(trial.passes for trial in log.trials)
    assert facts.density == pytest.approx(chosen.density, abs=1e-4)
    assert facts.config["learning_rate"] == chosen.settings["learning_rate"]
    assert facts.config["epochs"] == chosen.epochs == len(facts.history)
    assert (facts.seed, log.seed, log.policy, log.budget) == (1, 1, "classifier", "8e")
    assert facts.seconds["unlearn"] == log.seconds
    assert log.optimiser.startswith("optuna ")
    assert log.not_judged == ["restored"]
    assert log.held_out == sum(label != 3 for label in validation_labels(bench))
    assert chosen.figures["UA_class"] >= 0.95


def validation_labels(folder):
    model = load_model(folder / "base")
    return load_data(model.card.data, model.split).images("validation").labels.tolist()


def test_the_mask_is_the_mask_steps_own_at_that_density(bench, tmp_path):
    log = load(TuningLog, bench / "after" / "tuning.json")
    density = log.trials[log.chosen].density
    mask = SaliencyMask.load(masked(bench, density, tmp_path / "mask"))
    beside = SaliencyMask.load(bench / "after" / "mask.safetensors")
    assert mask == beside
    assert {key: beside.facts[key] for key in ("model_digest", "forget_set_digest")} == {
        key: mask.facts[key] for key in ("model_digest", "forget_set_digest")
    }


def test_settings_and_mask_give_the_same_model_without_a_search(bench, tmp_path):
    facts = load(RunFacts, bench / "after" / "run.json")
    settings = {key: value for key, value in facts.config.items() if key != "seed"}
    recipe = Recipe(method="salun", method_config=settings, seed=facts.seed)
    run_unlearning(context(bench), recipe, bench / "after" / "mask.safetensors", tmp_path / "again")
    assert load_model(tmp_path / "again").digest == load_model(bench / "after").digest


def test_weights_are_compared_under_the_mask_beside_the_model(bench, tmp_path):
    evidence = measured(bench, tmp_path)
    beside = SaliencyMask.load(bench / "after" / "mask.safetensors")
    assert evidence.measured.mask == beside.digest
    assert evidence.integrity.frozen_changed == 0
    assert 0 < evidence.integrity.weights_changed <= beside.k
    assert evidence.run.tuning.mask == beside.digest


def mask_used(folder, after, mask=None):
    return used_mask(after, mask, load(RunFacts, after / "run.json"), context(folder).inputs)


@pytest.mark.parametrize("density", [0.05, 0.6])
def test_a_mask_of_the_mask_step_at_another_density_agrees(bench, tmp_path, density):
    path = tmp_path / "mask"
    masked(bench, density, path)
    beside = SaliencyMask.load(bench / "after" / "mask.safetensors")
    assert mask_used(bench, bench / "after", path) == beside


def test_a_mask_that_is_not_of_these_scores_is_refused(bench, tmp_path):
    path = tmp_path / "mask"
    masked(bench, 0.3, path, random_seed=1)
    with pytest.raises(IntegrityError, match="contradicts the mask of the mask step"):
        measured(bench, tmp_path, mask=path)
    assert not (tmp_path / "evidence.json").exists()


def test_a_search_refuses_a_mask_that_is_not_of_its_scores(bench, tmp_path):
    path = tmp_path / "mask"
    masked(bench, 0.3, path, random_seed=1)
    with pytest.raises(IntegrityError, match="contradicts the mask of the mask step"):
        tuned(bench, tmp_path / "out", TuningOptions("4e"), mask=path)
    assert not (tmp_path / "out").exists()


def test_a_mask_that_was_put_beside_the_model_afterwards_is_refused(bench, tmp_path):
    after = tmp_path / "after"
    shutil.copytree(bench / "after", after)
    beside = SaliencyMask.load(after / "mask.safetensors")
    SaliencyMask.full(beside.shapes).with_facts(beside.facts).save(after / "mask.safetensors")
    with pytest.raises(IntegrityError, match="the mask beside the model does not match"):
        measured(bench, tmp_path, after)
    SaliencyMask.full(beside.shapes).save(after / "mask.safetensors")
    with pytest.raises(IntegrityError, match="the model of the mask"):
        mask_used(bench, after)
    (after / "mask.safetensors").unlink()
    with pytest.raises(UsageError, match="there is no mask"):
        mask_used(bench, after)


def test_a_thousandth_is_rounding_and_more_is_not():
    scores = {"w": torch.arange(20_000.0)}
    dense, sparse = (SaliencyMask.from_scores(scores, density) for density in (0.5, 0.1))
    require_nested(dense, sparse)
    require_nested(sparse, dense)
    moved = scores["w"].clone()
    moved[-2:] = -1.0
    require_nested(sparse, SaliencyMask.from_scores({"w": moved}, 0.5))
    moved[-3:] = -1.0
    with pytest.raises(IntegrityError, match="3 of its 2000"):
        require_nested(sparse, SaliencyMask.from_scores({"w": moved}, 0.5))


@pytest.fixture(scope="module")
def of_methods(bench):
    """A run whose method was chosen by a search, with the ids of the images that it read."""
    read = set()

    class Watched(LoadedData):
        def pixels(self, ids):
            read.update(ids)
            return super().pixels(ids)

    model = load_model(bench / "base")
    data = load_data(model.card.data, model.split)
    watched = Watched(**vars(data))
    recipe = Recipe(method="auto", method_config=SETTINGS, seed=1)
    run_unlearning(context(bench, loaded=watched), recipe, None, bench / "auto", tuning=TuningOptions("12e"))
    return bench / "auto", read


def test_the_facts_name_the_method_that_was_chosen(of_methods, bench, tmp_path):
    after, _ = of_methods
    log, facts = load(TuningLog, after / "tuning.json"), load(RunFacts, after / "run.json")
    assert (log.method, facts.tuning.method) == ("auto", "auto")
    assert facts.method == log.chosen_method == log.trials[log.chosen].method == load_model(after).card.method
    assert facts.method in PORTFOLIO
    assert len({trial.method for trial in log.trials}) > 1
    assert (after / "mask.safetensors").exists() == (facts.density is not None)
    evidence = measured(bench, tmp_path, after, mask=masked(bench, 0.5, tmp_path / "mask", method="auto"))
    assert evidence.run == facts
    assert evidence.integrity.frozen_changed in (0, None)


def test_a_search_over_methods_does_not_look_at_test_data(of_methods, bench):
    _, read = of_methods
    split = load_model(bench / "base").split
    assert read >= set(split.ids("validation"))
    assert not read & set(split.ids("test"))


def test_a_method_is_left_open_only_for_a_search(bench, tmp_path):
    with pytest.raises(UsageError, match="the method auto needs a search"):
        run_unlearning(context(bench), Recipe(method="auto"), None, tmp_path / "out")


def strict_policy(path):
    rule = {"metric": "TA", "op": ">=", "value": 1.5, "reason": "nobody can", "min_n": 1}
    path.write_text(json.dumps({"format": "salun.policy/v1", "name": "strict", "rules": [rule]}))
    return str(path)


def test_where_no_setting_is_allowed_nothing_is_written(bench, tmp_path):
    options = TuningOptions("3e", strict_policy(tmp_path / "policy.json"))
    with pytest.raises(GateRefusedError, match=r"no setting satisfies the policy strict.*TA >= 1\.5") as caught:
        tuned(bench, tmp_path / "out", options)
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_a_broken_search_leaves_nothing_and_the_next_one_is_whole(bench, tmp_path):
    class BrokenOffError(Exception):
        pass

    def stop(record):
        if record.number == 1:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        tuned(bench, tmp_path / "out", TuningOptions("8e", on_trial=stop))
    assert list(tmp_path.iterdir()) == []
    tuned(bench, tmp_path / "out", TuningOptions("8e"))
    assert load_model(tmp_path / "out").digest == load_model(bench / "after").digest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (bench / "after").iterdir()
    )


def test_a_split_without_validation_is_refused(tmp_path):
    spec = DataSpec(source="digits", train_limit=200, validation_fraction=0.0)
    config = UnlearnConfig(epochs=1, learning_rate=0.1, batch_norm="update", device="cpu")
    train_model(spec, "resnet8", config, tmp_path / "base")
    (tmp_path / "forget.json").write_text(json.dumps({"kind": "class", "class_id": 3}))
    with pytest.raises(DataError, match="no held-out images"):
        tuned(tmp_path, tmp_path / "out", TuningOptions("8e"))


def test_a_method_that_trains_anew_runs_by_its_recipe(bench, tmp_path):
    overrides = {"epochs": 1, "learning_rate": 0.05, "device": "cpu"}
    tuned(bench, tmp_path / "out", TuningOptions("1e"), method="retrain", settings=overrides)
    facts = load(RunFacts, tmp_path / "out" / "run.json")
    assert facts.tuning is None
    assert not (tmp_path / "out" / "tuning.json").exists()


def test_a_published_version_holds_neither_search_nor_mask(bench, store, tmp_path):
    parent = register_model(store, "digits", bench / "base", "train", len(load_model(bench / "base").split.train))
    path = tmp_path / "mask"
    masked(bench, 0.5, path)
    measured(bench, tmp_path, mask=path)
    here = context(bench, store_uri=store.uri, model_line="digits", run="run-1")
    paths = bench / "after", tmp_path / "evidence.json", tmp_path / "report.html"
    published = gate_and_publish(here, *paths, parent=parent, mask=path)
    files = read_version(store, "digits", published.version).files
    assert not {"tuning.json", "mask.safetensors", "run.json"} & set(files)
    verdicts = {verdict.rule: verdict.passed for verdict in published.decision.verdicts}
    assert verdicts["mask digest"]
    assert verdicts["frozen weights"]


def test_a_refusal_is_left_for_the_ledger(bench, store, tmp_path):
    options = TuningOptions("3e", strict_policy(tmp_path / "policy.json"))
    here = context(bench, store_uri=store.uri, run="run-2")
    for _ in range(2):
        with pytest.raises(GateRefusedError):
            _tune(here, Recipe(method="salun", method_config=SETTINGS, seed=1), None, options)
    decision = json.loads(store.get(run_key("run-2", "decision.json")).data)
    assert decision["passed"] is False
    assert "none of" in decision["summary"]
