"""What all cells of a seed share, built once: image classifier, base model, forget target, reference, masks."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field

from lab.bench.plan import REFERENCE_KIND, Cell, SuiteRun
from lab.bench.suite import (
    BaseModelSpec,
    JudgeSpec,
    RandomTarget,
    Request,
    Scenario,
    SequenceTarget,
    diffusion_example,
)
from salun_core.config import Document, load
from salun_core.data import DataSpec
from salun_core.data.split import SplitManifest, read_split
from salun_core.digest import digest_json, sha256_file
from salun_core.errors import SalunError, UsageError
from salun_core.evaluation import Evidence
from salun_core.methods.classification import FileCheckpoint
from salun_core.methods.method import resolve_config
from salun_core.methods.recipe import Recipe
from salun_core.models.card import DiffusionCard, DiffusionEvaluation
from salun_core.models.checkpoint import CARD
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage.local_files import write_whole
from salun_core.tasks import open_inputs, read_card, task_named, task_of
from salun_core.tasks.classification.training import train_model, training_config
from salun_core.tasks.run_facts import read_run_facts

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import EpochRecord
    from salun_core.methods.loop import OnEpoch

Plain = dict[str, Any]
Progress = Callable[[str], None]
EVIDENCE, REPORT = "evidence.json", "report.html"
_REFERENCE_STEP = 2_000_003  # between the seeds of a seed's references; larger than the seeds of a suite
_SCORING = {"selection", "saliency_passes", "saliency_times", "batch_size", "pseudo"}


def forget_files(
    scenario: Scenario, base: Path, out: Path, seed: int, data: str | None = None
) -> tuple[Path, tuple[Path, ...]]:
    """Write the forget targets; returns the file of all of them, and the files of the requests, in order.

    A single request has one file. `seed` is that of the draws.
    """
    whole = out / f"forget-{seed}.json"
    if not isinstance(scenario, SequenceTarget):
        _write(whole, _target(scenario, base, (), seed))
        return whole, (whole,)
    targets: list[Plain] = []
    files = []
    for number, request in enumerate(scenario.steps, start=1):
        gone = open_inputs(base, str(whole), data).forget_set.samples if targets else ()
        targets.append(_target(request, base, gone, [seed, number]))
        files.append(out / f"forget-{seed}-{number}.json")
        _write(files[-1], targets[-1])
        _write(whole, targets)
    return whole, tuple(files)


def _target(request: Scenario | Request, base: Path, gone: Collection[str], seed: int | Sequence[int]) -> Plain:
    if isinstance(request, RandomTarget):
        split = read_split(base).without(gone)
        return {"kind": "samples", "ids": drawn(split, request.fraction, seed)}
    return request.model_dump(mode="json", exclude_none=True)


def _write(path: Path, document: Plain | list[Plain]) -> None:
    """Write JSON unless the file has these bytes already: resumed runs leave it as it is."""
    data = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)


def drawn(split: SplitManifest, fraction: float, seed: int | Sequence[int]) -> list[str]:
    """Draw a share of the training split, at least one sample; returns sorted ids.

    `split` is the base model's, or what earlier requests left of it. The draw depends on the rows' content, not on
    their names.
    """
    ids = split.ids("train")
    count = max(1, round(fraction * len(ids)))
    return sorted(ids[index] for index in np.random.default_rng(seed).permutation(len(ids))[:count])


def adopt_model(source: Path, folder: Path, spec: DataSpec | None, prompt: str) -> None:
    """Make a folder of any task, or a plain diffusers folder, the base model of a bench.

    Weights are linked if the file system can, else copied. `spec` and `prompt` (of an image of a class) are for a plain
    diffusers folder.
    """
    if not source.is_dir():
        raise UsageError(
            f"there is no model folder {source}", "the suite names it", "put the model there, or a link to it"
        )
    if not (source / CARD).is_file():
        from salun_core.tasks.diffusion.importing import import_diffusion

        import_diffusion(str(source), spec, folder, prompt)
        return
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def set_evaluation(folder: Path, evaluation: DiffusionEvaluation) -> None:
    """Set how the images of a model are evaluated, on its card; a classifier's card has no such part."""
    card = read_card(folder)
    if isinstance(card, DiffusionCard) and card.evaluation != evaluation:
        changed = card.model_copy(update={"evaluation": evaluation})
        write_whole(folder / CARD, (changed.model_dump_json(indent=1) + "\n").encode())


class SharedArtifact(Document):
    """`<artifact>.json` next to the folder of a finished artifact."""

    inputs: str = Field(description="digest of everything that it depends on")
    digest: str = Field(description="of its weights and its split")
    seconds: float = Field(description="duration of its training")
    passes: int | None = Field(default=None, description="examples forward and backward, of a reference")
    evidence: str | None = Field(default=None, description="SHA-256 of its evidence, of a further reference")


class Built(NamedTuple):
    """A model folder and its digest."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Ready:
    """The inputs of a seed's cells, and digests of all of them.

    `requests` is the file of all targets; of a sequence, one file per request, in order. `reference` is the first
    retrained model, if the suite requests one.
    """

    base: Path
    forget: Path
    requests: tuple[Path, ...]
    reference: Path | None
    inputs: dict[str, str]


class Preparation:
    """Builds the artifacts in an output folder; finished ones are not built again.

    The note of an artifact is deleted before it is built and written after it, so that a killed run never leaves a note
    without its artifact. Unfinished trainings keep their checkpoints and resume, except references.
    """

    def __init__(self, plan: SuiteRun, out: Path, progress: Progress) -> None:
        self.plan, self.out, self.progress = plan, out, progress
        spec = plan.size.data
        self._data = spec.model_dump(mode="json") if spec else None
        # Images of a concept are generated, and masks and references depend on them.
        self._sampling = plan.size.evaluation.model_dump(mode="json")

    def ready(self, seed: int) -> Ready:
        """Build everything that the cells of a seed share: base model, draw and references."""
        classifier = self._image_classifier()
        base = self._base(seed, classifier)
        forget, requests = forget_files(self.plan.size.forget, base.folder, self.out, seed, self.plan.data_override)
        inputs = {"base": base.digest, "forget": sha256_file(forget)}
        if classifier:
            inputs["judge"] = classifier.digest
        reference = self._reference(base.folder, forget, seed, inputs)
        if reference:
            inputs["reference"] = reference.digest
            for number in range(1, self.plan.size.references):
                self._reference(base.folder, forget, seed, inputs, number, reference.folder)
        if len(requests) > 1:
            inputs["requests"] = digest_json([sha256_file(path) for path in requests])
        return Ready(base.folder, forget, requests, reference.folder if reference else None, inputs)

    def mask(self, cell: Cell, ready: Ready) -> Path | None:
        """Return the mask of a cell; cells with the same inputs of the mask share one file."""
        entry = cell.entry
        if entry.mask == "none" or entry.density is None:
            return None
        scoring: Plain = {}
        if self.plan.suite.kind != "classification":  # a classifier's scores have no settings
            config = resolve_config(task_named(self.plan.suite.kind).methods, entry.method, entry.config)
            scoring = config.model_dump(mode="json", include=_SCORING)
        key = digest_json([ready.inputs, self._sampling, scoring, entry.mask, entry.density, cell.seed])
        path = self.out / "masks" / f"{entry.mask}-{entry.density:g}-{cell.seed}-{key[:12]}.safetensors"
        if path.is_file():
            SaliencyMask.load(path)
            return path
        self.progress(f"mask {path.stem}")
        context = RunContext(ready.base, str(ready.forget), data=self.plan.data_override)
        recipe = cell.recipe.model_copy(
            update={"method_config": cell.recipe.overrides}
        )  # the scores have the same seed
        compute_mask(context, recipe, path, cell.seed if entry.mask == "random" else None)
        return path

    def _build(self, name: str, inputs: Any, train: Callable[[Path, Path], None]) -> Built:  # noqa: ANN401
        """Return an artifact; `train(folder, checkpoints)` makes it unless it is finished and undamaged."""
        folder, note, wanted = self.out / name, self.out / f"{name}.json", digest_json(inputs)
        if note.is_file() and (folder / CARD).is_file():
            known = load(SharedArtifact, note)
            with suppress(SalunError):  # a damaged model is built again
                unchanged = identity(folder) == known.digest and _evidence_digest(folder) == known.evidence
                if known.inputs == wanted and unchanged:
                    return Built(folder, known.digest)
        note.unlink(missing_ok=True)
        self.progress(f"{name}: building it")
        checkpoints = self.out / "unfinished" / f"{name}-{wanted[:16]}"
        started = time.perf_counter()
        train(folder, checkpoints)
        seconds, facts = time.perf_counter() - started, read_run_facts(folder, "")
        built = Built(folder, identity(folder))
        seconds = facts.seconds.get("unlearn", seconds)
        document = SharedArtifact(
            inputs=wanted,
            digest=built.digest,
            seconds=seconds,
            passes=facts.passes,
            evidence=_evidence_digest(folder),
        )
        write_whole(note, (json.dumps(document.model_dump(), indent=1) + "\n").encode())
        shutil.rmtree(checkpoints.parent, ignore_errors=True)
        return built

    def _image_classifier(self) -> Built | None:
        spec = self.plan.size.judge
        if spec is None or self.plan.suite.kind == "classification":
            return None
        if spec.folder is not None:
            folder = self.plan.path(spec.folder)
            return Built(folder, identity(folder))
        return self._build("judge", [spec.model_dump(), self._data], lambda *paths: self._train(spec, 0, *paths))

    def _base(self, seed: int, classifier: Built | None) -> Built:
        plan, spec = self.plan, self.plan.size.model
        per_seed = spec.per_seed and spec.folder is None
        used = seed if per_seed else 0

        def train(folder: Path, checkpoints: Path) -> None:
            if spec.folder is not None:
                adopt_model(plan.path(spec.folder), folder, plan.data, spec.prompt)
            elif plan.suite.kind == "classification":
                self._train(spec, used, folder, checkpoints)
            else:
                prompt = {"prompt": spec.prompt} if plan.suite.kind == "text-to-image" else {}
                example, recipe = diffusion_example(plan.suite.kind, {**prompt, **spec.training, "seed": used})
                example.train(plan.data, recipe, folder, None, checkpoints, self._on_epoch(folder.name))

        inputs = [plan.suite.kind, spec.model_dump(), self._data, used]
        base = self._build(f"base-{used}" if per_seed else "base", inputs, train)
        settings = plan.size.evaluation
        paths = {"judge": str(classifier.folder.resolve())} if classifier else {}
        if settings.clip:
            paths["clip"] = str(plan.path(settings.clip).resolve())
        if settings.extractor not in ("judge", "none"):
            paths["extractor"] = str(plan.path(settings.extractor).resolve())
        set_evaluation(base.folder, settings.model_copy(update=paths))
        return base

    def _train(self, spec: JudgeSpec | BaseModelSpec, seed: int, folder: Path, checkpoints: Path) -> None:
        data = self.plan.data
        if data is None or spec.architecture is None:
            raise UsageError("nothing to train on", "the size names no data or no architecture", "add them")
        if isinstance(spec, JudgeSpec):
            data = data.model_copy(update={"size": spec.size or data.size, "channels": spec.channels or data.channels})
        config = training_config({**spec.training, "seed": seed})
        checkpoint = FileCheckpoint(checkpoints / "classifier.safetensors")
        train_model(data, spec.architecture, config, folder, checkpoint, self._on_epoch(folder.name))

    def _on_epoch(self, name: str) -> OnEpoch:
        def show(record: EpochRecord) -> None:
            losses = ", ".join(f"loss {phase} {loss:.3f}" for phase, loss in record.losses.items())
            self.progress(f"{name}: epoch {record.epoch}, {losses}")

        return show

    def _reference(
        self,
        base: Path,
        forget: Path,
        seed: int,
        inputs: dict[str, str],
        number: int = 0,
        first: Path | None = None,
    ) -> Built | None:
        """Return a retrained model, if the suite requests one; `number` counts the references from 0.

        Cells are evaluated against number 0 (`first`), and so are the other references, for the floor of the table.
        `forget` has all targets; `inputs` are digests of what the model depends on.
        """
        overrides = self.plan.size.retrain
        if overrides is None:
            return None
        if self.plan.suite.kind == "classification":  # a diffusion model's recipe has more than the training
            card = {name: value for name, value in read_card(base).training.items() if name != "seed"}
            overrides = {**card, **overrides}
        own_seed = (seed + number * _REFERENCE_STEP) % 2**53
        recipe = Recipe(method="retrain", method_config=overrides, seed=own_seed)

        def train(folder: Path, _checkpoints: Path) -> None:  # never resumed, because the table shows its duration
            context = RunContext(base, str(forget), data=self.plan.data_override)
            run_unlearning(context, recipe, None, folder)
            if first is not None:  # before the note is written: a finished reference has its evidence
                evaluate(context, folder, folder / EVIDENCE, folder / REPORT, reference=first)

        depends_on = [REFERENCE_KIND, inputs, self._sampling, overrides, own_seed]
        return self._build(reference_name(seed, number), depends_on, train)


def reference_name(seed: int, number: int) -> str:
    """Return the name of a reference's folder and note; number 0 is the one that cells are evaluated against."""
    return f"reference-{seed}-{number}" if number else f"reference-{seed}"


def further_reference(out: Path, seed: int, number: int) -> tuple[SharedArtifact, Evidence] | None:
    """Return note and evidence of a further reference; None if it is missing, unfinished or changed."""
    name = reference_name(seed, number)
    try:
        note = load(SharedArtifact, out / f"{name}.json")
        evidence = load(Evidence, out / name / EVIDENCE)
    except UsageError:
        return None
    return (note, evidence) if _evidence_digest(out / name) == note.evidence else None


def _evidence_digest(folder: Path) -> str | None:
    path = folder / EVIDENCE
    return sha256_file(path) if path.is_file() else None


def identity(folder: Path) -> str:
    """Return the digest of a model's weights and split."""
    model = task_of(folder).load(folder)
    return digest_json([model.digest, model.split.digest if model.split else None])
