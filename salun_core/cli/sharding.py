"""Work in several processes or shards: starting them, and the verbs' part in scoring and merging."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from salun_core.cli.output import emit_facts
from salun_core.errors import UsageError

if TYPE_CHECKING:
    from salun_core.saliency import SaliencyMask
    from salun_core.saliency.shards import Shard

_OPTION = "--processes"


def silent() -> bool:
    """Whether this is one of several processes and not the one that prints."""
    return os.environ.get("RANK", "0") != "0"


def check_shards(
    shard: str | None, merge: bool, files: list[Path], processes: int, random_seed: int | None
) -> Shard | None:
    """Check which of the options go together.

    Returns:
        The shard to score, if one was named.

    Raises:
        UsageError: they do not.
    """
    from salun_core.saliency.shards import Shard

    ways = [shard is not None, merge, processes > 1, random_seed is not None]
    if sum(ways[:3]) > 1 or (sum(ways) > 1 and not ways[2]):
        raise UsageError("these options exclude each other", "--shard, --merge, --processes", "give one of them")
    if bool(files) != merge:
        raise UsageError("--merge and the files of shards go together", "one is missing", "write --merge shard-*")
    return None if shard is None else Shard.parse(shard)


def score_one(model: Path, forget: str, shard: Shard, out: Path, data: str | None, device: str) -> None:
    """Score one shard, write its file and print what it is."""
    from salun_core.steps.sharding import score_shard

    header = score_shard(model, forget, shard, out, data=data, device=device)
    samples = len(shard.samples(header.samples))
    emit_facts({"shard": out, "number": str(shard), "samples": samples, "of": header.samples})


def merge_files(
    model: Path, forget: str, files: list[Path], density: float, out: Path, data: str | None
) -> SaliencyMask:
    """Merge the files of all shards into a mask and write it."""
    from salun_core.steps.sharding import merge_scores

    return merge_scores(model, forget, files, density, out, data=data)


def launch(processes: int) -> None:
    """Run this very command in several processes on this machine, joined as torchrun joins them.

    Args:
        processes: how many.

    Raises:
        typer.Exit: one failed; with the exit code of the first that did.
        UsageError: this is one of several processes already.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from salun_core.steps.processes import joined

    if "WORLD_SIZE" in os.environ:
        raise UsageError(f"{_OPTION} within torchrun", "torchrun has started the processes", f"leave {_OPTION} out")
    try:
        joined(processes, sys.executable)("-m", "salun_core.cli", *_without_option(sys.argv[1:]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise typer.Exit(code if code > 0 else 128 - code) from error
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from error


def _without_option(arguments: list[str]) -> list[str]:
    """Leave `--processes N` out of the arguments of a verb."""
    kept = [word for word in arguments if not word.startswith(f"{_OPTION}=")]
    if _OPTION in kept:
        place = kept.index(_OPTION)
        del kept[place : place + 2]
    return kept
