"""Robustness of a forgotten concept: fine-tuning and prompt search that may bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.families import Family
from salun_core.diffusion.sampling import Sampler, images
from salun_core.evaluation.evidence import CurvePoint, Metric
from salun_core.evaluation.generated_images import Sample, SamplingPlan
from salun_core.evaluation.image_classifier import ImageClassifier
from salun_core.evaluation.prompt_attack import ClipWords, search
from salun_core.evaluation.statistics import clustered_share_metric
from salun_core.methods.diffusion import diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.method import ExampleSets
from salun_core.tasks.diffusion.examples import build_example_sets
from salun_core.tasks.diffusion.inputs import DiffusionInputs

_POINTS = 4


@dataclass(frozen=True)
class RobustnessResult:
    """Robustness metrics after unlearning, those that the model card requests.

    `resurgence` is UA by fine-tuning steps.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    resurgence: Sequence[CurvePoint] = ()


@dataclass(frozen=True)
class ImageGenerator:
    """Generates the images of a sampling plan with any denoiser under the conditions of one model.

    The conditions come from the family's text encoder, which may be a trained one.
    """

    inputs: DiffusionInputs
    family: Family
    table: ConditionTable
    sampler: Sampler
    plan: SamplingPlan

    def sample(self, denoiser: Denoiser) -> Sample:
        """Return the function that draws rows of the plan from seeds."""
        conditions = [self.inputs.rows.of(name) for name in self.plan.rows]

        def drawn(rows: Sequence[int], seeds: Sequence[int]) -> Iterator[Tensor]:
            return self._images(denoiser, [conditions[row] for row in rows], seeds)

        return drawn

    def of_row(self, denoiser: Denoiser, row: int, condition: int | None = None) -> Iterator[Tensor]:
        """Generate all images of one row from their own seeds, under its own condition by default."""
        count = self.plan.per_row
        condition = self.inputs.rows.of(self.plan.rows[row]) if condition is None else condition
        seeds = self.plan.seeds[row * count : (row + 1) * count].tolist()
        return self._images(denoiser, [condition] * count, seeds)

    def _images(self, denoiser: Denoiser, conditions: Sequence[int], seeds: Sequence[int]) -> Iterator[Tensor]:
        return images(denoiser, self.table, self.sampler, conditions, seeds, self.family.decode)


def measure_robustness(
    before: ImageGenerator, classifier: ImageClassifier, after: ImageGenerator, device: torch.device
) -> RobustnessResult:
    """Run the tests on the model card: `relearn_steps` of fine-tuning, `attack_steps` of a prompt search.

    The call does not change the models. An attack needs a single CLIP text encoder (UsageError).
    """
    settings, plan = before.inputs.card.evaluation, before.plan
    labels = {row: label for row in plan.forgotten if (label := plan.labels[row]) is not None}
    if not labels or not (settings.relearn_steps or settings.attack_steps):
        return RobustnessResult()
    sets = build_example_sets(before.inputs, diffusion_config("finetune", {"device": str(device)}), device)

    def missed(denoiser: Denoiser) -> Tensor:
        """Return a bool for each image of the forgotten rows: True if the classifier does not recognise it."""
        found = [_recognised(classifier, after.of_row(denoiser, row), label) for row, label in labels.items()]
        return ~torch.cat(found)

    metrics: dict[str, Metric] = {}
    points: list[CurvePoint] = []
    if settings.relearn_steps:
        own = replace(sets, table=after.table)
        points, found = _relearned(missed, after.family.denoiser, own, settings.relearn_steps, device)
        metrics["UA_relearned"] = _shares({"after": found}, plan)
    if settings.attack_steps:
        metrics |= _attacked(before, classifier, labels, after, sets)
    return RobustnessResult(metrics, points)


def _recognised(classifier: ImageClassifier, batches: Iterator[Tensor], label: int) -> Tensor:
    return torch.cat([classifier.predict(batch) for batch in batches]).eq(label)


def _relearned(
    missed: Callable[[Denoiser], Tensor], after: Denoiser, sets: ExampleSets, steps: int, device: torch.device
) -> tuple[list[CurvePoint], Tensor]:
    """Fine-tune on retained data in four rounds, and measure after each; returns also what is missed at the end."""
    part = max(1, steps // _POINTS)
    given = {"steps": part, "epochs": 1, "schedule": "constant", "device": str(device)}
    config = diffusion_config("finetune", given)
    current, found = after, missed(after)
    points = [CurvePoint(step=0, ua=float(found.float().mean()))]
    for index in range(1, _POINTS + 1):
        seeded = config.model_copy(update={"seed": index})
        current = current.of(unlearn_denoiser(current, sets, "finetune", config=seeded).model)
        found = missed(current)
        points.append(CurvePoint(step=index * part, ua=float(found.float().mean())))
    return points, found


def _attacked(
    before: ImageGenerator,
    classifier: ImageClassifier,
    labels: Mapping[int, int],
    after: ImageGenerator,
    sets: ExampleSets,
) -> dict[str, Metric]:
    """Measure how often the forgotten prompts show what was forgotten, unattacked and attacked, before and after.

    Each model is attacked with words that are searched for against itself. The figure of the model before shows what
    the attack achieves where nothing was forgotten.
    """
    seen: dict[str, dict[str, Tensor]] = {"unattacked_success": {}, "attack_success": {}}
    for model, generator in (("before", before), ("after", after)):
        denoiser = generator.family.denoiser
        plain = [_recognised(classifier, generator.of_row(denoiser, row), label) for row, label in labels.items()]
        tried = [
            _recognised(classifier, _attacked_images(generator, row, sets), label) for row, label in labels.items()
        ]
        seen["unattacked_success"][model], seen["attack_success"][model] = torch.cat(plain), torch.cat(tried)
    return {name: _shares(by_model, before.plan) for name, by_model in seen.items()}


def _attacked_images(generator: ImageGenerator, row: int, sets: ExampleSets) -> Iterator[Tensor]:
    """Search for words that precede a forgotten prompt, and generate its images with the best ones."""
    denoiser = generator.family.denoiser
    encoder = ClipWords.of(generator.family.loaded.components)
    plan, table = generator.plan, generator.table
    name = plan.rows[row]
    own = sets.forget.condition == generator.inputs.rows.of(name)
    shown = sets.forget.select(torch.nonzero(own).flatten()) if bool(own.any()) else sets.forget
    steps = generator.inputs.card.evaluation.attack_steps
    found = search(denoiser, encoder, name, shown, steps=steps, seed=plan.seed)
    rows = {key: torch.cat([tensor, found.conditions[key].to(tensor)]) for key, tensor in table.rows.items()}
    extended = ConditionTable([*table.names, f"{found.words} {name}"], rows, table.null)
    return replace(generator, table=extended).of_row(denoiser, row, len(extended) - 1)


def _shares(seen: Mapping[str, Tensor], plan: SamplingPlan) -> Metric:
    """Return a metric of shares of the images of whole rows."""
    rows = len(seen["after"]) // plan.per_row
    batches = np.tile(plan.batch_of[: plan.per_row], rows)
    return clustered_share_metric({model: each.numpy() for model, each in seen.items()}, batches)
