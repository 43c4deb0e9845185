"""Says by one digest which model a version's files are, whether a single file of weights or a diffusers folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from salun_core.digest import digest_json
from salun_core.errors import ModelError

SINGLE_WEIGHTS, PIPELINE_INDEX = "model.safetensors", "model_index.json"


def weight_files(names: Iterable[str]) -> list[str]:
    """Return those of a version's files that hold weights, sorted: `model.safetensors`, or any in a folder.

    Args:
        names: of all files, with `/` between folders.

    Example:
        >>> weight_files(["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "mask.safetensors"])
        ['unet/diffusion_pytorch_model.safetensors']
    """
    return sorted(name for name in names if name == SINGLE_WEIGHTS or ("/" in name and name.endswith(".safetensors")))


def weights_digest(files: Mapping[str, str]) -> str:
    """Return the digest that a model is known by, from the digests of its files.

    Of a single file of weights it is that file's SHA-256. Of a diffusers folder it is the SHA-256 of the canonical
    JSON of `{name: SHA-256}` over `model_index.json` and every file in a folder: scheduler and tokenizer make the
    images too.

    Args:
        files: name, with `/` between folders -> SHA-256 in hex; others beside the model's do not matter.

    Raises:
        ModelError: there are no weights, or two models at once.
    """
    weights = weight_files(files)
    single, folders = SINGLE_WEIGHTS in weights, PIPELINE_INDEX in files
    if single and not folders and weights == [SINGLE_WEIGHTS]:
        return files[SINGLE_WEIGHTS]
    if folders and not single and weights:
        return digest_json({name: digest for name, digest in files.items() if name == PIPELINE_INDEX or "/" in name})
    raise _no_model(single and (folders or len(weights) > 1))


def _no_model(both: bool) -> ModelError:
    return ModelError(
        "the files are two models at once" if both else "the files are no model",
        f"a model has {SINGLE_WEIGHTS}, or {PIPELINE_INDEX} and folders with weights in safetensors",
        "leave one of the two" if both else "give the whole folder of the model",
    )
