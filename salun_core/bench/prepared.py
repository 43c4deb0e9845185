"""What all cells of a seed share, made once: image classifier, base model, forget target, reference, masks."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from salun_core.bench.plan import Cell, SuiteRun
from salun_core.bench.suite import (
    BaseModelSpec,
    JudgeSpec,
    RandomTarget,
    Request,
    Scenario,
    SequenceTarget,
    diffusion_example,
)
from salun_core.config import Document, load, read_document
from salun_core.data import DataSpec
from salun_core.data.split import SplitManifest
from salun_core.digest import digest_json, sha256_file
from salun_core.errors import SalunError, UsageError
from salun_core.methods.classification import FileCheckpoint
from salun_core.methods.recipe import Recipe
from salun_core.models.card import DiffusionCard, DiffusionEvaluation
from salun_core.models.checkpoint import CARD, SPLIT
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage.local_files import write_whole
from salun_core.tasks import open_inputs, parse_card, read_card, task_of
from salun_core.tasks.classification.training import train_model, training_config
from salun_core.tasks.run_facts import read_run_facts

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import EpochRecord
    from salun_core.methods.loop import OnEpoch


Plain = dict[str, Any]


def forget_files(
    scenario: Scenario, base: Path, out: Path, seed: int, data: str | None = None
) -> tuple[Path, tuple[Path, ...]]:
    """Write what is forgotten.

    Args:
        scenario: of the suite.
        base: folder of the model that is to forget.
        out: folder of the run.
        seed: of the draws.
        data: data set, where it does not lie where the model card says.

    Returns:
        The file of all that is forgotten, and the files of its requests, in order. A single request has one file.
    """
    whole = out / f"forget-{seed}.json"
    if not isinstance(scenario, SequenceTarget):
        _write(whole, _plain(scenario, base, (), seed))
        return whole, (whole,)
    targets: list[Plain] = []
    files = []
    for number, request in enumerate(scenario.steps, start=1):
        gone = open_inputs(base, str(whole), data).forget_set.samples if targets else ()
        targets.append(_plain(request, base, gone, [seed, number]))
        files.append(out / f"forget-{seed}-{number}.json")
        _write(files[-1], targets[-1])
        _write(whole, targets)
    return whole, tuple(files)


def _plain(request: Scenario | Request, base: Path, gone: Collection[str], seed: int | Sequence[int]) -> Plain:
    if isinstance(request, RandomTarget):
        split = load(SplitManifest, base / SPLIT).without(gone)
        return {"kind": "samples", "ids": drawn(split, request.fraction, seed)}
    return request.model_dump(mode="json", exclude_none=True)


def _write(path: Path, target: Plain | list[Plain]) -> None:
    data = (json.dumps(target, indent=1, sort_keys=True) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)


def drawn(split: SplitManifest, fraction: float, seed: int | Sequence[int]) -> list[str]:
    """Draw a share of the training split, at least one sample; the draw hangs on the rows' content, not on their names.

    Args:
        split: of the base model, or what earlier requests left of it.
        fraction: in (0, 1).
        seed: of the draw.

    Returns:
        Sample ids, sorted.
    """
    ids = split.ids("train")
    count = max(1, round(fraction * len(ids)))
    return sorted(ids[index] for index in np.random.default_rng(seed).permutation(len(ids))[:count])


def taken_over(source: Path, folder: Path, spec: DataSpec | None, prompt: str) -> None:
    """Make the base model of a bench out of a folder.

    The weights are linked where the file system can, not copied.

    Args:
        source: a model folder of either kind, or a plain diffusers folder.
        folder: where the base model goes.
        spec: the data of a plain diffusers folder.
        prompt: what it calls an image of a class.

    Raises:
        UsageError: there is no such folder.
    """
    if not source.is_dir():
        raise UsageError(f"there is no model folder {source}", "the suite names it", "put the model there, or a link")
    if not (source / CARD).is_file():
        from salun_core.tasks.diffusion.importing import import_diffusion

        import_diffusion(str(source), spec, folder, prompt)
        return
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def with_evaluation(folder: Path, evaluation: DiffusionEvaluation) -> None:
    """Set how the images of a model are judged, on its card alone; a classifier's card has no such part."""
    card = parse_card(read_document(folder / CARD), str(folder / CARD))
    if isinstance(card, DiffusionCard) and card.evaluation != evaluation:
        given = card.model_copy(update={"evaluation": evaluation})
        write_whole(folder / CARD, (given.model_dump_json(indent=1) + "\n").encode())


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


Progress = Callable[[str], None]


class SharedArtifact(Document):
    """`<part>.json` beside a part that is ready."""

    inputs: str = Field(description="digest of all that it hangs on")
    digest: str = Field(description="of its weights and its split")
    seconds: float = Field(description="that its training took")
    passes: int | None = Field(default=None, description="examples forward and backward, of a reference")


@dataclass(frozen=True)
class Ready:
    """What a cell needs.

    Args:
        base: folder of the model that is to forget.
        forget: file of all that is forgotten.
        requests: its file again; of a sequence one file a request, in order.
        reference: folder of the retrained model, if the suite asks for one.
        inputs: digests of all of it.
    """

    base: Path
    forget: Path
    requests: tuple[Path, ...]
    reference: Path | None
    inputs: dict[str, str]


class Preparation:
    """Makes the parts below an output folder; what is ready is not made again.

    Args:
        plan: the suite.
        out: the folder.
        say: called with a line of progress.
    """

    def __init__(self, plan: SuiteRun, out: Path, say: Progress) -> None:
        self.plan, self.out, self.say = plan, out, say

    def ready(self, seed: int) -> Ready:
        """Make whatever the cells of a seed share.

        Args:
            seed: of base model, draw and reference.
        """
        judge = self._judge()
        base, digest = self._base(seed, judge)
        forget, requests = forget_files(self.plan.size.forget, base, self.out, seed, self.plan.moved)
        inputs = {"base": digest, "forget": sha256_file(forget)}
        if judge:
            inputs["judge"] = judge[1]
        reference = self._reference(base, forget, seed, inputs)
        if reference:
            inputs["reference"] = reference[1]
        if len(requests) > 1:
            inputs["requests"] = digest_json([sha256_file(path) for path in requests])
        return Ready(base, forget, requests, reference[0] if reference else None, inputs)

    def mask(self, cell: Cell, ready: Ready) -> Path | None:
        """Return the mask of a cell; cells that differ in nothing that a mask hangs on share one file.

        Args:
            cell: it.
            ready: what the cells of its seed share.
        """
        entry = cell.entry
        if entry.mask == "none" or entry.density is None:
            return None
        hangs_on = [ready.inputs, self._drawing(), self._scoring(cell), entry.mask, entry.density, cell.seed]
        key = digest_json(hangs_on)
        path = self.out / "masks" / f"{entry.mask}-{entry.density:g}-{cell.seed}-{key[:12]}.safetensors"
        if path.is_file():
            SaliencyMask.load(path)
            return path
        self.say(f"mask {path.stem}")
        context = RunContext(ready.base, str(ready.forget), data=self.plan.moved)
        recipe = cell.recipe.model_copy(update={"method_config": cell.recipe.overrides})  # the seed is the scores' too
        compute_mask(context, recipe, path, cell.seed if entry.mask == "random" else None)
        return path

    def _drawing(self) -> dict[str, Any]:
        """Return how images are drawn: those of a concept are, and masks and references are made from them."""
        return self.plan.size.evaluation.model_dump(mode="json")

    def _scoring(self, cell: Cell) -> dict[str, Any]:
        """Return the settings that the scores of a diffusion model hang on."""
        if self.plan.suite.kind == "classification":
            return {}
        from salun_core.methods.diffusion import diffusion_config

        config = diffusion_config(cell.entry.method, cell.entry.config)
        return config.model_dump(
            mode="json", include={"selection", "saliency_passes", "saliency_times", "batch_size", "pseudo"}
        )

    def _part(self, name: str, inputs: Any, make: Callable[[Path, Path], None]) -> tuple[Path, str]:  # noqa: ANN401
        """Return folder and digest of a part; `make(folder, checkpoints)` makes it unless it is there."""
        folder, note, wanted = self.out / name, self.out / f"{name}.json", digest_json(inputs)
        if note.is_file() and (folder / CARD).is_file():
            kept = load(SharedArtifact, note)
            if kept.inputs == wanted and _as_it_was(folder, kept.digest):
                return folder, kept.digest
        note.unlink(missing_ok=True)
        self.say(f"{name}: making it")
        checkpoints = self.out / "unfinished" / f"{name}-{wanted[:16]}"
        started = time.perf_counter()
        make(folder, checkpoints)
        seconds = time.perf_counter() - started
        facts = read_run_facts(folder, "")
        seconds = facts.seconds.get("unlearn", seconds)
        part = SharedArtifact(inputs=wanted, digest=identity(folder), seconds=seconds, passes=facts.passes)
        write_whole(note, (json.dumps(part.model_dump(), indent=1) + "\n").encode())
        shutil.rmtree(checkpoints.parent, ignore_errors=True)
        return folder, part.digest

    def _judge(self) -> tuple[Path, str] | None:
        wish = self.plan.size.judge
        if wish is None or self.plan.suite.kind == "classification":
            return None
        if wish.folder is not None:
            folder = self.plan.path(wish.folder)
            return folder, identity(folder)
        return self._part("judge", [wish.model_dump(), self._data()], lambda *where: self._train(wish, 0, *where))

    def _data(self) -> dict[str, Any] | None:
        spec = self.plan.size.data
        return spec.model_dump(mode="json") if spec else None

    def _train(self, wish: JudgeSpec | BaseModelSpec, seed: int, folder: Path, checkpoints: Path) -> None:
        spec = self.plan.data
        if spec is None or wish.architecture is None:
            raise UsageError("nothing to train on", "the size names no data or no architecture", "add them")
        if isinstance(wish, JudgeSpec):
            seen = {"size": wish.size or spec.size, "channels": wish.channels or spec.channels}
            spec = spec.model_copy(update=seen)
        config = training_config({**wish.training, "seed": seed})
        kept = FileCheckpoint(checkpoints / "classifier.safetensors")
        train_model(spec, wish.architecture, config, folder, kept, self._progress(folder.name))

    def _progress(self, name: str) -> OnEpoch:
        def said(record: EpochRecord) -> None:
            losses = ", ".join(f"loss {part} {loss:.3f}" for part, loss in record.losses.items())
            self.say(f"{name}: epoch {record.epoch}, {losses}")

        return said

    def _base(self, seed: int, judge: tuple[Path, str] | None) -> tuple[Path, str]:
        plan, wish = self.plan, self.plan.size.model
        each = wish.per_seed and wish.folder is None
        used = seed if each else 0

        def make(folder: Path, checkpoints: Path) -> None:
            if wish.folder is not None:
                taken_over(plan.path(wish.folder), folder, plan.data, wish.prompt)
            elif plan.suite.kind == "classification":
                self._train(wish, used, folder, checkpoints)
            else:
                self._train_diffusion(wish, used, folder, checkpoints)

        inputs = [plan.suite.kind, wish.model_dump(), self._data(), used]
        folder, digest = self._part(f"base-{used}" if each else "base", inputs, make)
        settings = plan.size.evaluation
        places = {"judge": str(judge[0].resolve())} if judge else {}
        if settings.clip:
            places["clip"] = str(plan.path(settings.clip).resolve())
        if settings.extractor not in ("judge", "none"):
            places["extractor"] = str(plan.path(settings.extractor).resolve())
        with_evaluation(folder, settings.model_copy(update=places))
        return folder, digest

    def _train_diffusion(self, wish: BaseModelSpec, seed: int, folder: Path, checkpoints: Path) -> None:
        kind, settings = self.plan.suite.kind, {**wish.training, "seed": seed}
        if kind == "text-to-image":
            settings = {"prompt": wish.prompt, **settings}
        example, recipe = diffusion_example(kind, settings)
        example.train(self.plan.data, recipe, folder, None, checkpoints, self._progress(folder.name))

    def _reference(self, base: Path, forget: Path, seed: int, inputs: dict[str, str]) -> tuple[Path, str] | None:
        given = self.plan.size.retrain
        if given is None:
            return None
        own: dict[str, Any] = {}
        if self.plan.suite.kind == "classification":  # a diffusion model's recipe holds more than a training
            own = {name: value for name, value in read_card(base).training.items() if name != "seed"}
        overrides = {**own, **given}

        def make(folder: Path, _checkpoints: Path) -> None:  # never resumed: its seconds are in the table
            context = RunContext(base, str(forget), data=self.plan.moved)
            run_unlearning(context, Recipe(method="retrain", method_config=overrides, seed=seed), None, folder)

        return self._part(f"reference-{seed}", [inputs, self._drawing(), overrides, seed], make)


def identity(folder: Path) -> str:
    """Return what a model is: the digests of its weights and of its split."""
    model = task_of(folder).load(folder)
    return digest_json([model.digest, model.split.digest if model.split else None])


def _as_it_was(folder: Path, digest: str) -> bool:
    try:
        return identity(folder) == digest
    except SalunError:
        return False
