"""What comes after unlearning: benign fine-tuning that may bring it back, and prompts that ask for it in disguise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.families import Family
from salun_core.diffusion.sampling import Sampler, images
from salun_core.evaluation.evidence import CurvePoint, Metric
from salun_core.evaluation.generated_images import SamplingPlan
from salun_core.evaluation.image_classifier import ImageClassifier
from salun_core.evaluation.prompt_attack import ClipWords, search
from salun_core.evaluation.statistics import share_metric
from salun_core.methods.diffusion import diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.method import ExampleSets
from salun_core.tasks.diffusion.examples import build_example_sets
from salun_core.tasks.diffusion.inputs import DiffusionInputs

_POINTS = 4


@dataclass(frozen=True)
class RobustnessResult:
    """What was measured after the unlearning.

    Args:
        metrics: UA_relearned, attack_success; those that the model card asks for.
        resurgence: UA against steps of fine-tuning.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    resurgence: Sequence[CurvePoint] = ()


@dataclass(frozen=True)
class Studio:
    """What images of the forgotten rows are drawn and recognised with.

    Args:
        inputs: data and settings.
        family: of the model before; its encoders and decoder are those of the model after.
        table: conditions of the run.
        sampler: how images are drawn.
        plan: rows and seeds.
        judge: recognises the rows.
    """

    inputs: DiffusionInputs
    family: Family
    table: ConditionTable
    sampler: Sampler
    plan: SamplingPlan
    judge: ImageClassifier

    @property
    def rows(self) -> list[int]:
        """The plan's forgotten rows that the judge has a class for."""
        return [row for row in self.plan.forgotten if self.plan.labels[row] is not None]

    def recognised(self, denoiser: Denoiser, row: int, told: Tensor | None = None) -> Tensor:
        """Draw a row's images and say of each whether the judge recognises it, bool [per_row].

        Args:
            denoiser: draws them.
            row: of the plan.
            told: row of the table to draw by; the plan's own by default.
        """
        count = self.plan.per_row
        at = self.inputs.rows.of(self.plan.rows[row]) if told is None else int(told)
        seeds = [self.plan.seed + row * count + index for index in range(count)]
        drawn = images(denoiser, self.table, self.sampler, [at] * count, seeds, self.family.decode)
        label = self.plan.labels[row]
        assert label is not None
        return torch.cat([self.judge.predict(batch) for batch in drawn]).eq(label)


def aftermath(studio: Studio, after: Denoiser, device: torch.device) -> RobustnessResult:
    """Do what the model card asks for: `relearn_steps` of fine-tuning, `attack_steps` of a search for prompts.

    Args:
        studio: draws and recognises.
        after: the denoiser after unlearning; it is not changed.
        device: to compute on.

    Raises:
        UsageError: an attack on a model that is not told by one CLIP text encoder.
    """
    settings = studio.inputs.card.evaluation
    if not studio.rows or not (settings.relearn_steps or settings.attack_steps):
        return RobustnessResult()
    sets = build_example_sets(studio.inputs, diffusion_config("finetune", {"device": str(device)}), device)
    metrics: dict[str, Metric] = {}
    points: list[CurvePoint] = []
    if settings.relearn_steps:
        points, metrics["UA_relearned"] = _relearned(studio, after, sets, settings.relearn_steps, device)
    if settings.attack_steps:
        metrics["attack_success"] = _attacked(studio, after, sets, settings.attack_steps)
    return RobustnessResult(metrics, points)


def _relearned(
    studio: Studio, after: Denoiser, sets: ExampleSets, steps: int, device: torch.device
) -> tuple[list[CurvePoint], Metric]:
    """Fine-tune on what was kept, a quarter of the steps at a time, and look each time."""
    stretch = max(1, steps // _POINTS)
    given = {"steps": stretch, "epochs": 1, "schedule": "constant", "device": str(device)}
    config = diffusion_config("finetune", given)
    current, points, missed = after, list[CurvePoint](), _missed(studio, after)
    points.append(CurvePoint(step=0, ua=float(missed.float().mean())))
    for index in range(1, _POINTS + 1):
        seeded = config.model_copy(update={"seed": index})
        current = current.of(unlearn_denoiser(current, sets, "finetune", config=seeded).model)
        missed = _missed(studio, current)
        points.append(CurvePoint(step=index * stretch, ua=float(missed.float().mean())))
    return points, _share(missed)


def _missed(studio: Studio, denoiser: Denoiser) -> Tensor:
    return ~torch.cat([studio.recognised(denoiser, row) for row in studio.rows])


def _attacked(studio: Studio, after: Denoiser, sets: ExampleSets, steps: int) -> Metric:
    """Search for words before each forgotten prompt, and draw with the best of them."""
    encoder = ClipWords.of(studio.family.loaded.components)
    hits = []
    for row in studio.rows:
        name = studio.plan.rows[row]
        own = sets.forget.condition == studio.inputs.rows.of(name)
        shown = sets.forget.select(torch.nonzero(own).flatten()) if bool(own.any()) else sets.forget
        found = search(after, encoder, name, shown, steps=steps, seed=studio.plan.seed)
        rows = {key: torch.cat([tensor, found.conditions[key].to(tensor)]) for key, tensor in studio.table.rows.items()}
        table = ConditionTable([*studio.table.names, f"{found.words} {name}"], rows, studio.table.null)
        hits.append(replace(studio, table=table).recognised(after, row, torch.tensor(len(table) - 1)))
    return _share(torch.cat(hits))


def _share(seen: Tensor) -> Metric:
    return share_metric({"after": float(seen.float().mean())}, len(seen))
