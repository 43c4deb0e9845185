"""Diffusers folders: checked against an allow-list before loading, read from safetensors, written atomically."""

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

from salun_core.config import load, read_document
from salun_core.data.split import SplitManifest
from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError, ModelError, SalunError, UsageError, unknown_name
from salun_core.models.card import CARD, DiffusionCard, read_card
from salun_core.models.checkpoint import SPLIT, Files, write_folder
from salun_core.registry.manifest import weights_digest
from salun_core.storage.local_files import list_tree

INDEX = "model_index.json"
NETWORKS = {
    "UNet2DModel": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "SD3Transformer2DModel": "diffusers",
    "DiTTransformer2DModel": "diffusers",
    "PixArtTransformer2DModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "T5EncoderModel": "transformers",
}
TOKENIZERS = dict.fromkeys(("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"), "transformers")
SCHEDULERS = dict.fromkeys(
    (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ),
    "diffusers",
)
CLASSES = {**NETWORKS, **TOKENIZERS, **SCHEDULERS}
DENOISERS = ("unet", "transformer")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
"""Components that unlearning never asks; they are copied, never loaded."""

_PICKLED = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx_data"}
_CODE = {".py", ".pyc", ".so"}
_CONVERT = (
    'convert it in a throw-away container: python -c "from diffusers import DiffusionPipeline as P; '
    "P.from_pretrained('OLD', use_safetensors=False, safety_checker=None)"
    ".save_pretrained('NEW', safe_serialization=True)\""
)
_CONVERT_FILE = (
    'convert it in a throw-away container: python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_single_file('OLD.ckpt').save_pretrained('NEW', safe_serialization=True)\""
)


@dataclass(frozen=True)
class Component:
    """One part of a pipeline.

    Args:
        name: of its folder.
        library: diffusers or transformers.
        kind: its class.
    """

    name: str
    library: str
    kind: str


@dataclass(frozen=True)
class FolderPlan:
    """What is to be loaded from a folder.

    Args:
        pipeline: class of the pipeline.
        components: in the order of their names.
        settings: of the pipeline.
    """

    pipeline: str
    components: list[Component]
    settings: dict[str, Any]


def refuse_pickle(path: Path) -> None:
    """Refuse a single file of pickled weights, with the command that converts it.

    Raises:
        UsageError: it is one.
    """
    if path.suffix in _PICKLED:
        raise _pickled(path.name, _CONVERT_FILE)


def check_folder(folder: Path) -> FolderPlan:
    """Check a diffusers folder and say what is to be loaded.

    Args:
        folder: with `model_index.json`.

    Raises:
        UsageError: it is no such folder, a component that it names is missing, it holds pickled weights, code or links.
        ModelError: a component is of a class that is not supported.
    """
    refuse_pickle(folder)
    if not (folder / INDEX).is_file():
        raise UsageError(
            f"{folder} is no diffusers folder", f"it has no {INDEX}", "give the folder that save_pretrained() wrote"
        )
    index = read_document(folder / INDEX)
    pipeline = index.get("_class_name") if isinstance(index, Mapping) else None
    if not isinstance(pipeline, str):
        raise ModelError(f"{INDEX} is not understood", "it names no pipeline of diffusers' own", "save it again")
    named = {name: value for name, value in index.items() if _is_component(name, value)}
    _check_files(folder)
    missing = [name for name in sorted(named) if not (folder / name).is_dir()]
    if missing:
        raise UsageError(
            f"{folder} is not complete",
            f"{INDEX} names {', '.join(missing)}, and there is no such folder",
            "fetch what is missing, or set what you do without to [null, null]",
        )
    components = [_component(name, *named[name]) for name in sorted(named) if name not in UNUSED]
    _check_parts(folder, components)
    settings = {name: value for name, value in index.items() if not (name.startswith("_") or isinstance(value, list))}
    return FolderPlan(pipeline, components, settings)


def _is_component(name: str, value: Any) -> bool:  # noqa: ANN401 - of the index
    return not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value != [None, None]


def _check_files(folder: Path) -> None:
    tree = list_tree(folder)
    if tree.strange:
        raise UsageError(
            f"{tree.strange[0]} is no plain file", "links, empty and deep folders are not read", "copy with `cp -rL`"
        )
    for name in sorted(tree.files):
        suffix = Path(name).suffix.lower()
        if suffix in _PICKLED:
            raise _pickled(name, _CONVERT if "/" in name else _CONVERT_FILE)
        if suffix in _CODE:
            raise UsageError(f"{name} is code", "a model folder is data only", "remove it")


def _pickled(name: str, remedy: str) -> UsageError:
    return UsageError(f"{name} is refused", "it is pickled: reading it can run any code; only safetensors are", remedy)


def _component(name: str, library: Any, kind: Any) -> Component:  # noqa: ANN401 - of the index
    if not isinstance(kind, str) or not isinstance(library, str):
        raise ModelError(f"component {name} is not understood", f"{INDEX} names no class for it", "save it again")
    if kind not in CLASSES or CLASSES[kind] != library:
        known = unknown_name(f"class for {name}:", kind, CLASSES)
        raise ModelError(
            f"component {name} is not supported", f"its class {library}.{kind} is not known here", known.remedy
        )
    return Component(name, library, kind)


def _check_parts(folder: Path, components: list[Component]) -> None:
    names = {component.name for component in components}
    if len(names.intersection(DENOISERS)) != 1 or "scheduler" not in names:
        raise ModelError(
            f"{folder.name} is no diffusion model", "it needs a scheduler and one of unet and transformer", ""
        )
    for component in components:
        _check_part(folder / component.name, component)


def _check_part(folder: Path, component: Component) -> None:
    for path in sorted(folder.glob("*.json")):
        document = read_document(path) if path.name.endswith("config.json") else {}
        if isinstance(document, Mapping) and {"auto_map", "trust_remote_code"} & set(document):
            raise ModelError(
                f"component {component.name} is refused", f"{path.name} asks for code of its own", "use a plain model"
            )
    if component.kind not in NETWORKS:
        return
    for what, found in (("config.json", [folder / "config.json"]), ("weights in safetensors", _weights(folder))):
        if not any(path.is_file() for path in found):
            raise UsageError(f"component {component.name} is not complete", f"it has no {what}", "fetch it again")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


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
    card: DiffusionCard
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
    if not isinstance(card, DiffusionCard):
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


def silence_logs() -> None:
    """Silence progress bars and advice of diffusers and transformers; errors still pass."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def read_diffusers(folder: Path) -> Components:
    """Read a diffusers folder, with or without a card; errors as for `load_diffusion`."""
    silence_logs()
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
    card: DiffusionCard,
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


def document_bytes(document: DiffusionCard | SplitManifest) -> bytes:
    """Return a document as it is written into a model folder."""
    return (json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()
