"""Checks a diffusers folder before anything in it is loaded: what it names, what lies there, and nothing to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salun_core.config import read_document
from salun_core.errors import ModelError, UsageError, unknown_name
from salun_core.storage.tree import list_tree

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
