"""What an audit measures, from model folders or weights with images: outputs, and the models for the restoration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from salun_core.audit.predictions import NAME_CHARACTERS, Audited, checked_shadows, digests_of, read_ids, same_model
from salun_core.data import ImageSource, load_spec
from salun_core.data.targets import Target
from salun_core.digest import sha256_file
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation.classifier import restored_metric
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.likelihood_ratio import Shadows, logit_scaled
from salun_core.evaluation.optional_metrics import BATCH, LEARNING_RATE, MOMENTUM, halves
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.methods.config import pick_device
from salun_core.models import LoadedModel
from salun_core.models.card import CARD
from salun_core.models.importing import is_checkpoint_name
from salun_core.storage.local_files import list_tree
from salun_core.tasks import inputs_of, task_of
from salun_core.tasks.classification import ClassificationTask
from salun_core.tasks.classification.inputs import ClassifierInputs
from salun_core.tasks.classification.training import import_model
from salun_core.tasks.reference import check_reference
from salun_core.tasks.resolve import read_forget

STEPS = 20  # of relearning: a model that only hides what it knows needs fewer


@dataclass(frozen=True)
class Networks:
    """The models before and after with their images, for tests that predictions cannot make.

    `forget` is in the order of its outputs; `after` is on the device of `before`.
    """

    before: nn.Module
    after: nn.Module
    forget: ImageSource
    retain: ImageSource
    unseen: ImageSource

    def restored(self, rows: np.ndarray) -> Metric:
        """Return the share of samples that the last layer of the model before recognises; see `restored_metric`.

        `rows` are places in D_f of the samples of classes that were forgotten as a whole.
        """
        return restored_metric(
            {"before": self.before, "after": self.after}, self.forget.select(rows.tolist()), self.retain
        )

    def relearned(self, rows: np.ndarray, seed: int) -> tuple[Outputs, Outputs]:
        """Train a copy of the model after on one half of some samples, as `optional_metrics.relearn` does.

        `rows` are at least two places in D_f. Returns the copy's outputs on the other half, and on held-out images.
        """
        learned, other = halves(self.forget.select(rows.tolist()), seed)
        learner = copy.deepcopy(self.after).requires_grad_(True).eval()
        optimizer = torch.optim.SGD(learner.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        generator = torch.Generator().manual_seed(seed)
        batches = (batch for _ in count() for batch in learned.batches(BATCH, generator))
        for images, labels in islice(batches, STEPS):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(learner(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return outputs_of(learner, other), outputs_of(learner, self.unseen)


@dataclass(frozen=True)
class Weights:
    """How weights that are no model folder are read; without `arch` it is inferred. See `salun model import`."""

    arch: str | None = None
    data: str | None = None


@contextmanager
def audited_folders(
    before: Path,
    after: Path,
    forget: str,
    references: Sequence[Path] = (),
    shadows: Sequence[Path] = (),
    weights: Weights = Weights(),
    device: str = "auto",
) -> Iterator[Audited]:
    """Load models and images, and yield the outputs of all models on D_f, held-out and retained images.

    The card of `before` names the data, and its split what is held out: the test part. The splits of the shadow models'
    folders tell which samples each was trained on. `forget` is an address as other commands take it, or a text file
    with one id a line. Temporary folders are removed afterwards. ModelError: architectures or classes differ, or a
    reference was trained on D_f. DataError: the forget set is empty, or a reference is another model of the audit.
    """
    given = {"before": [before], "after": [after], "reference": list(references), "shadow": list(shadows)}
    with TemporaryDirectory(prefix="salun-audit-") as made:
        loaded: dict[str, list[LoadedModel]] = {}
        for role, paths in given.items():
            folders = [_folder(path, Path(made) / f"{role}-{place}", weights) for place, path in enumerate(paths)]
            loaded[role] = [_classifier(folder, path) for folder, path in zip(folders, paths, strict=True)]
        first = loaded["before"][0]
        for role, models in loaded.items():
            for path, model in zip(given[role], models, strict=True):
                _require_alike(first, model, path)
        digests = {role: _digests(paths) for role, paths in given.items() if paths}
        if first.normalisation != loaded["after"][0].normalisation:
            what = f"{after} has another normalisation than the model before"
            raise ModelError(what, "their images would differ", "import both with the same --mean and --std")
        _distinct(given, loaded)
        task = ClassificationTask()
        inputs = inputs_of(task, first, _targets(forget), weights.data)
        assert isinstance(inputs, ClassifierInputs)
        for path, model in zip(given["reference"], loaded["reference"], strict=True):
            if (path / CARD).is_file():  # bare weights do not say what they were trained on
                check_reference(inputs, model, f"reference {path}")
        place = pick_device(device)
        sets = {name: images.to(place) for name, images in (("forget", inputs.forget), ("unseen", inputs.test))}
        found = {
            role: [_outputs(model, sets, place) for model in models]
            for role, models in loaded.items()
            if role != "shadow"
        }
        named = Path(forget)
        yield Audited(
            found["before"][0],
            found["after"][0],
            found["reference"],
            _shadows(loaded["shadow"], sets, place) if shadows else None,
            inputs.emptied,
            len(inputs.retain),
            Networks(first.model, loaded["after"][0].model, sets["forget"], inputs.retain.to(place), sets["unseen"]),
            {
                **digests,
                "forget": digests_of([named]) if named.is_file() else {forget: inputs.forget_set.digest},
                "data": {"dataset": inputs.split.dataset_digest, "split": inputs.split.digest},
            },
        )


def _folder(path: Path, place: Path, weights: Weights) -> Path:
    """Return the model folder of a path; weights are imported into one."""
    if path.is_dir() and (path / CARD).is_file():
        return path
    if not path.exists():
        raise UsageError(f"there is no model {path}", "the path does not exist", "check it")
    if not path.is_dir() and not is_checkpoint_name(path.name):
        raise UsageError(f"{path} is not a model", "it is neither a model folder nor weights", "see salun audit --help")
    if weights.data is None:
        why = "weights name no data"
        raise UsageError(f"{path} cannot be audited without images", why, "give --data, and --arch if it is not found")
    import_model(path, load_spec(weights.data), weights.arch, place)
    return place


def _classifier(folder: Path, path: Path) -> LoadedModel:
    task = task_of(folder)
    if not isinstance(task, ClassificationTask):
        raise ModelError(
            f"{path} is a {task.description}", "an audit measures image classifiers", "evaluate it instead"
        )
    return task.load(folder)


def _require_alike(first: LoadedModel, model: LoadedModel, path: Path) -> None:
    facts = [
        (m.card.architecture, m.card.classes, (m.card.channels, m.card.height, m.card.width)) for m in (first, model)
    ]
    for name, wanted, found in zip(("architecture", "classes", "image size"), *facts, strict=True):
        if wanted != found:
            shown = f"{found} and not {wanted}" if name != "classes" else f"{len(found)} of them, or other names"
            what = f"{path} has another {name} than the model before"
            raise ModelError(what, shown, "audit two models of the same architecture, classes and image size")


def _distinct(given: dict[str, list[Path]], loaded: dict[str, list[LoadedModel]]) -> None:
    """Refuse a reference that is another model of the audit: it would be compared with itself."""
    seen: dict[str, Path] = {}
    for role in ("before", "after", "reference"):
        for path, model in zip(given[role], loaded[role], strict=True):
            if role == "reference" and model.digest in seen:
                raise same_model(str(path), str(seen[model.digest]))
            seen[model.digest] = path


def _targets(forget: str) -> list[Target]:
    if forget.startswith("s3://") or Path(forget).suffix in {".yaml", ".yml", ".json"}:
        found = read_forget(forget)
        if isinstance(found, list):
            return found
        raise UsageError(f"{forget} is a resolved forget set", "it belongs to one run of the pipeline", "list the ids")
    return list(read_ids(Path(forget)))


def _outputs(model: LoadedModel, sets: dict[str, ImageSource], device: torch.device) -> dict[str, Outputs]:
    """Run a model on each set, with the normalisation of its own card."""
    network = model.model.to(device)
    scaled = {name: images.normalised_by(model.normalisation) for name, images in sets.items()}
    return {name: outputs_of(network, images) for name, images in scaled.items()}


def _shadows(models: Sequence[LoadedModel], sets: dict[str, ImageSource], device: torch.device) -> Shadows:
    ids = [sample for images in sets.values() for sample in images.ids]
    rows, inside = [], []
    for model in models:
        found = _outputs(model, sets, device)
        rows.append(np.concatenate([logit_scaled(found["forget"]), logit_scaled(found["unseen"])]))
        inside.append(np.array([sample in model.split.train for sample in ids]))
    return checked_shadows(Shadows(np.stack(rows), np.stack(inside)))


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file of folders, and of weights."""
    found = {}
    for number, path in enumerate(paths, 1):
        prefix = f"{number}/" if len(paths) > 1 else ""
        if path.is_file():
            found[f"{prefix}{path.name}"[-NAME_CHARACTERS:]] = sha256_file(path)
            continue
        tree = list_tree(path)
        if tree.strange:  # what is behind a link is not hashed, so another model could be put there
            what = f"{path} holds more than regular files"
            raise UsageError(what, ", ".join(map(repr, tree.strange[:4])), "copy what the links lead to: cp -rL")
        for name in sorted(tree.files):
            found[f"{prefix}{name}"[-NAME_CHARACTERS:]] = sha256_file(path / name)
    return found
