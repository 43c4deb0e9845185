"""The card of a diffusion model, and which card a document is."""

import json

import pytest

from salun_core.errors import UsageError
from salun_core.models.card import DiffusionCard, DiffusionEvaluation, ModelCard
from salun_core.tasks import parse_card, read_card

FACTS = {"channels": 3, "height": 32, "width": 32, "dataset_digest": "a", "split_digest": "b"}
CARD = {"task": "text-to-image", "architecture": "UNet2DConditionModel", "classes": ["bag", "coat"], **FACTS}
CLASSIFIER = {
    "architecture": "resnet8",
    "classes": ["a", "b"],
    "mean": [0.5],
    "std": [0.2],
    "data": {"source": "digits"},
    **{**FACTS, "channels": 1},
}


def test_the_task_selects_the_kind_of_card(tmp_path):
    """Cards of classifiers that were written before there were others have no task."""
    assert isinstance(parse_card(CARD), DiffusionCard)
    assert isinstance(parse_card(CLASSIFIER), ModelCard)
    (tmp_path / "model.json").write_text(json.dumps(CARD))
    assert read_card(tmp_path) == parse_card(CARD)


def test_folder_without_card_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a model folder"):
        read_card(tmp_path)


def test_the_prompt_of_a_class_conditional_model_is_the_class_name():
    assert parse_card(CARD).prompt_of("bag") == "an image of a bag"
    told = parse_card({**CARD, "task": "class-conditional", "architecture": "UNet2DModel"})
    assert told.prompt_of("bag") == "bag"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"task": "video"}, "task"),
        ({"prompt": "a picture"}, "must hold {label}"),
        ({"classes": ["bag", "bag"]}, "occurs twice"),
        ({"classes": [], "task": "class-conditional"}, "needs classes"),
        ({"height": 5000}, "height"),
        ({"evaluation": {"guidance_scale": 0.5}}, "guidance_scale"),
        ({"evaluation": {"judges": "x"}}, "evaluation.judges: unknown key"),
    ],
)
def test_faults_are_named(change, fault):
    with pytest.raises(UsageError, match=fault):
        parse_card({**CARD, **change})


def test_evaluation_has_the_published_defaults():
    settings = DiffusionEvaluation()
    assert (settings.steps, settings.guidance_scale, settings.extractor) == (20, 3.0, "judge")
