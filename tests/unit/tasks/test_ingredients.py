"""What a line lacks for the gate is found from its card and the policy, before any run."""

from __future__ import annotations

import pytest

from salun_core.evaluation.metrics import metric_names
from salun_core.evaluation.statistics import wilson_interval
from salun_core.gate import Policy, load_policy
from salun_core.models.card import DiffusionCard
from salun_core.tasks.ingredients import (
    GATED_KINDS,
    Measurement,
    ingredients_of_line,
    missing_ingredients,
    unforgettable,
)
from salun_core.tasks.resolve import policy_for
from tests.support.card_line import CLASSES, begin_classifier, classifier_card, text_to_image_card
from tests.support.memory_store import MemoryFiles

DATA = {"source": "/no-such-folder/images"}


def ddpm_card(**evaluation):
    fields = text_to_image_card(CLASSES, DATA, **evaluation).model_dump(exclude={"prompt"})
    return DiffusionCard(**{**fields, "task": "class-conditional", "architecture": "UNet2DModel"})


def texts(card, policy="auto", kind="class", store=None, **fields):
    found = missing_ingredients(card, policy_for(policy, card), Measurement(kind, **fields), store)
    return [str(item) for item in found]


def rule(metric, op=">=", **fields):
    fields = fields or {"value": 0.5}
    return Policy.model_validate({"name": "own", "rules": [{"metric": metric, "op": op, "reason": "a test", **fields}]})


@pytest.mark.parametrize("kind", ["class", "samples", "subject"])
def test_a_classifier_lacks_nothing_for_its_policy(kind):
    assert texts(classifier_card(), kind=kind) == []


def test_a_complete_diffusion_line_lacks_nothing():
    assert texts(ddpm_card(judge="judge")) == []


def test_a_line_without_an_image_classifier_is_refused_by_its_rules():
    (text,) = texts(ddpm_card())
    assert text.startswith(
        "the line has no image classifier, so UA, RA, restored, none_of_these and FID cannot be measured and policy"
    )
    assert "--judge" in text


def test_the_image_classifier_is_looked_up_with_its_classes():
    store = MemoryFiles()
    begin_classifier(store, "judge")
    begin_classifier(store, "other", ("left", "right"))
    assert texts(ddpm_card(judge="judge"), store=store) == []
    (text,) = texts(ddpm_card(judge="other"), store=store)
    assert text.startswith("the image classifier does not know 'zebra', 'cat' and 'dog', so UA, RA and restored")
    (text,) = texts(ddpm_card(judge="judg"), store=store)
    assert "is neither a model line of this store nor a folder" in text


def test_a_folder_is_an_image_classifier_here_and_not_in_a_pod(tmp_path):
    (tmp_path / "model.json").write_text(classifier_card().model_dump_json())
    card = ddpm_card(judge=str(tmp_path))
    (found,) = missing_ingredients(card, policy_for("auto", card), Measurement("class"))
    assert found.only_in_pods
    assert "so in a pod, UA, RA, restored, none_of_these and FID cannot be measured" in str(found)


@pytest.mark.parametrize("images", [20, 21])
def test_too_few_images_for_the_low_end_are_named_with_the_number_that_is_enough(images):
    (text,) = (item for item in texts(ddpm_card(judge="judge", images_per_class=images)) if "low end" in item)
    assert f"images_per_class is {images}, so the rule UA >= 0.85 (low end) can never be shown and the level is" in text
    assert text.endswith("--evaluation images_per_class=22")


def test_the_number_that_is_named_is_enough_and_one_less_is_not():
    assert wilson_interval(1.0, 22)[0] >= 0.85 > wilson_interval(1.0, 21)[0]
    assert texts(ddpm_card(judge="judge", images_per_class=25)) == []  # 4 other classes give 100 images for RA
    found = texts(ddpm_card(judge="judge", images_per_class=24))
    assert [text.split("the rule ")[1].split(";")[0] for text in found] == [
        f"{metric} can never hold: it needs 100 images" for metric in ("RA >=", "FID <=")
    ]
    assert all(text.endswith("images_per_class=25") for text in found)


def test_the_images_of_several_prompts_add_up():
    card = text_to_image_card(CLASSES, DATA, judge="judge", images_per_class=20)
    prompts = ("a cat", "two cats")
    assert any("low end" in text for text in texts(card, kind="concept", prompts=prompts[:1]))
    assert not any("low end" in text for text in texts(card, kind="concept", prompts=prompts))


def test_a_concept_must_name_a_class_that_can_be_recognised():
    card = text_to_image_card(CLASSES, DATA, judge="judge")
    assert texts(card, kind="concept", prompts=["a red cat"]) == []
    (text,) = texts(card, kind="concept", prompts=["van Gogh"])
    assert text.startswith("no prompt of the concept names exactly one class")


def test_nudity_needs_its_suite_and_a_clip_model(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    card = text_to_image_card(CLASSES, DATA, judge="judge", suite="nsfw", clip="/no-such-folder")
    assert policy_for("auto", card).name == "nsfw"
    (text,) = texts(card, kind="concept")
    assert text.startswith("the CLIP model '/no-such-folder' does not exist, so CLIP cannot be measured")
    plain = texts(text_to_image_card(CLASSES, DATA, judge="judge"), "nsfw", "concept")
    assert [text.split(", so ")[0] for text in plain] == ["the line has no CLIP model", "its suite is not nsfw"]


def test_nudity_can_be_judged_without_data(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "inception.safetensors").write_text("")
    files = {"clip": str(tmp_path), "extractor": str(tmp_path / "inception.safetensors")}
    card = text_to_image_card(suite="nsfw", images_per_class=2, **files)
    found = missing_ingredients(card, load_policy("nsfw"), Measurement("concept"))
    assert all(item.only_in_pods for item in found)  # the files lie on this machine, and nothing else is missing
    few = texts(text_to_image_card(suite="nsfw", images_per_class=1, **files), kind="concept")
    assert any("CLIP >= can never hold: it needs 100 images" in text for text in few)
    plain = text_to_image_card(suite="class", extractor=files["extractor"])
    assert any(text.startswith("the model came without data, so FID") for text in texts(plain, "nsfw", "concept"))


@pytest.mark.parametrize(
    ("metric", "fields", "why"),
    [
        ("FID", {}, "a classifier draws no images"),
        ("lira_tpr", {}, "the extra metric lira is not requested"),
        ("ToW", {"extra_metrics": ["tow"]}, "no reference is retrained"),
        ("UA_samples", {}, "a class has no single samples"),
    ],
)
def test_a_metric_that_cannot_be_measured_on_a_classifier(metric, fields, why):
    (found,) = missing_ingredients(classifier_card(), rule(metric), Measurement("class", **fields))
    assert found.why == why
    assert found.effect == f"{metric} cannot be measured and policy own refuses"


def test_a_requested_metric_can_be_measured():
    asked = Measurement("samples", extra_metrics=["lira", "kl"], reference=True)
    for metric in ("lira_tpr", "KL_test", "gap", "UA_samples"):
        assert missing_ingredients(classifier_card(), rule(metric), asked) == []


def test_a_policy_without_a_rule_for_the_kind_refuses():
    (text,) = texts(classifier_card(), "ddpm", "subject")[:1]
    assert text == "policy ddpm has no rule for a subject, so the gate refuses; choose another policy"


def test_a_rule_relative_to_a_reference_needs_one():
    own = rule("RA", relative_to={"metric": "RA", "state": "reference"})
    assert [item.why for item in missing_ingredients(classifier_card(), own, Measurement("class"))] == [
        "no reference is retrained"
    ]
    assert missing_ingredients(classifier_card(), own, Measurement("class", reference=True)) == []


def test_every_metric_has_an_answer_for_every_kind_of_model():
    """A metric is measured, or has a cause; a policy of one rule never raises."""
    for metric in metric_names():
        for card in (classifier_card(), ddpm_card(judge="j"), text_to_image_card()):
            for kind in GATED_KINDS:
                assert len(missing_ingredients(card, rule(metric), Measurement(kind))) <= 3


def test_the_shipped_policies_of_one_kind_lack_everything_of_the_other():
    assert texts(classifier_card(), "ddpm")[0].startswith(
        "a classifier draws no images, so none_of_these and FID cannot"
    )
    assert any(text.startswith("it is a metric of classifiers, so UA_class, TA") or "TA" in text
               for text in texts(ddpm_card(judge="j"), "classifier"))  # fmt: skip


def test_kinds_that_a_model_cannot_forget():
    assert unforgettable(classifier_card(), "concept")
    assert unforgettable(classifier_card(), "subject", subjects=False) == "the data have no subject column"
    assert not any(unforgettable(classifier_card(), kind) for kind in ("class", "samples", "subject", "random"))
    assert unforgettable(ddpm_card(), "samples")
    assert unforgettable(ddpm_card(), "concept")
    assert unforgettable(text_to_image_card(), "class")
    assert not unforgettable(ddpm_card(), "class")


def test_what_a_line_lacks_is_listed_once_for_all_kinds():
    found = ingredients_of_line(text_to_image_card(CLASSES, DATA), load_policy("stable-diffusion"))
    assert [item.why for item in found] == ["the line has no image classifier"]
