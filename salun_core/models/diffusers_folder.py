"""Diffusers folders: read from what lies there alone, by an allow-list of classes, from safetensors; written whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from salun_core.config import load
from salun_core.data.split import SplitManifest
from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError, ModelError, SalunError, UsageError
from salun_core.models.checkpoint import SPLIT, Files, write_folder
from salun_core.models.folder_check import INDEX, NETWORKS, Component, check_folder
from salun_core.models.generation_card import CARD, GenerationCard, read_card
from salun_core.storage.identity import weights_digest
from salun_core.storage.tree import list_tree


@dataclass(frozen=True)
class Components:
    """What a diffusers folder holds.

    Args:
        folder: where it lies.
        pipeline: class of the pipeline that it names.
        parts: by component name (`unet` or `transformer`, `vae`, `text_encoder`, `tokenizer`, `scheduler`, ...), in
            eval mode; what the folder leaves out is not there.
        settings: further settings of the pipeline, from the index.
        digest: of all its files (see `weights_digest`).
    """

    folder: Path
    pipeline: str
    parts: Mapping[str, Any]
    settings: Mapping[str, Any]
    digest: str

    @property
    def denoiser_name(self) -> str:
        """`unet` or `transformer`."""
        return "unet" if "unet" in self.parts else "transformer"

    @property
    def network(self) -> nn.Module:
        """The denoiser's network."""
        return self.parts[self.denoiser_name]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LoadedDiffusion:
    """A diffusion model with its card and its split.

    Args:
        components: its parts.
        card: what it is.
        split: the split that it was trained on; an empty one if it did not come from data.
    """

    components: Components
    card: GenerationCard
    split: SplitManifest

    @property
    def digest(self) -> str:
        """Digest of the model."""
        return self.components.digest

    @property
    def network(self) -> nn.Module:
        """The denoiser's network."""
        return self.components.network


def load_diffusion(folder: Path) -> LoadedDiffusion:
    """Read a model folder of a diffusion model and check all of it. Nothing is fetched, no code of it is run.

    Args:
        folder: a diffusers folder with `model.json` and `split.json`.

    Raises:
        UsageError: it is no such folder, a component is missing, or it has pickled weights.
        ModelError: a class that is not supported, weights that do not fit their configuration, NaN.
        IntegrityError: a file is damaged, or the split is another.
    """
    card = read_card(folder)
    if not isinstance(card, GenerationCard):
        raise UsageError(f"{folder} is no diffusion model", f"its card says {card.task}", "give a diffusers folder")
    split = load(SplitManifest, folder / SPLIT)
    check_digest("the split beside the model", card.split_digest, split.digest)
    found = read_diffusers(folder)
    if type(found.network).__name__ != card.architecture:
        raise ModelError(
            "the card does not fit the folder",
            f"it says {card.architecture}, the denoiser is a {type(found.network).__name__}",
            "import the folder again",
        )
    return LoadedDiffusion(found, card, split)


def hush() -> None:
    """Keep the libraries' progress bars and advice off the terminal: what matters, we say ourselves."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def read_diffusers(folder: Path) -> Components:
    """Read a diffusers folder, with or without a card; errors as for `load_diffusion`."""
    hush()
    plan = check_folder(folder)
    parts = {component.name: _part(folder, component) for component in plan.components}
    return Components(folder, plan.pipeline, parts, plan.settings, folder_digest(folder))


def folder_digest(folder: Path) -> str:
    """Return the digest of the model in a folder (see `weights_digest`)."""
    return weights_digest({name: sha256_file(folder / name) for name in model_files(folder)})


def model_files(folder: Path) -> list[str]:
    """Return the names of the files that are the model: the index, and all in folders; sorted."""
    return sorted(name for name in list_tree(folder).files if name == INDEX or "/" in name)


def _part(folder: Path, component: Component) -> Any:  # noqa: ANN401 - of diffusers or transformers
    import importlib

    kind = getattr(importlib.import_module(component.library), component.kind)
    place = str(folder / component.name)
    try:
        if component.kind not in NETWORKS:
            return kind.from_pretrained(place, local_files_only=True)
        network, facts = kind.from_pretrained(
            place,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=_kept_type(folder, component),
            output_loading_info=True,
        )
    except SalunError:
        raise
    except Exception as error:  # configurations are foreign, and the libraries raise nearly anything on them
        why = str(error).strip().split("\n")[0][:300]
        raise ModelError(f"cannot load {component.name}", why, "check its configuration and its weights") from error
    _require_whole(component.name, network, facts)
    return network.eval()


def _kept_type(folder: Path, component: Component) -> torch.dtype:
    """The floating type that weights are kept in; the first tensor's, for files are of one type."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in weight_paths(folder / component.name):
        for _, kind in tensors_of(path).items():
            if kind in kinds:
                return kinds[kind]
    return torch.float32


def weight_paths(folder: Path) -> list[Path]:
    """Return the weight files of a component, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def tensors_of(path: Path) -> dict[str, str]:
    """Return the type of each tensor in a safetensors file, such as F32, from its header.

    Raises:
        IntegrityError: it is damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"weights {path.name} are damaged", str(error), "fetch them again") from error


def _require_whole(name: str, network: nn.Module, facts: Mapping[str, Any]) -> None:
    """A tensor that the weights lack would be drawn at random."""
    faults = [f"missing {key}" for key in sorted(facts.get("missing_keys", []))]
    faults += [f"unexpected {key}" for key in sorted(facts.get("unexpected_keys", []))]
    faults += [f"{item} has another shape" for item in facts.get("mismatched_keys", [])]
    if faults:
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise ModelError(f"weights of {name} do not fit its configuration", shown, "fetch the component again")
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"weights of {name} are not finite", f"{key} holds NaN or infinity", "fetch them again")


def save_diffusion(
    folder: Path,
    original: LoadedDiffusion,
    network: nn.Module,
    card: GenerationCard,
    split: SplitManifest,
    beside: Mapping[str, bytes] | None = None,
) -> str:
    """Write a model folder with another denoiser, whole or not at all; one that is there is replaced.

    All other components are copied byte for byte. The denoiser keeps its files' names, shards, order and types; the
    same weights give the same bytes.

    Args:
        folder: where to.
        original: the model that the denoiser was made from.
        network: the new denoiser.
        card: must carry the split's digest.
        split: written beside the card.
        beside: further files by name.

    Returns:
        The digest of the new model.

    Raises:
        ModelError: the denoiser is of another architecture.
        StoreError: the folder cannot be written.
        UsageError: it holds something that is not a model.
    """
    check_digest("the split of the model card", split.digest, card.split_digest)
    written = {**copies(original.components.folder), **denoiser_files(original.components, network)}
    files: Files = {**(beside or {}), **written, CARD: document_bytes(card), SPLIT: document_bytes(split)}
    write_folder(folder, files)
    return folder_digest(folder)


def copies(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Return what copies each file of the model in a folder, by relative name."""
    return {name: partial(shutil.copyfile, folder / name) for name in model_files(folder)}


def denoiser_files(original: Components, network: nn.Module) -> dict[str, Callable[[Path], object]]:
    """Return what writes the denoiser's weight files, by relative name.

    Raises:
        ModelError: the denoiser has other tensors than the original's files.
    """
    state = network.state_dict()
    paths = weight_paths(original.folder / original.denoiser_name)
    layout = {path: tensors_of(path) for path in paths}
    if sorted(state) != sorted(name for names in layout.values() for name in names):
        raise ModelError(
            "the denoiser does not fit the folder", "its tensors have other names", "start from the same model"
        )
    return {
        f"{original.denoiser_name}/{path.name}": partial(_write_shard, state, list(names), path)
        for path, names in layout.items()
    }


def _write_shard(state: Mapping[str, torch.Tensor], names: list[str], like: Path, target: Path) -> None:
    with safe_open(str(like), framework="pt") as file:
        facts = file.metadata()
        kinds = {name: file.get_tensor(name).dtype for name in names}
    tensors = {name: state[name].detach().to("cpu", kinds[name]).contiguous() for name in names}
    save_file(tensors, target, metadata=facts)


def document_bytes(document: GenerationCard | SplitManifest) -> bytes:
    """Return a document as it is written into a model folder."""
    return (json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()
