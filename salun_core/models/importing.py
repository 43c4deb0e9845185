"""Reads foreign classifiers, files or folders, without running code from them: tensors, and what is said about them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salun_core.config import read_document
from salun_core.errors import IntegrityError, ModelError, UsageError
from salun_core.models.card import CARD
from salun_core.models.checkpoint import WEIGHTS, read_weights

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "ema", "model_ema", "state_dict_ema")
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_TORCH_SUFFIXES = {".pt", ".pth", ".th", ".tar", ".bin", ".ckpt"}
_ACCEPTED = ".safetensors, .pt, .pth, .th, .tar, .bin or .ckpt"
_INFLATION = 8  # torch.save does not compress; archives that were packed again shrink by less than this
_SAVE = "save only its state_dict() and try again"


@dataclass(frozen=True)
class Facts:
    """What a file or folder says about its model; None or empty if it says nothing.

    `origin` is the document that says so, `mean` and `std` are the normalisation by channel, `size` is in pixels, and
    `config` is the configuration of a transformers model.
    """

    origin: str = ""
    architecture: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    size: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a foreign classifier by name, on the CPU, without the prefix.

    `wrapper` has the keys that the tensors were under, such as `state_dict`, and `prefix` is what all names began with,
    such as `module.`.
    """

    name: str
    state: dict[str, Tensor]
    wrapper: str = ""
    prefix: str = ""
    facts: Facts = Facts()


def read_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Read the tensors of a foreign classifier without running code from it.

    Wrappers such as `state_dict` are opened (`key` selects one if a file has several), and a prefix that all names
    share, such as `module.`, is removed. Names do not change otherwise. The path is a `.safetensors` or torch file, or
    a folder with one and perhaps a `config.json` of timm or transformers.
    """
    if path.is_dir():
        weights = _weights_of(path)
        return replace(read_checkpoint(weights, key), facts=_facts_of_folder(path))
    if path.suffix != ".safetensors" and path.suffix not in _TORCH_SUFFIXES:
        raise UsageError(f"{path.name} is not a checkpoint", f"its suffix is {path.suffix!r}", f"give {_ACCEPTED}")
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}", "the file does not exist", "check the path")
    if path.stat().st_size == 0:
        raise ModelError(f"cannot import {path.name}", "the file is empty", "download or copy it again")
    if path.suffix == ".safetensors":
        state, prefix = _stripped(_safetensors(path))
        return Checkpoint(path.name, state, "", prefix, _facts_of_export(_metadata(path), path.name))
    document = _unpickled(path)
    tensors, wrapper = _tensors(document, path, key)
    _refuse_expanded(tensors, path)
    state, prefix = _stripped(tensors)
    found = _facts_of_export(document, path.name) if isinstance(document, Mapping) else Facts()
    return Checkpoint(path.name, state, wrapper, prefix, found)


def is_checkpoint_name(text: str) -> bool:
    """Whether a name ends like a checkpoint."""
    return Path(text).suffix in {".safetensors", *_TORCH_SUFFIXES}


def _weights_of(folder: Path) -> Path:
    """Return the file of weights in a folder: by its usual name, or the only one."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", *_TORCH_SUFFIXES})
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"{folder} holds no model",
            f"it has neither a checkpoint ({_ACCEPTED}) nor the model_index.json of a diffusers folder",
            "give the file of the weights, or the folder that save_pretrained() wrote",
        )
    shown = ", ".join(path.name for path in found[:4])
    raise UsageError(f"{folder} holds {len(found)} checkpoints", shown, "give the file to import")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_weights(path)
    except IntegrityError as error:  # its remedy is for files of the store
        raise IntegrityError(
            f"cannot import {path.name}", f"it is damaged ({error.why})", "download it again"
        ) from error


def _metadata(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            texts = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}
    return {name: _plain(value) if name in {"classes", "preprocessing"} else value for name, value in texts.items()}


def _plain(text: str) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _unpickled(path: Path) -> Any:  # noqa: ANN401 - any document
    _refuse_bomb(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost any exception on damaged files, even AssertionError
        # torch's own text is not shown: it advises to load the file without weights_only
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ModelError(
                f"cannot import {path.name}",
                f"it holds more than tensors: {code[1]}, which was not run",
                "load it in a throw-away container and save only its state_dict()",
            ) from error
        why = "it holds more than tensors, or is damaged or cut off"
        raise ModelError(f"cannot import {path.name}", why, f"download it again, or {_SAVE}") from error


def _refuse_bomb(path: Path) -> None:
    """Check the directory of a zip file before torch unpacks it.

    torch allocates the sizes that the directory declares, so a small file could fill the memory.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # zipfile raises several exceptions on damaged directories
        raise ModelError(
            f"cannot import {path.name}",
            "it is damaged or cut off: its zip directory cannot be read",
            "download it again",
        ) from error
    if unpacked > _INFLATION * path.stat().st_size:
        raise ModelError(
            f"cannot import {path.name}",
            f"{path.stat().st_size:,} bytes would unpack to {unpacked:,}, and torch.save does not compress",
            "save its state_dict() again with torch.save",
        )


def _refuse_expanded(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that repeat few stored values: a copy of them could fill the memory."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > _INFLATION * path.stat().st_size:
        raise ModelError(
            f"cannot import {path.name}",
            f"its tensors would take {total:,} bytes, and the file has {path.stat().st_size:,}",
            "save contiguous tensors with torch.save",
        )


def _tensors(document: Any, path: Path, key: str | None) -> tuple[dict[str, Tensor], str]:  # noqa: ANN401 - any document
    """Open the wrappers of a document; return its tensors and the keys that they were under."""
    opened: list[str] = []
    if key is not None:
        if not isinstance(document, Mapping) or not isinstance(document.get(key), Mapping):
            raise UsageError(f"{path.name} has no key {key!r} with tensors", _keys(document), "check --key")
        document = document[key]
        opened.append(key)
    while isinstance(document, Mapping) and len(opened) < 8:
        found = [name for name in WRAPPERS if isinstance(document.get(name), Mapping) and document[name]]
        if len(found) > 1:
            raise ModelError(
                f"{path.name} holds several models", f"under {' and '.join(found)}", f"choose one: --key {found[0]}"
            )
        if not found:
            break
        document = document[found[0]]
        opened.append(found[0])
    if not isinstance(document, Mapping) or not document:
        raise ModelError(f"{path.name} holds no state_dict", f"it is a {type(document).__name__}", _SAVE)
    strange = [name for name, value in document.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if strange:
        shown = strange[0][:80] if isinstance(strange[0], str) else type(strange[0]).__name__
        raise ModelError(f"{path.name} holds more than tensors", f"such as {shown!r}", _SAVE)
    return dict(document), ".".join(opened)


def _keys(document: Any) -> str:  # noqa: ANN401 - any document
    names = [name for name in document if isinstance(name, str)] if isinstance(document, Mapping) else []
    return f"it has {', '.join(ascii(name[:40])[1:-1] for name in names[:8])}" if names else "it has no keys"


def _stripped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove wrapper prefixes (data parallelism, Lightning, torch.compile), including nested ones."""
    removed = ""
    while prefix := next((one for one in PREFIXES if state and all(name.startswith(one) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        removed += prefix
    return dict(state), removed


def _facts_of_export(document: Mapping[str, Any], name: str) -> Facts:
    """Read what `salun model export` writes into its files."""
    given, architecture = document.get("preprocessing"), document.get("architecture")
    if not isinstance(given, Mapping) or not isinstance(architecture, str):
        return Facts()
    size = given.get("size")
    return Facts(
        name,
        architecture,
        {},
        _texts(document.get("classes")),
        _numbers(given.get("mean")),
        _numbers(given.get("std")),
        size[0] if isinstance(size, (list, tuple)) and size and isinstance(size[0], int) else None,
    )


def _facts_of_folder(folder: Path) -> Facts:
    """Read the documents of a folder: our model card, or the configuration of timm or transformers."""
    if (folder / CARD).is_file():
        card = _mapping(folder / CARD)
        return Facts(
            CARD,
            card["architecture"] if isinstance(card.get("architecture"), str) else None,
            {},
            _texts(card.get("classes")),
            _numbers(card.get("mean")),
            _numbers(card.get("std")),
            card["height"] if isinstance(card.get("height"), int) else None,
        )
    if not (folder / CONFIG).is_file():
        return Facts()
    config = _mapping(folder / CONFIG)
    if {"auto_map", "trust_remote_code"} & set(config):
        raise ModelError(f"{folder.name} is refused", f"{CONFIG} requests code of its own", "use a plain model")
    if isinstance(config.get("architecture"), str):
        return _facts_of_timm(config)
    scale = _facts_of_preprocessor(folder) if (folder / PREPROCESSOR).is_file() else Facts()
    size = scale.size or (config["image_size"] if isinstance(config.get("image_size"), int) else None)
    labels = config.get("id2label")
    names = _in_order(labels) if isinstance(labels, Mapping) else []
    if names == [f"LABEL_{number}" for number in range(len(names))]:
        names = []
    return Facts(scale.origin or CONFIG, None, config, names, scale.mean, scale.std, size)


def _facts_of_timm(config: Mapping[str, Any]) -> Facts:
    given = config.get("pretrained_cfg")
    given = given if isinstance(given, Mapping) else {}
    shape = given.get("input_size")
    size = shape[1] if isinstance(shape, list) and len(shape) == 3 and isinstance(shape[1], int) else None
    names = _texts(config.get("label_names") or given.get("label_names"))
    return Facts(
        CONFIG,
        f"timm:{config['architecture']}",
        {},
        names,
        _numbers(given.get("mean")),
        _numbers(given.get("std")),
        size,
    )


def _facts_of_preprocessor(folder: Path) -> Facts:
    """Read the normalisation and the size of transformers' image processor.

    Raises ModelError if pixels are scaled in a way that a mean and a deviation cannot express here.
    """
    given = _mapping(folder / PREPROCESSOR)
    factor = given.get("rescale_factor", 1 / 255)
    rescaled = given.get("do_rescale", True) and isinstance(factor, (int, float)) and abs(factor * 255 - 1) < 1e-3
    if not rescaled:
        raise ModelError(
            f"the preprocessing in {PREPROCESSOR} is not supported",
            "it does not scale pixels by 1/255",
            "correct the file, or import the file of the weights with --mean and --std",
        )
    value = given.get("crop_size") if given.get("do_center_crop") else given.get("size")
    sides = list(value.values()) if isinstance(value, Mapping) else [value]
    size = next((side for side in sides if isinstance(side, int)), None)
    normalised = given.get("do_normalize", True)
    mean, std = (_numbers(given.get(name)) for name in ("image_mean", "image_std"))
    return Facts(
        PREPROCESSOR,
        None,
        {},
        (),
        mean if normalised else [0.0] * len(mean),
        std if normalised else [1.0] * len(std),
        size,
    )


def _mapping(path: Path) -> Mapping[str, Any]:
    document = read_document(path)
    if not isinstance(document, Mapping):
        raise ModelError(f"{path.name} is not a configuration", "it must be a JSON object", "download it again")
    return document


def _in_order(labels: Mapping[Any, Any]) -> list[str]:
    try:
        return [str(labels[number]) for number in sorted(labels, key=int)]
    except (TypeError, ValueError):
        return []


def _texts(value: Any) -> list[str]:  # noqa: ANN401 - of a document
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _numbers(value: Any) -> list[float]:  # noqa: ANN401 - of a document
    fits = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    return [float(item) for item in value] if fits else []


def read_class_names(text: str) -> list[str]:
    """Read class names by id: a file with one name a line, a JSON list or `id2label`, or names separated by commas."""
    path = Path(text)
    if not path.is_file():
        names = [name.strip() for name in text.split(",") if name.strip()]
        if len(names) < 2:
            raise UsageError(
                f"--classes {text[:80]!r} has no class names", "it is neither a file nor a list", "check it"
            )
    elif path.suffix in {".json", ".yaml", ".yml"}:
        document = read_document(path)
        labels = document.get("id2label", document) if isinstance(document, Mapping) else document
        names = _in_order(labels) if isinstance(labels, Mapping) else _texts(labels)
    else:
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path.name} has no class names", "it is not UTF-8 text", "write one name a line"
            ) from error
    if not names or len(set(names)) < len(names):
        why = "a name occurs twice" if names else "it is empty, or not a list of names"
        raise UsageError(
            f"{path.name} has no usable class names", why, "write each class name once, in order of the ids"
        )
    return names
