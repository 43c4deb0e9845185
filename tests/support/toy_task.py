"""A third task, as a plug-in would bring it: a linear autoencoder that forgets how to reconstruct a class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from salun_core.data import LoadedData, load_data
from salun_core.data.split import SPLIT, SplitManifest, read_split
from salun_core.digest import sha256_file
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.integrity import compare_weights
from salun_core.methods.config import LoopConfig
from salun_core.methods.loop import Phase, Step, run_loop
from salun_core.methods.method import Method, UnlearnResult
from salun_core.methods.recipe import Escalation, Recipe
from salun_core.models.card import CARD, Card, load_card
from salun_core.models.checkpoint import WEIGHTS, load_weights, read_weights, weights_bytes, write_folder
from salun_core.saliency import saliency_scores
from salun_core.tasks.reference import reference_model
from salun_core.tasks.task import Inputs, Scores

WIDTH = 8  # of the code, for the 64 pixels of a digit


class ToyCard(Card):
    """`model.json` of a toy."""

    task: Literal["toy"] = "toy"
    architecture: str = "linear autoencoder"


class ToyModel:
    """A toy that was read from its folder."""

    def __init__(self, folder: Path, split: SplitManifest | None = None) -> None:
        self.card, self.split = load_card(ToyCard, folder), split or read_split(folder)
        self.network = autoencoder(0)
        load_weights(self.network, read_weights(folder / WEIGHTS))
        self.digest = sha256_file(folder / WEIGHTS)


def autoencoder(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.Linear(WIDTH, 64))


def pixels(data: LoadedData, ids: Sequence[str]) -> torch.Tensor:
    return data.pixels(ids).flatten(1).float() / 255


def squared_error(network: nn.Module, images: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    return sign * nn.functional.mse_loss(network(images), images)


def phase(name: str, images: torch.Tensor, sign: float = 1.0) -> Phase:
    def draw(generator: torch.Generator, group: object) -> Iterator[Step]:
        yield Step(lambda network: squared_error(network, images, sign), len(images), 1.0)

    return Phase(name, images.device, len(images), 1, draw)


def train_toy(folder: Path, spec) -> None:
    data, network = load_data(spec), autoencoder(1)
    train = pixels(data, data.split.ids("train"))
    config = LoopConfig(epochs=200, learning_rate=0.01, optimizer="adam")
    run_loop(network, lambda *_: [phase("train", train)], config)
    digests = {"dataset_digest": data.split.dataset_digest, "split_digest": data.split.digest}
    card = ToyCard(classes=list(data.table.classes), channels=1, height=8, width=8, data=data.spec, **digests)
    write(folder, network, card, data.split, {})


def write(folder: Path, network: nn.Module, card: Card, split: SplitManifest, extra: Mapping[str, bytes]) -> None:
    documents = {CARD: card.model_dump_json().encode(), SPLIT: split.write}
    write_folder(folder, {**extra, WEIGHTS: weights_bytes(network), **documents})


class ToyTask:
    """One row of `TASKS`."""

    name = "toy"
    description = "toy autoencoder"
    card_tasks = ("toy",)
    card_type = ToyCard
    methods = {name: Method(config_type=LoopConfig, needs_mask=name == "ascent") for name in ("ascent", "retrain")}
    default_method = "ascent"
    optional_metrics = False
    excerpts = False
    load = staticmethod(ToyModel)
    inputs = staticmethod(Inputs)

    def check_targets(self, targets):
        if any(target.kind == "concept" for target in targets):
            raise UsageError("a toy knows no concepts", "it has no prompts", "name a class")

    def selected(self, inputs, config):
        return [name for name, _ in inputs.original.network.named_parameters()]

    def sets(self, inputs):
        kept = inputs.kept_split.ids("train")
        return pixels(inputs.data, inputs.forget_set.samples), pixels(inputs.data, kept)

    def score(self, inputs, config, device, group):
        forget, _ = self.sets(inputs)
        return Scores(saliency_scores(inputs.original.network, [(forget, forget)], nn.functional.mse_loss), {})

    def unlearn(self, inputs, method, config, mask=None, checkpoint=None, on_epoch=None, group=None):
        self.methods[method].check_mask(method, mask)
        forget, retain = self.sets(inputs)
        network = autoencoder(2)
        phases = [phase("retain", retain)]
        if method == "ascent":
            network.load_state_dict(inputs.original.network.state_dict())
            phases.insert(0, phase("forget", forget, -1.0))
        history = run_loop(network, lambda *_: phases, config, mask, checkpoint, "toy", on_epoch)
        return UnlearnResult(network, method, config, history, 0.1, config.epochs * (len(forget) + len(retain)))

    def check_tuning(self, method, overrides):
        raise UsageError("a toy is not tuned", "it is a toy", "leave out the tuning")

    tune = check_tuning

    def retrain_config(self, card, device):
        return LoopConfig(epochs=100, learning_rate=0.01, optimizer="adam")

    def evaluate(self, inputs, candidate, options):
        reference, facts = reference_model(self, inputs, options, candidate.facts)
        before, after = inputs.original.network, candidate.model.network
        forget, retain = self.sets(inputs)
        networks = {"before": before, "after": after, "reference": reference}
        metrics = {}
        for name, images in (("UA", forget), ("RA", retain)):
            lost = {state: self.lost(network, images) for state, network in networks.items() if network}
            shares = lost if name == "UA" else {state: 1 - share for state, share in lost.items()}
            metrics[name] = Metric(**shares, n=len(images))
        return Evidence(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            measured=inputs.measured(candidate, reference),
            forgotten=inputs.forgotten(),
            integrity=compare_weights(before, after, candidate.mask),
            metrics=metrics,
            run=facts,
        )

    @staticmethod
    @torch.no_grad()
    def lost(network, images, limit=0.06):
        """Share of the images that the network does not reconstruct."""
        return float((network(images) - images).square().mean(dim=1).gt(limit).float().mean())

    def save(self, folder, inputs, result, extra_files):
        write(folder, result.model, inputs.child_card(result.method), inputs.kept_split, extra_files)

    def version_files(self, folder):
        return {name: folder / name for name in (WEIGHTS, CARD, SPLIT)}

    def escalation(self, recipe, *, tune=False):
        return Escalation(recipes=[recipe, Recipe(method="retrain", density=1.0, seed=recipe.seed)])
