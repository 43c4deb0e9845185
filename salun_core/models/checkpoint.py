"""Model folders of classifiers: weights, card and split, checked on reading and written atomically. No pickle."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from salun_core.config import Document
from salun_core.data.images import Normalisation
from salun_core.data.split import SPLIT, SplitManifest, read_split
from salun_core.digest import check_digest, sha256_bytes, sha256_file
from salun_core.errors import IntegrityError, ModelError, StateMismatchError, UsageError
from salun_core.models.architectures import build_classifier
from salun_core.models.card import ModelCard, load_card
from salun_core.storage.local_files import disk_error

Files = Mapping[str, bytes | Callable[[Path], object]]
"""By relative name, with `/` between folders: the content, or a function that writes it to a path."""

WEIGHTS, CARD = "model.safetensors", "model.json"


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in eval mode, channels-last, with its card, its split and the SHA-256 of its `model.safetensors`."""

    model: nn.Module
    card: ModelCard
    split: SplitManifest
    digest: str

    @property
    def network(self) -> nn.Module:
        """The network; all kinds of model share this attribute."""
        return self.model

    @property
    def normalisation(self) -> Normalisation:
        """The normalisation that the model expects."""
        return Normalisation(tuple(self.card.mean), tuple(self.card.std))

    def check_images(self, shape: Sequence[int], num_classes: int) -> None:
        """Raise ModelError if images of a shape [C, H, W] or a number of classes do not fit the model."""
        expected = (self.card.channels, self.card.height, self.card.width)
        if tuple(shape) != expected:
            found = " x ".join(map(str, shape))
            raise ModelError(
                "images do not fit the model",
                f"they are {found}, the model takes {' x '.join(map(str, expected))} (channels, height, width)",
                f"set `size: {self.card.height}` and `channels: {self.card.channels}` in the data spec",
            )
        if num_classes != len(self.card.classes):
            raise ModelError(
                "class count does not match",
                f"the data have {num_classes} classes, the model {len(self.card.classes)}",
                "use the data that the model was trained on",
            )


def weights_bytes(model: nn.Module) -> bytes:
    """Serialise a model's state as safetensors; the same state gives the same bytes on every device."""
    return serialise({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's serialised state."""
    return sha256_bytes(weights_bytes(model))


def save_model(
    folder: Path,
    model: nn.Module,
    card: ModelCard,
    split: SplitManifest,
    extra_files: Mapping[str, bytes] | None = None,
) -> str:
    """Write a model folder atomically and return the digest of the weights; an existing model folder is replaced.

    The card must contain the split's digest. Raises UsageError if the folder holds something that is not a model.
    """
    check_digest("the split of the model card", split.digest, card.split_digest)
    data = weights_bytes(model)
    documents: Files = {CARD: document_bytes(card), SPLIT: split.write}
    write_folder(folder, {**(extra_files or {}), WEIGHTS: data, **documents})
    return sha256_bytes(data)


def document_bytes(document: Document) -> bytes:
    """Return the serialised form of a document in a model folder."""
    return (json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def write_folder(folder: Path, files: Files) -> None:
    """Write files into a new folder, which then replaces an older model folder.

    The files are written to a hidden folder on the same disk, which is renamed at the end. A process that dies earlier
    leaves the hidden folder and no half-written model. One that dies between the two renames of a replacement leaves no
    folder under the name; both models are then in hidden folders next to it. Raises UsageError if the folder holds
    something that is not a model.
    """
    if folder.exists() and not (folder / CARD).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", "it holds something that is not a model", "give a new folder")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        for name, data in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, bytes):
                (temporary / name).write_bytes(data)
            else:
                data(temporary / name)
        temporary.chmod(0o755)
        _swap(temporary, folder)
    except OSError as error:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(f"cannot write {folder.name}", folder, error) from error


def _swap(new: Path, folder: Path) -> None:
    """Rename a folder to its final name; an old folder is moved away first and deleted last."""
    if not folder.exists():
        new.replace(folder)
        return
    old = new.with_name(f"{new.name}.old")
    folder.replace(old)
    try:
        new.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder: Path, split: SplitManifest | None = None) -> LoadedModel:
    """Read and check a model folder, with its own split or the given one, which the card must name.

    Raises ModelError if names, shapes or types of the weights differ from the architecture's, and IntegrityError if a
    file is damaged or the card belongs to another split.
    """
    card = load_card(ModelCard, folder)
    split = read_split(folder) if split is None else split
    check_digest("the split in the model folder", card.split_digest, split.digest)
    model = build_classifier(card.architecture, len(card.classes), card.channels, card.height)
    load_weights(model, read_weights(folder / WEIGHTS))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return LoadedModel(model.eval(), card, split, sha256_file(folder / WEIGHTS))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; raises IntegrityError if it is damaged."""
    if not path.is_file():
        raise UsageError(f"there are no weights {path}", "the file does not exist", "check the model folder")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"weights {path.name} are damaged", str(error), "fetch the model again: salun model pull LINE --out DIR"
        ) from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model; names, shapes and types must match.

    StateMismatchError lists the differences by group.
    """
    faults = state_faults(model.state_dict(), state)
    if faults:
        raise StateMismatchError(
            "checkpoint does not fit the architecture",
            str(faults),
            "give the architecture and class count that it was made with",
            faults.details(),
        )
    model.load_state_dict(dict(state))


def shown_faults(faults: Sequence[str]) -> str:
    """Return the first faults of a list, short enough for one message."""
    return "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")


@dataclass(frozen=True)
class StateFaults:
    """Differences between the tensors that an architecture needs and those that a checkpoint has.

    `different` describes tensors of another shape or type in words.
    """

    expected: int
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    different: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.different)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"missing {len(self.missing)} of {self.expected}: {grouped(self.missing)}")
        if self.unexpected:
            parts.append(f"unexpected {len(self.unexpected)}: {grouped(self.unexpected)}")
        return "; ".join([*parts, *([shown_faults(self.different)] if self.different else [])])

    def details(self) -> dict[str, list[str]]:
        """Return every difference, by kind."""
        return {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "different": list(self.different),
        }


def grouped(names: Sequence[str], limit: int = 4) -> str:
    """Return names in groups, short enough for one message: `layer4.*.conv3.weight (3), head.* (2)`.

    Numbers become `*`. If that leaves more groups than `limit`, names are grouped by their first part.
    """
    groups = Counter(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    if len(groups) > limit:
        first = Counter(name.split(".")[0] for name in names)
        groups = Counter({f"{name}.*" if count > 1 else name: count for name, count in first.items()})
    # names come from the file: each is cut, and control characters are shown as escapes
    shown = [_printable(name) + (f" ({count})" if count > 1 else "") for name, count in groups.most_common(limit)]
    return ", ".join(shown) + (f" and {len(groups) - limit} more groups" if len(groups) > limit else "")


def _printable(name: str) -> str:
    return ascii(name[:80])[1:-1]


def state_faults(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> StateFaults:
    """List the differences of two states in names, shapes and types."""
    different = []
    for name, tensor in expected.items():
        if name in found and found[name].shape != tensor.shape:
            different.append(f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}")
        elif name in found and found[name].dtype != tensor.dtype:
            different.append(f"{name} is {found[name].dtype}, not {tensor.dtype}")
    missing, unexpected = (
        [name for name in expected if name not in found],
        [name for name in found if name not in expected],
    )
    return StateFaults(len(expected), missing, unexpected, different)
