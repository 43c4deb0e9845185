"""Writes a model for other programs, with its preprocessing and class names in the same file.

Nothing that other programs read names a sample: the split, the evidence and the training data stay behind.
"""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from salun_core.config import read_document
from salun_core.errors import ModelError, UsageError, unknown_name
from salun_core.models.card import CARD, require_card
from salun_core.models.checkpoint import Files, LoadedModel, load_model, write_folder
from salun_core.models.diffusers_folder import copies
from salun_core.storage.local_files import temporary_folder, write_whole

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-3  # of the largest logit: other kernels add up in another order
_IMAGES = 5  # other than the batch of the example, so that a batch size that was fixed by mistake shows
_FACTS = "salun"
LABELS = "salun.json"


def export_model(folder: Path, to: str, out: Path) -> dict[str, object]:
    """Write the model of a folder in another format.

    Returns the format, the size and, where it was checked, the largest difference of a logit. `to` is `torch`,
    `safetensors`, `onnx`, `torch-export`, `timm`, or for diffusion models `diffusers`. `out` is a file; for `timm` and
    `diffusers` a new folder. Raises ModelError if the exported file computes something else than the model; a file that
    was there is unchanged if the write fails.
    """
    if to not in {*_FORMATS, "diffusers"}:
        raise unknown_name("format", to, [*_FORMATS, "diffusers"])
    require_card(folder)
    card = read_document(folder / CARD)
    classifier = card.get("task", "classification") == "classification"
    if classifier == (to == "diffusers"):
        kind, fits = ("classifier", ", ".join(_FORMATS)) if classifier else ("diffusion model", "diffusers")
        raise UsageError(f"a {kind} cannot be exported to {to}", "the format is for other models", f"choose: {fits}")
    if to == "diffusers":
        labels = {name: card.get(name) for name in ("task", "classes", "prompt", "channels", "height", "width")}
        write_folder(out, {**copies(folder), LABELS: (json.dumps(labels, indent=1) + "\n").encode()})
        return {"format": to, "files": len(copies(folder)) + 1}
    model = load_model(folder)
    model.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if to == "timm":
        files, compared = _timm(model)
        write_folder(out, files)
        return {"format": to, "files": len(files), **compared}
    data, checked = _WRITERS[to](model)
    write_whole(out, data)
    return {"format": to, "bytes": len(data), **checked}


def facts_of(model: LoadedModel) -> dict[str, Any]:
    """Return what a program needs to feed a classifier and to name its answers."""
    card = model.card
    return {
        "architecture": card.architecture,
        "digest": model.digest,
        "classes": list(card.classes),
        "preprocessing": {
            "size": [card.height, card.width],
            "channels": card.channels,
            "scale": 1 / 255,
            "mean": list(card.mean),
            "std": list(card.std),
            "layout": "float32 [N, C, H, W] = (pixels * scale - mean) / std",
        },
    }


def _texts(model: LoadedModel) -> dict[str, str]:
    """Return the facts as texts, which is what the metadata of a file can hold."""
    facts = facts_of(model)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _state(model: LoadedModel) -> dict[str, Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in model.model.state_dict().items()}


def _torch(model: LoadedModel) -> tuple[bytes, dict[str, object]]:
    """A dict of tensors and plain values, which `torch.load(weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save({"state_dict": _state(model), **facts_of(model)}, buffer)
    return buffer.getvalue(), {}


def _safetensors(model: LoadedModel) -> tuple[bytes, dict[str, object]]:
    return save(_state(model), metadata={"format": "pt", **_texts(model)}), {}


def _torch_export(model: LoadedModel) -> tuple[bytes, dict[str, object]]:
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model.model, (_images(model, 2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, buffer, extra_files={LABELS: json.dumps(facts_of(model))})
    network = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), {"largest_difference": _compare(model, network)}


def _onnx(model: LoadedModel) -> tuple[bytes, dict[str, object]]:
    """Write ONNX with a free batch size, and compare onnxruntime's logits with torch's on the same images."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            "cannot export to onnx", f"{' and '.join(missing)} cannot be imported", "run pip install 'salun[export]'"
        )
    import onnx
    import onnxruntime

    with temporary_folder("salun-onnx-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter uses what torch itself deprecates
        path, batch = folder / "model.onnx", torch.export.Dim("batch", min=1)
        torch.onnx.export(
            model.model,
            (_images(model, 2),),
            path,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        graph = onnx.load(path)
        onnx.helper.set_model_props(graph, _texts(model))
        onnx.checker.check_model(graph)
        data: bytes = graph.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])

    return data, {"largest_difference": _compare(model, run), "checked_by": f"onnxruntime {onnxruntime.__version__}"}


def _timm(model: LoadedModel) -> tuple[Files, dict[str, object]]:
    """Write the folder that `timm.create_model("local-dir:FOLDER")` reads, and compare its logits with the model's."""
    import timm

    card = model.card
    if not hasattr(model.model, "pretrained_cfg"):
        raise UsageError(
            f"{card.architecture} cannot be exported to timm",
            "timm does not have this architecture",
            "choose: " + ", ".join(_WRITERS),
        )
    shape = [card.channels, card.height, card.width]
    preprocessing = {"input_size": shape, "mean": list(card.mean), "std": list(card.std)}
    config = {"label_names": list(card.classes), "pretrained_cfg": preprocessing}
    with temporary_folder("salun-timm-") as folder:
        timm.models.save_for_hf(model.model, str(folder), model_config=config, safe_serialization=True)
        try:
            network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except (RuntimeError, TypeError) as error:  # an older timm, which does not record channels and image size
            why = f"timm {timm.__version__} cannot build it from its own file: {str(error).splitlines()[0]}"
            raise ModelError("the export to timm failed", why, "pip install --upgrade timm") from error
        files: Files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files, {"largest_difference": _compare(model, network)}


_WRITERS: Mapping[str, Callable[[LoadedModel], tuple[bytes, dict[str, object]]]] = {
    "torch": _torch,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch-export": _torch_export,
}
_FORMATS = (*_WRITERS, "timm")


def _images(model: LoadedModel, count: int) -> Tensor:
    """Return normalised images of random pixels, [N, C, H, W]; the same in each call."""
    card, generator = model.card, torch.Generator().manual_seed(0)
    shape = (count, card.channels, card.height, card.width)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return model.normalisation.apply(pixels).contiguous()


def _compare(model: LoadedModel, exported: nn.Module | Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of a logit on the same images; refuse one beyond rounding."""
    images = _images(model, _IMAGES)
    with torch.no_grad():
        expected, found = model.model(images), exported(images)
    difference = float((expected - found).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):  # also refuses NaN
        raise ModelError(
            "the exported model computes something else",
            f"a logit differs by {difference:.3g} on the same images",
            "export to safetensors, and report the architecture",
        )
    return difference
