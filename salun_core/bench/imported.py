"""Takes a model that lies in a folder over into a bench, with the bench's own evaluation on its card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from salun_core.config import read_document
from salun_core.data import DataSpec
from salun_core.errors import UsageError
from salun_core.models.checkpoint import CARD
from salun_core.models.generation_card import GenerationCard, GenerationEvaluation, parse_card
from salun_core.storage.local import write_whole


def taken_over(source: Path, folder: Path, spec: DataSpec | None, prompt: str) -> None:
    """Make the base model of a bench out of a folder.

    The weights are linked where the file system can, not copied.

    Args:
        source: a model folder of either kind, or a plain diffusers folder.
        folder: where the base model goes.
        spec: the data of a plain diffusers folder.
        prompt: what it calls an image of a class.

    Raises:
        UsageError: there is no such folder.
    """
    if not source.is_dir():
        raise UsageError(f"there is no model folder {source}", "the suite names it", "put the model there, or a link")
    if not (source / CARD).is_file():
        from salun_core.steps.generation_import import import_diffusion

        import_diffusion(str(source), spec, folder, prompt)
        return
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def with_evaluation(folder: Path, evaluation: GenerationEvaluation) -> None:
    """Set how the images of a model are judged, on its card alone; a classifier's card has no such part."""
    card = parse_card(read_document(folder / CARD), str(folder / CARD))
    if isinstance(card, GenerationCard) and card.evaluation != evaluation:
        given = card.model_copy(update={"evaluation": evaluation})
        write_whole(folder / CARD, (given.model_dump_json(indent=1) + "\n").encode())


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
