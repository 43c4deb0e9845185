"""Steps in several processes: joined by torchrun, or one shard of the saliency each, whose files are merged."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from salun_core.data import ImageSet
from salun_core.methods.classification import pick_device
from salun_core.methods.distributed import ProcessGroup, joined
from salun_core.saliency import SaliencyMask
from salun_core.saliency.scores import CHUNK, Shard, sharded_scores
from salun_core.saliency.scores import score_shard as partial_sums
from salun_core.saliency.shard_file import ShardHeader, merge_shards, write_shard
from salun_core.steps.observe import RunRef, observed
from salun_core.tasks.classification.inputs import Inputs, load_inputs
from salun_core.telemetry.push import StepMetrics


class AnyInputs(Protocol):
    """What classifiers and diffusion models have in common: each part has a digest."""

    @property
    def original(self) -> Digested:
        """The model before."""
        ...

    @property
    def forget_set(self) -> Digested:
        """What is to be forgotten."""
        ...


class Digested(Protocol):
    """Something with a digest."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex."""
        ...


@contextmanager
def distributed(step: str, model_line: str, run: RunRef | None = None) -> Iterator[tuple[StepMetrics, ProcessGroup]]:
    """Observe a step and join the processes that torchrun started; the first one alone logs, records and pushes.

    Args:
        step: its name.
        model_line: the line it works on.
        run: the run of the deletion ledger that it belongs to.

    Yields:
        The step's metrics, and which process this is.

    Raises:
        PeerError: another process failed.
    """
    group = ProcessGroup.from_environment()
    if group.main:
        with observed(step, model_line, run) as metrics, joined(group):
            yield metrics, group
    else:
        with joined(group):
            yield StepMetrics(), group


def require_same_inputs(inputs: AnyInputs, group: ProcessGroup) -> None:
    """Check that all processes have the same model and forget set.

    Raises:
        IntegrityError: they have not.
    """
    group.require_same("model or forget set", f"{inputs.original.digest} {inputs.forget_set.digest}")


def forget_scores(network: nn.Module, forget: ImageSet, device: torch.device, group: ProcessGroup) -> dict[str, Tensor]:
    """Score a model on its forget set, this process its share of it.

    Args:
        network: on the device.
        forget: D_f, in its order.
        device: to compute on.
        group: this process.

    Returns:
        The scores by parameter name, the same bits for any number of processes.
    """
    shard = Shard(group.rank, group.size)
    mine = forget.select(shard.samples(len(forget))).to(device)
    loss = torch.nn.functional.cross_entropy
    return sharded_scores(network, mine.batches(CHUNK), loss, len(forget), shard)


def score_shard(
    model: Path,
    forget_manifest_uri: str,
    shard: Shard,
    out: Path,
    *,
    model_line: str = "local",
    data: str | None = None,
    device: str = "auto",
    run: RunRef | None = None,
) -> ShardHeader:
    """Score one shard of the forget set and write its sums, to be merged into a mask.

    Args:
        model: folder of the original model.
        forget_manifest_uri: address of the forget targets.
        shard: which one of how many.
        out: file to write.
        model_line: for the metrics.
        data: data set spec, where the data lie elsewhere than the model card says.
        device: auto, cpu, cuda or cuda:N.
        run: the run of the deletion ledger that it belongs to.

    Returns:
        The file's header.
    """
    with observed("compute_mask", model_line, run):
        started = time.perf_counter()
        inputs = load_inputs(model, forget_manifest_uri, data)
        chosen = pick_device(device)
        network = inputs.original.model.to(chosen)
        samples = len(inputs.forget)
        mine = inputs.forget.select(shard.samples(samples)).to(chosen)
        sums = partial_sums(network, mine.batches(CHUNK), torch.nn.functional.cross_entropy, samples, shard)
        header = ShardHeader(
            index=shard.index,
            count=shard.count,
            samples=samples,
            shapes={name: list(parameter.shape) for name, parameter in network.named_parameters()},
            order=[name for name, _ in network.named_parameters()],
            **_digests(inputs),
            engine=_engine(chosen),
            seconds=time.perf_counter() - started,
        )
        write_shard(out, sums, header)
        return header


def merge_scores(
    model: Path,
    forget_manifest_uri: str,
    shards: Sequence[Path],
    density: float,
    out: Path,
    *,
    model_line: str = "local",
    data: str | None = None,
    run: RunRef | None = None,
) -> SaliencyMask:
    """Add the shards of a saliency up and write the mask: the same bits as of one process alone.

    Args:
        model: folder of the original model.
        forget_manifest_uri: address of the forget targets.
        shards: the files of all shards, in any order.
        density: share of weights to keep salient, in (0, 1].
        out: file to write.
        model_line: for the metrics.
        data: data set spec, where the data lie elsewhere than the model card says.
        run: the run of the deletion ledger that it belongs to.

    Returns:
        The mask.

    Raises:
        UsageError: a shard is missing or given twice.
        IntegrityError: a shard is damaged, or of another model or forget set.
    """
    with observed("compute_mask", model_line, run) as metrics:
        digests = _digests(load_inputs(model, forget_manifest_uri, data))
        scores, facts = merge_shards(shards, digests)
        mask = SaliencyMask.from_scores(scores, density).with_facts({**digests, **facts})
        mask.save(out)
        metrics.record("salun_mask_density_ratio", mask.density, method="salun")
        return mask


def _digests(inputs: Inputs) -> dict[str, str]:
    return {"model_digest": inputs.original.digest, "forget_set_digest": inputs.forget_set.digest}


def _engine(device: torch.device) -> str:
    """Say what decides on the last bits of a chunk's gradient."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"torch {torch.__version__}, {name}"
