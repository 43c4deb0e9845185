"""The five steps on small diffusion models of real digits: classes and concepts, published and certified."""

import json
import re

import pytest
import torch

from salun_core.certificates.keys import create_key
from salun_core.certificates.verify import verify_certificate
from salun_core.data.targets import ClassTarget, ConceptTarget
from salun_core.errors import DataError, GateRefusedError, ModelError, UsageError
from salun_core.methods.recipe import Recipe
from salun_core.models.card import DiffusionCard
from salun_core.models.diffusers_folder import load_diffusion
from salun_core.registry.lookup import read_head, read_version
from salun_core.registry.versions import fetch_version
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Outcome
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.publishing import gate_and_publish
from salun_core.steps.run import run_all
from salun_core.steps.run_form import DeletionSweepForm, UnlearningForm
from salun_core.steps.sweep import sweep_once
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage.keys import certificate_key
from salun_core.tasks import TASKS, open_inputs, register_model
from salun_core.tasks.diffusion.inputs import label_of, rows_of
from salun_core.times import utc_clock
from tests.support.tiny_diffusion_models import (
    CLASS,
    OTHER,
    PERMISSIVE,
    QUICK,
    target_file,
    tiny_ddpm,
    tiny_stable_diffusion,
)

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

CONCEPT = {"prompts": [f"an image of a {CLASS}", "a handwritten three"], "anchor_prompt": f"an image of a {OTHER}"}


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory, digits_model):
    return tiny_ddpm(tmp_path_factory.mktemp("ddpm") / "model", digits_model, relearn_steps=4)


@pytest.fixture(scope="module")
def sd(tmp_path_factory, digits_model):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd") / "model", digits_model)


def unlearned(model, forget, folder, **overrides):
    """Mask and unlearn; return the context, the mask and the folder of the new model."""
    mask, after = folder / "mask.safetensors", folder / "after"
    recipe, context = Recipe(method_config={**QUICK, **overrides}), RunContext(model, forget, device="cpu")
    compute_mask(context, recipe, mask)
    run_unlearning(context, recipe, mask, after)
    return context, mask, after


def measured(model, forget, folder, **overrides):
    """Mask, unlearn, evaluate; return the evidence and the folder of the new model."""
    context, mask, after = unlearned(model, forget, folder, **overrides)
    return evaluate(context, after, folder / "evidence.json", folder / "report.html", mask=mask), after


def test_a_class_of_a_ddpm(ddpm, tmp_path):
    forget = target_file(tmp_path, kind="class", class_id=CLASS)
    evidence, after = measured(ddpm, forget, tmp_path)
    before, candidate = load_diffusion(ddpm), load_diffusion(after)
    assert evidence.integrity.frozen_changed == 0
    assert 0 < evidence.integrity.weights_changed <= round(0.5 * evidence.integrity.weights)
    assert {"UA", "RA", "FID", "UA_relearned"} <= evidence.metrics.keys()
    assert (evidence.metrics["UA"].n, evidence.metrics["RA"].n) == (4, 36)
    assert evidence.generation.task == "class-conditional"
    assert [point.step for point in evidence.generation.resurgence] == [0, 1, 2, 3, 4]
    assert evidence.forgotten.classes == [3]
    assert len(candidate.split.train) == len(before.split.train) - evidence.forgotten.count
    assert candidate.card.parent == before.digest
    assert "data:image/" in (tmp_path / "report.html").read_text()


def test_a_concept_of_a_stable_diffusion(sd, tmp_path):
    forget = target_file(tmp_path, kind="concept", images=8, **CONCEPT)
    evidence, after = measured(sd, forget, tmp_path, selection="xattn")
    mask = SaliencyMask.load(tmp_path / "mask.safetensors")
    touched = {name for name, share in mask.density_by_parameter().items() if share}
    assert touched
    assert all(".attn2." in name for name in touched)
    assert evidence.integrity.frozen_changed == 0
    assert evidence.forgotten.kinds == ["concept"]
    assert evidence.forgotten.count == 8
    assert evidence.metrics["UA"].n == 4  # of the other prompt no word names a class, so that nobody can judge it
    for name in ("vae", "text_encoder"):
        assert (sd / name / "config.json").read_bytes() == (after / name / "config.json").read_bytes()


def test_the_mask_and_the_training_see_the_same_generated_images(sd, tmp_path):
    from salun_core.methods.diffusion import diffusion_config
    from salun_core.tasks.diffusion.examples import build_example_sets

    forget = target_file(tmp_path, kind="concept", images=6, **CONCEPT)
    config, device = diffusion_config("salun", QUICK), torch.device("cpu")
    scored = build_example_sets(open_inputs(sd, forget), config, device, retain=False)
    trained = build_example_sets(open_inputs(sd, forget), config, device)
    assert torch.equal(scored.forget.mean, trained.forget.mean)
    assert len(scored.retain) == 0
    kept = set(trained.retain.condition.tolist())
    gone = set(trained.forget.condition.tolist())
    assert not kept & gone
    anchor = trained.table.row(CONCEPT["anchor_prompt"])
    assert set(trained.forget.pseudo.tolist()) == {anchor}
    assert anchor in kept


def test_a_change_of_another_component_is_refused(sd, tmp_path):
    forget = target_file(tmp_path, kind="class", class_id=CLASS)
    context, mask, after = unlearned(sd, forget, tmp_path)
    settings = after / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 999'))
    with pytest.raises(ModelError, match="more than the denoiser"):
        evaluate(context, after, tmp_path / "e.json", tmp_path / "r.html", mask=mask)


def test_an_attack_is_measured_where_the_card_asks_for_it(sd, tmp_path):
    import shutil

    shutil.copytree(sd, tmp_path / "model")
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    card["evaluation"]["attack_steps"] = 2
    (tmp_path / "model" / "model.json").write_text(json.dumps(card))
    evidence, _ = measured(tmp_path / "model", target_file(tmp_path, kind="class", class_id=CLASS), tmp_path)
    attack, plain = evidence.metrics["attack_success"], evidence.metrics["unattacked_success"]
    for metric in (attack, plain):  # of the model before and after
        assert metric.n == 4
        assert 0 <= metric.low <= metric.after <= metric.high <= 1
        assert 0 <= metric.before <= 1
    missed = evidence.metrics["UA"]  # the same images
    assert (plain.before, plain.after) == pytest.approx((1 - missed.before, 1 - missed.after))


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        ({"kind": "samples", "ids": ["000001"]}, UsageError, "forgets classes and concepts"),
        ({"kind": "concept", **CONCEPT}, UsageError, "takes no prompts"),
        ({"kind": "class", "class_id": "elephant"}, UsageError, "elephant"),
        ([{"kind": "class", "class_id": index} for index in range(10)], DataError, "whole training data"),
    ],
)
def test_what_a_ddpm_cannot_forget(ddpm, tmp_path, target, error, said):
    (tmp_path / "target.json").write_text(json.dumps(target))
    with pytest.raises(error, match=said):
        unlearned(ddpm, str(tmp_path / "target.json"), tmp_path)


def test_bad_settings_are_refused_before_any_work(ddpm, sd, tmp_path):
    forget = target_file(tmp_path, kind="class", class_id=CLASS)
    for model, settings, said in (
        (ddpm, {"alpha": 0}, "alpha 0 is refused"),
        (ddpm, {"selection": "xattn"}, "selection xattn is empty"),
        (ddpm, {"pseudo": "anchor"}, "no anchor"),
        (ddpm, {"steps": 7}, "7 steps cannot be spread over 2"),
        (sd, {"stepps": 4}, "stepps"),
    ):
        with pytest.raises(UsageError, match=said):
            unlearned(model, forget, tmp_path, **settings)
    assert not (tmp_path / "after").exists()
    unlearned(ddpm, forget, tmp_path, alpha=0, allow_zero_alpha=True)


def test_an_anchor_that_is_to_be_forgotten_too(sd, tmp_path):
    (tmp_path / "target.json").write_text(
        json.dumps([{"kind": "concept", "images": 4, **CONCEPT}, {"kind": "class", "class_id": OTHER}])
    )
    with pytest.raises(UsageError, match="anchor is to be forgotten itself"):
        unlearned(sd, str(tmp_path / "target.json"), tmp_path)


@pytest.mark.s3
def test_a_run_publishes_only_what_the_gate_passes(sd, store, tmp_path):
    register_model(store, "sd", sd, "train", 300)
    store.put_new("policy.json", json.dumps(PERMISSIVE).encode())
    settings = {
        "model_line": "sd",
        "store_uri": store.uri,
        "forget_manifest_uri": target_file(tmp_path, kind="class", class_id=CLASS),
        "method_config": QUICK,
    }
    with pytest.raises(GateRefusedError):
        run_all(UnlearningForm(**settings), tmp_path / "refused", run="run-refused")
    parent = read_head(store, "sd")[0].version
    run, mild = tmp_path / "refused", f"{store.uri}/policy.json"
    here = RunContext(run / "before", settings["forget_manifest_uri"], "sd", store.uri)
    paths = run / "after", run / "evidence.json", tmp_path / "report.html"
    made = gate_and_publish(here, *paths, parent=parent, policy_uri=mild, mask=run / "mask.safetensors")
    old, new = (read_version(store, "sd", digest) for digest in (parent, made.version))
    changed = {name for name, entry in new.files.items() if name in old.files and entry != old.files[name]}
    assert changed == {"model.json", "split.parquet", "unet/diffusion_pytorch_model.safetensors"}
    assert (new.parent, new.method) == (parent, "salun")
    assert 0 < new.lineage.debt < 0.2


@pytest.mark.s3
def test_requests_for_a_class_and_a_concept_become_certificates(sd, store, tmp_path, monkeypatch):
    keys = create_key(tmp_path / "keys")
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(keys.private))
    register_model(store, "sd", sd, "train", 300)
    store.put_new("policy.json", json.dumps(PERMISSIVE).encode())
    ledger = Ledger(store, utc_clock)
    ledger.submit("a-class", "sd", ClassTarget(class_id="7"))
    ledger.submit("a-concept", "sd", ConceptTarget(**CONCEPT, images=4))
    policy = f"{store.uri}/policy.json"
    config = DeletionSweepForm(
        model_line="sd", store_uri=store.uri, min_requests=1, policy_uri=policy, method_config=QUICK
    )
    done = sweep_once(config, tmp_path / "run")
    assert done.error is None
    assert sorted(done.settled.completed) == ["a-class", "a-concept"]
    fetch_version(store, "sd", done.settled.version, tmp_path / "model")
    for request in ("a-class", "a-concept"):
        path = tmp_path / f"{request}.json"
        path.write_bytes(store.get(certificate_key(request)).data)
        found = verify_certificate(path, tmp_path / "model", keys=[keys.public])
        assert found.certificate.predicate.outcome is Outcome.UNLEARNED
        assert "three" not in path.read_text()  # a prompt may be personal
    assert not re.search("handwritten", store.get("requests/a-concept/request.json").data.decode())


def test_a_sweep_of_a_diffusion_line_frees_every_weight_at_last():
    found = TASKS["diffusion"].escalation(Recipe(method_config={"steps": 100}))
    assert [(recipe.density, recipe.method_config["steps"]) for recipe in found.recipes] == [
        (0.5, 100),
        (0.5, 200),
        (0.75, 200),
        (1, 200),
    ]
    assert [recipe.method_config for recipe in found.gentler] == [
        {"steps": 100, "learning_rate": 6.667e-05},
        {"steps": 100, "learning_rate": 2e-05},
    ]
    assert {level.role.value for level in found.levels} == {"strength"}  # it is not retrained


def test_what_is_gentler_depends_on_the_method():
    for method in ("rece", "uce"):
        kept = TASKS["diffusion"].escalation(Recipe(method=method, method_config={"batch_size": 4}))
        for name in ("edit_strength", "preserve_strength"):
            assert [recipe.method_config[name] for recipe in kept.gentler] == [1.0, 10.0]
            assert [recipe.method_config.get(name) for recipe in kept.recipes] == [None, 0.01, 0.001]
    assert [(recipe.method, recipe.method_config) for recipe in kept.others] == [("salun", {"batch_size": 4})]
    edited = TASKS["classification"].escalation(Recipe(method="influence"))
    assert [recipe.method_config["influence_strength"] for recipe in edited.gentler] == [5.0, 1.5]
    adaptive = ("salun_adaptive", {})
    assert [(recipe.method, recipe.method_config) for recipe in edited.others] == [adaptive, ("sfr_on", {})]
    assert edited.levels[-2].words == "salun_adaptive"
    found = TASKS["classification"].escalation
    assert [(recipe.method, recipe.method_config) for recipe in found(Recipe(method="sfr_on")).others] == [adaptive]
    steered = found(Recipe())  # the default: adaptive
    assert [recipe.method for recipe in steered.others] == ["sfr_on", "scrub"]
    assert [recipe.method for recipe in steered.recipes] == ["salun_adaptive", "salun", "salun", "retrain"]
    assert [recipe.method for recipe in steered.gentler] == ["salun_adaptive", "salun_adaptive"]
    assert [level.role.value for level in steered.levels[:4]] == ["strength"] * 3 + ["retrain"]
    drawn = {"retain_fraction": 0.1}  # what limits the cost of one method limits that of the others
    found_drawn = [
        (recipe.method, recipe.method_config) for recipe in found(Recipe(method="salun", method_config=drawn)).others
    ]
    assert found_drawn == [adaptive, ("sfr_on", drawn)]
    again = TASKS["classification"].escalation(Recipe(method="retrain", method_config={"epochs": 3}))
    assert [
        (level.role.value, recipe.method_config) for level, recipe in zip(again.levels, again.recipes, strict=True)
    ] == [
        ("retrain", {"epochs": 3}),
        ("retrain", {}),
    ]
    searched = found(Recipe(method="auto"))
    assert [level.words for level in searched.levels] == ["auto", "retrain"]
    assert (searched.gentler, searched.others) == ([], [])


def card(**changes):
    fields = {"task": "text-to-image", "architecture": "UNet2DConditionModel", "channels": 3, "height": 32, "width": 32}
    digests = {"dataset_digest": "0" * 64, "split_digest": "0" * 64}
    return DiffusionCard(classes=["shirt", "t-shirt", "bag"], **fields, **digests, **changes)


def test_a_prompt_shows_the_class_that_its_words_name():
    named = {
        "an image of a shirt": 0,
        "two t-shirts on a line": 1,
        "a BAG": 2,
        "a bag and a shirt": None,
        "bagel": None,
    }
    assert {prompt: label_of(prompt, card()) for prompt in named} == named


def test_the_rows_are_classes_then_prompts_each_once(sd, tmp_path):
    forget = target_file(tmp_path, kind="concept", neighbours=["a five"], **CONCEPT)
    rows = rows_of(load_diffusion(sd).card, open_inputs(sd, forget).forget_set)
    assert rows.classes == 10
    assert rows.names[10:] == ["a handwritten three", "a five"]
