"""CLIP score: how well generated images match their prompts, by a CLIP model from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun_core.data.images import fitted
from salun_core.device_memory import fitting
from salun_core.digest import digest_json, sha256_file
from salun_core.errors import DataError, ModelError, UsageError

_BATCH = 64
_CONVERT = (
    "python -c \"from transformers import CLIPModel as m; m.from_pretrained('{folder}').save_pretrained('{folder}')\""
)


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model with its processor.

    Args:
        model: transformers' `CLIPModel` in eval mode.
        processor: transformers' `CLIPProcessor`.
        digest: SHA-256 over the files of its folder.
    """

    model: Any
    processor: Any
    digest: str

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> ClipScorer:
        """Read a folder that `save_pretrained` wrote: model as safetensors, tokenizer, image processor.

        Nothing is downloaded.
        """
        _check_folder(folder)
        model, processor = _read(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        digest = digest_json({path.name: sha256_file(path) for path in files})
        return cls(model.to(device).eval(), processor, digest)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the CLIP score of each image with its prompt: 100 * max(cos, 0), float64 [B] on the CPU.

        Images are uint8 [B, 3, H, W]. Prompts are cut at the model's maximum number of tokens.

        Source:
            Hessel et al., "CLIPScore", EMNLP 2021, with the factor 100 that torchmetrics uses for the paper's 2.5.
        """
        if len(images) != len(prompts):
            raise DataError(
                "images and prompts differ in number",
                f"{len(images)} against {len(prompts)}",
                "give one for each image",
            )

        def run(size: int) -> list[Tensor]:
            starts = range(0, len(images), size)
            return [self._scores(images[at : at + size], prompts[at : at + size]) for at in starts]

        parts, _ = fitting(run, _BATCH)
        found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
        if not torch.isfinite(found).all():
            raise ModelError("a CLIP score is not a number", "the CLIP model is damaged", "use another CLIP model")
        return found

    @torch.no_grad()
    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))
        pixels = list(fitted(images, 3, images.shape[2], images.shape[3]).cpu())
        longest = self.model.config.text_config.max_position_embeddings
        text = self.processor.tokenizer(unique, return_tensors="pt", padding=True, truncation=True, max_length=longest)
        inputs = {**text, **self.processor.image_processor(images=pixels, return_tensors="pt")}
        output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        chosen = torch.tensor([unique.index(prompt) for prompt in prompts], device=output.text_embeds.device)
        cosine: Tensor = (output.image_embeds.double() * output.text_embeds[chosen].double()).sum(dim=1)
        return 100 * cosine.clamp(min=0).cpu()


def _check_folder(folder: Path) -> None:
    what = f"{folder} is not a CLIP folder"
    if not (folder / "config.json").is_file():
        raise UsageError(what, "it has no config.json", "give a folder that `save_pretrained` wrote")
    if list(folder.glob("model*.safetensors")):
        return
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]:
        why = f"{pickles[0].name} is a pickle, which can run code when it is read"
        raise UsageError(f"{folder} has no safetensors", why, _CONVERT.format(folder=folder))
    raise UsageError(what, "it has no model.safetensors", "save the model there")


def _read(folder: Path) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        remedy = "run pip install 'salun[diffusion]'"
        raise UsageError("transformers is not installed", "the CLIP score needs it", remedy) from error
    try:
        read: Any = transformers.CLIPModel.from_pretrained  # its stub lacks the second result
        model, info = read(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
        processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own
        why = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the CLIP model {folder.name} cannot be read", why, "save the whole model there again"
        ) from error
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:  # transformers would initialise them at random
        why = "; ".join(faults[:6])
        raise ModelError(f"the CLIP model {folder.name} lacks weights", why, "save the whole model there again")
    return model, processor
