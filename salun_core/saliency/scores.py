"""Saliency scores: |d mean loss over the forget set / d weight|, whole or in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from salun_core.errors import DataError, ModelError, UsageError

LossFn = Callable[[Tensor, Tensor], Tensor]


def saliency_scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn) -> dict[str, Tensor]:
    """Score every parameter by the magnitude of the forgetting loss's gradient (SalUn, eq. 4).

    The gradient is of the mean over samples, so a short last batch does not weigh more than the others. It is
    accumulated in `.grad` itself: no second copy of the model is made. The model is in eval mode meanwhile;
    its modes, its gradients and its `requires_grad` flags are as before afterwards.

    Args:
        model: the original model θ_o, unchanged by the call.
        batches: the forget set D_f once, as (inputs, targets) on the model's device.
        loss_fn: (model output, targets) -> mean loss over the batch, a scalar.

    Returns:
        By parameter name, in the model's order: a tensor of the parameter's shape, >= 0. A parameter that the
        loss does not reach scores 0.

    Raises:
        DataError: there is no batch.
        ModelError: the model has no parameters, or a gradient is NaN or infinite.

    Source:
        Fan et al., "SalUn", ICLR 2024, section 4, equation (4).
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(
            "model has no parameters", "there is nothing to score", "check that the right model was loaded"
        )
    with scoring(model):
        total = _accumulate(model, batches, loss_fn)
        if total == 0:
            raise DataError("forget set is empty", "no batch was given to score", "name at least one sample to forget")
        return {name: _score(name, parameter, total) for name, parameter in parameters.items()}


def _accumulate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn) -> int:
    total = 0
    for inputs, targets in batches:
        size = len(inputs)
        if size == 0:
            continue
        (loss_fn(model(inputs), targets) * size).backward()  # type: ignore[no-untyped-call]
        total += size
    return total


def _score(name: str, parameter: nn.Parameter, total: int) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    score = mean_magnitude(name, parameter.grad.detach(), total)
    parameter.grad = None
    return score


def mean_magnitude(name: str, gradient: Tensor, total: int) -> Tensor:
    """Turn the gradient of a sum over samples into the score, in place.

    Args:
        name: of the parameter.
        gradient: of the summed loss, of the parameter's shape.
        total: number of samples.

    Returns:
        The same tensor, |gradient / total|.

    Raises:
        ModelError: it is NaN or infinite somewhere.
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
    """Put a model into eval mode with every gradient asked for and none there; leave it as it was.

    Args:
        model: to take gradients of.
    """
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


CHUNK = 256
Node = tuple[int, int]
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """One of several shares of a forget set: a run of whole chunks.

    Args:
        index: from 0.
        count: of all shards.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `2/8`, the second of eight.

        Raises:
            UsageError: it is something else.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UsageError(f"{text!r} is no shard", "it has the form NUMBER/COUNT, counted from 1", "write 2/8")
        return cls(int(number) - 1, int(count))

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def chunks(self, samples: int) -> range:
        """Return the numbers of this shard's chunks, where there are `samples` samples in all; it may be empty."""
        total = chunks_of(samples)
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def samples(self, samples: int) -> range:
        """Return the positions of this shard's samples in the forget set."""
        chunks = self.chunks(samples)
        return range(chunks.start * CHUNK, min(chunks.stop * CHUNK, samples))


WHOLE = Shard()


def chunks_of(samples: int) -> int:
    """Return how many chunks there are.

    Raises:
        DataError: there are no samples.
    """
    if samples < 1:
        raise DataError("forget set is empty", "there is nothing to score", "name at least one sample to forget")
    return -(-samples // CHUNK)


@dataclass
class PartialSums:
    """Sums of gradients over some chunks of a forget set, added up as far as the tree allows.

    Args:
        samples: of the whole forget set.
        nodes: by (level, index): the sums over chunks `index << level` up to `(index + 1) << level`, by parameter.
    """

    samples: int
    nodes: dict[Node, Sums] = field(default_factory=dict)

    @property
    def root(self) -> Node:
        """The node that covers every chunk."""
        return (chunks_of(self.samples) - 1).bit_length(), 0

    def add(self, node: Node, sums: Sums) -> None:
        """Put in the sums of one node, and add what now can be added; the tensors are taken over.

        Args:
            node: (level, index); no other node that was put in covers any of its chunks.
            sums: by parameter name, contiguous.
        """
        while node != self.root:
            level, index = node
            neighbour = (level, index ^ 1)
            if neighbour[1] << level < chunks_of(self.samples):
                if neighbour not in self.nodes:
                    break
                other = self.nodes.pop(neighbour)
                left, right = (other, sums) if index & 1 else (sums, other)
                sums = {name: value.add_(right[name]) for name, value in left.items()}
            node = (level + 1, index >> 1)
        self.nodes[node] = sums

    def scores(self) -> dict[str, Tensor]:
        """Return the scores, |mean gradient|, by parameter name; the sums are used up.

        Raises:
            UsageError: some chunks are missing.
            ModelError: a score is NaN or infinite.
        """
        if set(self.nodes) != {self.root}:
            raise UsageError("the saliency is not complete", "some shards of it are missing", "add all shards")
        sums = self.nodes.pop(self.root)
        return {name: mean_magnitude(name, value, self.samples) for name, value in sums.items()}


def layout(samples: int, shard: Shard) -> list[Node]:
    """Return the nodes that a shard is left with, in the order of their chunks."""
    empty = PartialSums(samples)
    for number in shard.chunks(samples):
        empty.add((0, number), {})
    return sorted(empty.nodes, key=lambda node: node[1] << node[0])


def score_shard(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFn,
    samples: int,
    shard: Shard = WHOLE,
) -> PartialSums:
    """Sum the gradients of one shard of the forget set.

    Args:
        model: the original model θ_o; it is as before afterwards.
        batches: the shard's samples (`shard.samples`) in the set's order, in batches of `CHUNK`.
        loss_fn: (model output, targets) -> mean loss over the batch, a scalar.
        samples: of the whole forget set.
        shard: which of the shards.

    Returns:
        The sums over the shard's chunks.

    Raises:
        DataError: the batches are not the shard's chunks.
        ModelError: the model has no parameters.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError("model has no parameters", "there is nothing to score", "check that the right one was loaded")
    sums, left = PartialSums(samples), list(shard.chunks(samples))
    with scoring(model), _repeatable():
        for inputs, targets in batches:
            number = left.pop(0) if left else chunks_of(samples)
            if len(inputs) != min(CHUNK, samples - number * CHUNK):
                raise _other_chunks(shard)
            (loss_fn(model(inputs), targets) * len(inputs)).backward()  # type: ignore[no-untyped-call]
            sums.add((0, number), {name: _taken(parameter) for name, parameter in parameters.items()})
    if left:
        raise _other_chunks(shard)
    return sums


@contextmanager
def _repeatable() -> Iterator[None]:
    """Compute a chunk alike wherever it is: threads of a CPU share a sum as their number says, so there is one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


def _taken(parameter: nn.Parameter) -> Tensor:
    grad, parameter.grad = parameter.grad, None
    if grad is None:
        return torch.zeros_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
    return grad.detach().contiguous()


def _other_chunks(shard: Shard) -> DataError:
    return DataError(
        f"the batches are not those of shard {shard}", "its chunks have other sizes", f"give batches of {CHUNK} samples"
    )


def sharded_scores(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn, samples: int, shard: Shard = WHOLE
) -> dict[str, Tensor]:
    """Score every parameter as `saliency_scores` does, with the same bits for any number of processes.

    With more than one shard, a process group of torch must have been joined, and each process scores the shard of
    its rank. All get the whole result.

    Args:
        model: the original model θ_o, the same in every process.
        batches: this process's samples (`shard.samples`), in batches of `CHUNK`.
        loss_fn: (model output, targets) -> mean loss over the batch, a scalar.
        samples: of the whole forget set.
        shard: of this process: (rank, number of processes).

    Returns:
        By parameter name, in the model's order: a tensor of the parameter's shape, >= 0.

    Raises:
        DataError: the forget set is empty, or the batches are not the shard's chunks.
        ModelError: the model has no parameters, or a gradient is NaN or infinite.
    """
    sums = score_shard(model, batches, loss_fn, samples, shard)
    return (gathered(sums, shard, list(model.named_parameters())) if shard.count > 1 else sums).scores()


def gathered(own: PartialSums, shard: Shard, parameters: Sequence[tuple[str, nn.Parameter]]) -> PartialSums:
    """Give each process the sums of all: every rank sends its nodes in turn, and all add them in the same order.

    Args:
        own: of this process's shard.
        shard: (rank, number of processes).
        parameters: names, shapes and device.

    Returns:
        The sums over all chunks.
    """
    whole = PartialSums(own.samples)
    for source in range(shard.count):
        for node in layout(own.samples, Shard(source, shard.count)):
            sums = own.nodes[node] if source == shard.index else _room(parameters)
            for value in sums.values():
                dist.broadcast(value, source)
            whole.add(node, sums)
    return whole


def _room(parameters: Sequence[tuple[str, nn.Parameter]]) -> Sums:
    return {
        name: torch.empty_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
        for name, parameter in parameters
    }
