"""A method is one file: this one has settings, a loss and a row, and nothing else names it but the table."""

import json
from collections.abc import Sequence

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from typer.testing import CliRunner

from salun_core.cli.app import app
from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, method_config
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, classification_loss
from salun_core.methods.config import DrawingConfig
from salun_core.methods.loop import Phase
from salun_core.models.checkpoint import model_digest
from salun_core.steps.context import method_label
from salun_core.telemetry.metrics import check_label
from salun_core.tuning.space import Space
from tests.support.by_hand import image_set, net, run


class ToyConfig(DrawingConfig):
    """Fine-tuning with a factor."""

    factor: float = Field(default=0.5, gt=0, description="of the loss")


def phases(context: ClassifierContext[ToyConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_r with its loss times the factor."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return context.config.factor * classification_loss(model, images, labels)

    return [context.phase("retain", context.retain, loss)]


METHOD = ClassifierMethod(
    phases,
    config_type=ToyConfig,
    about="trains on D_r by half",
    source="this test",
    defaults={"epochs": 2},
    search={"factor": (0.1, 1.0, True)},
    grows=True,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", METHOD)


def test_it_is_listed_and_has_a_label():
    listed = CliRunner().invoke(app, ["ls", "methods", "--json"])
    (row,) = [row for row in json.loads(listed.stdout) if row["method"] == "toy"]
    assert (row["about"], row["length"], row["default"]) == ("trains on D_r by half", "2 epochs", False)
    assert method_label("toy") == "toy"
    check_label("method", method_label("toy"))
    assert method_label("another") == "other"


def test_it_has_its_own_settings_and_search_space():
    space = Space.of("toy", {})
    assert space.ranges["factor"] == (0.1, 1.0, True)
    assert (space.growing, set(space.choices)) == (True, {"batch_norm"})
    assert method_config("toy", {"factor": 2.0}).factor == 2.0
    with pytest.raises(UsageError, match="factr: unknown key, did you mean 'factor'.*the settings of toy are augment"):
        method_config("toy", {"factr": 2.0})
    with pytest.raises(UsageError, match="factor: unknown key"):
        method_config("finetune", {"factor": 2.0})


def test_it_is_run():
    whole, half = (run(name, net(), image_set(9, 1), image_set(20, 2), batch_size=8) for name in ("finetune", "toy"))
    assert half.config == ToyConfig(**half.config.model_dump())
    assert model_digest(half.model) != model_digest(whole.model)
    assert half.history[0].losses["retain"] < whole.history[0].losses["retain"]
