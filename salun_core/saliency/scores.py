"""Saliency scores: |d mean loss over the forget set / d weight|, computed by one process or by several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from salun_core.device_memory import explained
from salun_core.errors import DataError, ModelError, UsageError
from salun_core.saliency.masked_step import own

LossFn = Callable[[Tensor, Tensor], Tensor]
_MORE_MEMORY = "use a device with more memory, or compute the mask on a CPU with --device cpu or a pipeline for CPUs"


def saliency_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFn,
    *,
    samples: int | None = None,
    part: Slice | None = None,
) -> dict[str, Tensor]:
    """Score every parameter by the magnitude of the forgetting loss's gradient (SalUn, eq. 4).

    The gradient is of the mean over samples, so a short last batch does not weigh more than the others. The gradients
    of the batches are added in pairs, then the pairs in pairs, and so on (`PartialSums`): rounding errors stay small,
    and the sum does not depend on the number of processes. The call puts the model into eval mode and then restores its
    modes, gradients and `requires_grad` flags.

    Several processes in a process group can share the work. Each passes the batches of its own slice `part`, in batches
    of `CHUNK`, with the number of `samples` of the whole forget set, and all get the scores of the whole forget set.
    The scores are bit-identical to those of one process if every process computes its batches identically (see
    `repeatable`).

    `batches` yields (inputs, targets) on the model's device, and `loss_fn` returns the mean loss over a batch. The
    scores are non-negative tensors of the parameters' shapes, in the model's order; a parameter that the loss does not
    reach scores 0. If the weights are sharded, they cover only what this process holds. Raises ModelError if a gradient
    is NaN or infinite, and DataError if there is no batch or the batches do not match the slice.

    Source:
        Fan et al., "SalUn", ICLR 2024, section 4, equation (4).
    """
    if part is not None and part.count > 1:
        if samples is None:
            raise UsageError("a slice is scored without `samples`", "its share of the whole is not known", "give it")
        sums = score_slice(model, batches, loss_fn, samples, part)
        return gathered(sums, part, list(model.named_parameters())).scores()
    sums = PartialSums()

    def add(size: int, gradients: Sums) -> None:
        sums.add((0, len(sizes)), gradients)
        sizes.append(size)

    sizes: list[int] = []
    _each_gradient(model, batches, loss_fn, add)
    sums.samples = sum(sizes)
    return sums.scores()


def _each_gradient(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFn,
    add: Callable[[int, Sums], None],
) -> None:
    """Call `add` for each non-empty batch with its size and the gradient of its summed loss."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(
            "model has no parameters", "there is nothing to score", "check that the right model was loaded"
        )
    with scoring(model):
        for inputs, targets in batches:
            if len(inputs):
                # The size of a part depends on nothing but the images: other summands would have other bits, and so
                # would the mask.
                size = min(len(inputs), max(1, VALUES_AT_ONCE * len(inputs) // inputs.numel()))
                with explained(f"{size} samples, which must be scored at once, do not fit", _MORE_MEMORY):
                    for part, labels in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
                        (loss_fn(model(part), labels) * len(part)).backward()  # type: ignore[no-untyped-call]
                add(len(inputs), {name: _taken(parameter) for name, parameter in parameters.items()})


def _taken(parameter: nn.Parameter) -> Tensor:
    """Take and clear a parameter's gradient; contiguous, so that the weights' layout does not change the file."""
    grad, parameter.grad = parameter.grad, None
    if grad is None:
        return torch.zeros_like(own(parameter), requires_grad=False, memory_format=torch.contiguous_format)
    return own(grad.detach()).contiguous()


def mean_magnitude(name: str, gradient: Tensor, total: int) -> Tensor:
    """Convert the gradient of a loss summed over `total` samples to |gradient / total|, in place.

    Raises ModelError if it contains NaN or infinity.
    """
    score = gradient.div_(total).abs_()
    if not bool(torch.isfinite(score).all()):
        raise ModelError(
            f"saliency of {name} is not finite",
            "the forgetting loss has a NaN or infinite gradient",
            "check the model's weights and the images for NaN",
        )
    return score


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode with all gradients enabled and cleared, and restore its state afterwards."""
    modes = {module: module.training for module in model.modules()}
    kept = {parameter: (parameter.grad, parameter.requires_grad) for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (grad, requires_grad) in kept.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


CHUNK = 256  # samples per leaf of the summation tree; another value changes the bits of the scores
VALUES_AT_ONCE = CHUNK * 3 * 64 * 64
"""Values of images that go through the network at once: a chunk up to 64 x 64 pixels in colour, 20 images at 224 x 224.

A whole chunk of 224 x 224 pixels would need 20 to 40 GB of activations. Another number changes the bits of the scores
of larger images.
"""
Node = tuple[int, int]
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Slice:
    """The part of a forget set that one of several processes scores: a contiguous range of chunks."""

    index: int
    count: int

    def chunks(self, samples: int) -> range:
        """Return this slice's range of chunks of a set with `samples` samples; it may be empty."""
        total = chunks_of(samples)
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def samples(self, samples: int) -> range:
        """Return the positions of this slice's samples in the forget set."""
        chunks = self.chunks(samples)
        return range(chunks.start * CHUNK, min(chunks.stop * CHUNK, samples))


def chunks_of(samples: int) -> int:
    """Return the number of chunks, at least one; raises DataError if there are no samples."""
    if samples < 1:
        raise DataError("forget set is empty", "there is nothing to score", "name at least one sample to forget")
    return -(-samples // CHUNK)


@dataclass
class PartialSums:
    """Sums of gradients over some chunks of a forget set, added as far as the tree allows.

    Chunks are the leaves of a binary tree, and each inner node is the sum of its two children. So the order of the
    additions depends on the number of chunks alone, not on the process that computes a chunk.

    Args:
        total: number of samples of the whole forget set, in chunks of `CHUNK`; None if known only after the last chunk.
        nodes: by (level, index): the sums over chunks `index << level` up to `(index + 1) << level`, by parameter.
        samples: number of samples that the scores average over.
    """

    total: int | None = None
    nodes: dict[Node, Sums] = field(default_factory=dict)
    samples: int = 0

    def __post_init__(self) -> None:
        self.samples = self.total or 0

    @property
    def root(self) -> Node | None:
        """The node that covers all chunks; None if their number is unknown."""
        return None if self.total is None else ((chunks_of(self.total) - 1).bit_length(), 0)

    def add(self, node: Node, sums: Sums) -> None:
        """Insert the contiguous sums of one node (level, index) and add all complete pairs.

        The object takes ownership of the tensors. The node must not overlap with a node that was inserted before.
        """
        while node != self.root:
            level, index = node
            sibling = (level, index ^ 1)
            if self.total is None or sibling[1] << level < chunks_of(self.total):  # else the sibling has no chunk
                if sibling not in self.nodes:
                    break
                other = self.nodes.pop(sibling)
                left, right = (other, sums) if index & 1 else (sums, other)
                sums = _added(left, right)
            node = (level + 1, index >> 1)
        self.nodes[node] = sums

    def scores(self) -> dict[str, Tensor]:
        """Return the scores, |mean gradient|, by parameter name; the call consumes the sums.

        Raises UsageError if some chunks are missing, and ModelError if a score is NaN or infinite.
        """
        if self.total is None:
            if not self.nodes:
                chunks_of(0)
            # Without the number of chunks, nodes at the right edge have no siblings; add them from the right.
            while len(self.nodes) > 1:
                *_, left, right = sorted(self.nodes, key=lambda node: node[1] << node[0])
                self.nodes[left] = _added(self.nodes[left], self.nodes.pop(right))
        elif set(self.nodes) != {self.root}:
            raise UsageError("the saliency is not complete", "some of its chunks are missing", "add all chunks")
        _, sums = self.nodes.popitem()
        return {name: mean_magnitude(name, value, self.samples) for name, value in sums.items()}


def _added(left: Sums, right: Sums) -> Sums:
    return {name: value.add_(right[name]) for name, value in left.items()}


def layout(samples: int, part: Slice) -> list[Node]:
    """Return the nodes that remain after the sums of a slice, in the order of their chunks."""
    empty = PartialSums(samples)
    for number in part.chunks(samples):
        empty.add((0, number), {})
    return sorted(empty.nodes, key=lambda node: node[1] << node[0])


def score_slice(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFn,
    samples: int,
    part: Slice,
) -> PartialSums:
    """Sum the gradients of one slice of the forget set; the model is restored afterwards.

    The batches have `part.samples` in the set's order, in batches of `CHUNK`; `samples` counts the whole forget set.
    `loss_fn` returns the mean loss of a batch. The result has no nodes if the slice is empty. Raises DataError if the
    batches do not match the slice's chunks.
    """
    sums, left = PartialSums(samples), list(part.chunks(samples))

    def add(size: int, gradients: Sums) -> None:
        if not left:
            raise _other_chunks(part, samples, "there are more batches than chunks")
        number = left.pop(0)
        expected = min(CHUNK, samples - number * CHUNK)
        if size != expected:
            raise _other_chunks(part, samples, f"chunk {number + 1} has {expected} samples, its batch has {size}")
        sums.add((0, number), gradients)

    _each_gradient(model, batches, loss_fn, add)
    if left:
        raise _other_chunks(part, samples, f"chunk {left[0] + 1} has no batch")
    return sums


def _other_chunks(part: Slice, samples: int, why: str) -> DataError:
    mine = part.samples(samples)
    return DataError(
        f"the batches are not the chunks of slice {part.index + 1} of {part.count}",
        why,
        f"give the samples {mine.start} to {mine.stop} of {samples}, in order and in batches of {CHUNK}",
    )


@contextmanager
def repeatable() -> Iterator[None]:
    """Compute with one CPU thread and deterministic kernels, so that a batch has the same gradient everywhere.

    The number of CPU threads determines how a sum is split, and processes that share a machine have fewer threads each
    than one process alone. Wrap the scoring in this context to get the same bits for any number of threads and
    processes; it costs the speed of the other threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


def gathered(own: PartialSums, part: Slice, parameters: Sequence[tuple[str, nn.Parameter]]) -> PartialSums:
    """Combine the sums of all processes: every rank sends its nodes in turn, and all add them in the same order."""
    whole = PartialSums(own.samples)
    for source in range(part.count):
        for node in layout(own.samples, Slice(source, part.count)):
            sums = own.nodes[node] if source == part.index else _room(parameters)
            for value in sums.values():
                dist.broadcast(value, source)
            whole.add(node, sums)
    return whole


def _room(parameters: Sequence[tuple[str, nn.Parameter]]) -> Sums:
    return {
        name: torch.empty_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
        for name, parameter in parameters
    }
