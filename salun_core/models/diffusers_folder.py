"""Diffusers folders: checked against an allow-list before loading, read from safetensors, written atomically."""

from __future__ import annotations

import importlib
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

from salun_core.config import read_document
from salun_core.data.split import SPLIT, SplitManifest, read_split
from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError, ModelError, SalunError, UsageError, unknown_name
from salun_core.models.card import CARD, DiffusionCard, load_card
from salun_core.models.checkpoint import Files, document_bytes, shown_faults, write_folder
from salun_core.registry.manifest import weights_digest
from salun_core.storage.local_files import list_tree

INDEX = "model_index.json"

# Only these classes are loaded, each from its own library. `model_index.json` is untrusted: if every class that it
# names were loaded, its author could choose code to run. Denoisers and text encoders are those that
# `diffusion.denoiser` and `diffusion.conditions` can call; schedulers are those whose noise `diffusion.process` can
# derive from their settings. No class here reads pickled files or code when it loads safetensors from a local folder.
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
TEXT_ENCODER = "text_encoder"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
"""Components that unlearning does not use; they are copied, but never loaded."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
class FolderPlan:
    """Loading plan of a folder: its pipeline's class and settings, and the class of each component, sorted by name."""

    pipeline: str
    components: Mapping[str, str]
    settings: Mapping[str, Any]


def refuse_pickle(path: Path) -> None:
    """Reject a single file of pickled weights; the message contains the conversion command."""
    if path.suffix in _PICKLED:
        raise _pickled(path.name, _CONVERT_FILE)


def check_folder(folder: Path) -> FolderPlan:
    """Check a diffusers folder (with a `model_index.json`) and return its loading plan.

    Pickled weights, code, links and classes that are not supported are errors.
    """
    refuse_pickle(folder)
    if not (folder / INDEX).is_file():
        raise UsageError(
            f"{folder} is not a diffusers folder", f"it has no {INDEX}", "give the folder that save_pretrained() wrote"
        )
    index = read_document(folder / INDEX)
    pipeline = index.get("_class_name") if isinstance(index, Mapping) else None
    if not isinstance(pipeline, str):
        raise ModelError(
            f"{INDEX} has no pipeline",
            "its _class_name is missing, or names a custom pipeline",
            "save a pipeline of diffusers",
        )
    named = {
        name: value
        for name, value in sorted(index.items())
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value != [None, None]
    }
    _check_files(folder)
    missing = [name for name in named if not (folder / name).is_dir()]
    if missing:
        raise UsageError(
            f"{folder} is not complete",
            f"{INDEX} names {', '.join(missing)}, and there is no such folder",
            "download the missing folders, or set components that you do not use to [null, null]",
        )
    components = {name: _checked_class(name, *named[name]) for name in named if name not in UNUSED}
    if len(components.keys() & set(DENOISERS)) != 1 or "scheduler" not in components:
        raise ModelError(
            f"{folder.name} is not a diffusion model",
            "it needs a scheduler and one of unet and transformer",
            "give the folder of a whole pipeline",
        )
    for name, kind in components.items():
        _check_component(folder / name, kind)
    settings = {name: value for name, value in index.items() if not (name.startswith("_") or isinstance(value, list))}
    return FolderPlan(pipeline, components, settings)


def _check_files(folder: Path) -> None:
    tree = list_tree(folder)
    if tree.strange:
        raise UsageError(
            f"{tree.strange[0]} is not a plain file", "links, empty and deep folders are not read", "copy with `cp -rL`"
        )
    for name in sorted(tree.files):
        suffix = Path(name).suffix.lower()
        if suffix in _PICKLED:
            raise _pickled(name, _CONVERT if "/" in name else _CONVERT_FILE)
        if suffix in _CODE:
            raise UsageError(f"{name} is code", "a model folder must hold data only", "remove it")


def _pickled(name: str, remedy: str) -> UsageError:
    why = "it is pickled, and reading it can run any code; only safetensors are read"
    return UsageError(f"{name} is refused", why, remedy)


def _checked_class(name: str, library: Any, kind: Any) -> str:  # noqa: ANN401 - of the index
    if not isinstance(kind, str) or not isinstance(library, str):
        raise ModelError(f"component {name} has no class", f"{INDEX} does not name one", "save the pipeline again")
    if CLASSES.get(kind) != library:
        known = unknown_name(f"class for {name}:", kind, CLASSES)
        raise ModelError(
            f"component {name} is not supported", f"its class {library}.{kind} is not on the allow-list", known.remedy
        )
    return kind


def _check_component(folder: Path, kind: str) -> None:
    for path in sorted(folder.glob("*config.json")):
        document = read_document(path)
        if isinstance(document, Mapping) and {"auto_map", "trust_remote_code"} & set(document):
            raise ModelError(
                f"component {folder.name} is refused", f"{path.name} requests code of its own", "use a plain model"
            )
    if kind not in NETWORKS:
        return
    has = {"config.json": (folder / "config.json").is_file(), "weights in safetensors": bool(_weight_files(folder))}
    for what, present in has.items():
        if not present:
            raise UsageError(f"component {folder.name} is not complete", f"it has no {what}", "download it again")


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


@dataclass(frozen=True)
class Components:
    """The loaded components of a diffusers folder, in eval mode, and the digest of its files (see `weights_digest`).

    `parts` has them by name: `unet` or `transformer`, `vae`, `text_encoder`, `tokenizer`, `scheduler` and so on.
    `settings` are other settings of the pipeline, from the index.
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

    def encoders_to(self, device: torch.device | str) -> None:
        """Move autoencoder and text encoders to a device."""
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and name != self.denoiser_name:
                part.to(device)


@dataclass(frozen=True)
class LoadedDiffusion:
    """A diffusion model with its card and its split, which is empty for a model without data."""

    components: Components
    card: DiffusionCard
    split: SplitManifest

    @property
    def digest(self) -> str:
        """The digest of the model."""
        return self.components.digest

    @property
    def network(self) -> nn.Module:
        """The denoiser's network."""
        return self.components.network


def load_diffusion(folder: Path, split: SplitManifest | None = None) -> LoadedDiffusion:
    """Read and check the model folder of a diffusion model. Nothing is downloaded, and no code in it is run.

    The card must name the given split, or the folder's own if `split` is None. Weights with NaN or another shape than
    their configuration are errors.
    """
    card = load_card(DiffusionCard, folder)
    split = read_split(folder) if split is None else split
    check_digest("the split in the model folder", card.split_digest, split.digest)
    found = read_diffusers(folder)
    if type(found.network).__name__ != card.architecture:
        raise ModelError(
            "the card does not fit the folder",
            f"it names {card.architecture}, and the denoiser is a {type(found.network).__name__}",
            "import the folder again",
        )
    return LoadedDiffusion(found, card, split)


def silence_logs() -> None:
    """Silence progress bars and advisory logs of diffusers and transformers; errors are still logged."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def read_diffusers(folder: Path) -> Components:
    """Read a diffusers folder, with or without a card; errors as for `load_diffusion`."""
    silence_logs()
    plan = check_folder(folder)
    parts = {name: _load_component(folder / name, kind) for name, kind in plan.components.items()}
    return Components(folder, plan.pipeline, parts, plan.settings, folder_digest(folder))


def folder_digest(folder: Path) -> str:
    """Return the digest of the model in a folder (see `weights_digest`)."""
    return weights_digest({name: sha256_file(folder / name) for name in model_files(folder)})


def model_files(folder: Path) -> list[str]:
    """Return the sorted names of the files that make up the model: the index and all files in folders."""
    return sorted(name for name in list_tree(folder).files if name == INDEX or "/" in name)


def _load_component(folder: Path, kind: str) -> Any:  # noqa: ANN401 - of diffusers or transformers
    loader = getattr(importlib.import_module(CLASSES[kind]), kind)
    try:
        if kind not in NETWORKS:
            return loader.from_pretrained(str(folder), local_files_only=True)
        network, info = loader.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=_stored_dtype(folder),
            output_loading_info=True,
        )
    except SalunError:
        raise
    except Exception as error:  # configurations are untrusted, and the libraries raise almost any exception on them
        why = str(error).strip().split("\n")[0][:300]
        raise ModelError(f"cannot load {folder.name}", why, "check its configuration and its weights") from error
    _check_loaded(folder.name, network, info)
    return network.eval()


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the floating type of the first stored tensor; published folders use one type for all."""
    stored = (dtype for path in _weight_files(folder) for dtype in _tensor_types(path).values())
    return next((_FLOATS[dtype] for dtype in stored if dtype in _FLOATS), torch.float32)


def _tensor_types(path: Path) -> dict[str, str]:
    """Return the type of each tensor in a safetensors file, such as F32, from its header."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"weights {path.name} are damaged", str(error), "download them again") from error


def _check_loaded(name: str, network: nn.Module, info: Mapping[str, Any]) -> None:
    """Reject missing tensors, which the libraries fill with random values after a mere warning."""
    faults = [f"missing {key}" for key in sorted(info.get("missing_keys", []))]
    faults += [f"unexpected {key}" for key in sorted(info.get("unexpected_keys", []))]
    faults += [f"{item} has another shape" for item in info.get("mismatched_keys", [])]
    if faults:
        why = shown_faults(faults)
        raise ModelError(f"weights of {name} do not fit its configuration", why, "download the component again")
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"weights of {name} are not finite", f"{key} holds NaN or infinity", "download them again")


def save_diffusion(
    folder: Path,
    original: LoadedDiffusion,
    network: nn.Module,
    card: DiffusionCard,
    split: SplitManifest,
    extra_files: Mapping[str, bytes] | None = None,
    text_encoder: nn.Module | None = None,
) -> str:
    """Write a model folder with a new denoiser, atomically, and return the digest of the new model.

    An existing model folder is replaced. All other components are copied byte for byte from `original`. New weights
    keep the names, order and types of their files; the same weights give the same bytes. The card must contain the
    split's digest. A trained text encoder is written only if the original's card allows it.
    """
    parts = original.components
    files = {**copies(parts.folder), **_part_files(parts.folder / parts.denoiser_name, network)}
    if text_encoder is not None:
        if not original.card.trainable_text_encoder:
            raise ModelError(
                "the text encoder was trained",
                "the card of the original does not allow it",
                "import it with --trainable-text-encoder",
            )
        files |= _part_files(parts.folder / TEXT_ENCODER, text_encoder)
    return write_diffusion(folder, {**(extra_files or {}), **files}, card, split)


def write_diffusion(folder: Path, files: Files, card: DiffusionCard, split: SplitManifest) -> str:
    """Write a model folder with its card and its split, and return the digest of the model; errors as above."""
    check_digest("the split of the model card", split.digest, card.split_digest)
    write_folder(folder, {**files, CARD: document_bytes(card), SPLIT: split.write})
    return folder_digest(folder)


def copies(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Return, by relative name, functions that copy each file of the model in a folder."""
    return {name: partial(shutil.copyfile, folder / name) for name in model_files(folder)}


def _part_files(original: Path, network: nn.Module) -> dict[str, Callable[[Path], object]]:
    """Return, by relative name, functions that write each weight file of a component."""
    state = network.state_dict()
    layout = {path: {name: _known_as(name, state) for name in _tensor_types(path)} for path in _weight_files(original)}
    if sorted(state) != sorted(known for names in layout.values() for known in names.values() if known):
        raise ModelError(
            f"the {original.name} does not fit the folder", "its tensors have other names", "start from the same model"
        )
    return {f"{original.name}/{path.name}": partial(_write_file, state, names, path) for path, names in layout.items()}


def _known_as(stored: str, state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the network's name of a stored tensor; None for positions, which older text encoders stored.

    Text encoders of older libraries are stored with the prefix `text_model.`.
    """
    if stored in state:
        return stored
    return None if stored.endswith(".position_ids") else stored.removeprefix("text_model.")


def _write_file(state: Mapping[str, torch.Tensor], names: Mapping[str, str | None], like: Path, target: Path) -> None:
    with safe_open(str(like), framework="pt") as file:
        metadata = file.metadata()
        tensors = {}
        for name, known in names.items():
            dtype = _FLOATS.get(file.get_slice(name).get_dtype())
            old = None if known and dtype else file.get_tensor(name)  # else only its type is needed
            new = old if known is None else state[known].detach()
            assert new is not None
            tensors[name] = new.to("cpu", dtype if old is None else old.dtype).contiguous()
    save_file(tensors, target, metadata=metadata)
