"""Data-parallel training: each process takes its share of every batch, and all end with the same weights.

`torchrun` starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK. Gradients are summed before the optimiser, and
so the mask, is applied. What can go wrong:

- A process fails with an error of its own: it writes its exit code to the group's store and leaves. The next collective
  call of the others fails; they read the code and end with it (`PeerError`). The first process's error is the cause.
- A process is killed, or hangs: the others wait for `TIMEOUT` in their next collective call, find no code, and end
  with 1.
- The store's host is gone: there is no code to read; they end with 1 too.
- The processes got different inputs, or their weights diverge: digests are compared at the start and after each epoch,
  and every process raises the same `IntegrityError`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from salun_core.digest import sha256_bytes
from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.sharded import is_sharded

TIMEOUT = timedelta(minutes=10)
_PEER = timedelta(seconds=5)  # time for a failing process to publish its exit code
_FAILURE = "failure"
_JOINED = itertools.count()  # a second group of the same processes needs its own keys in their store


class PeerError(SalunError):
    """Another process of the group failed; this process exits with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(
            "another process of the group failed", "this one cannot continue alone", "see the other one's error"
        )
        self.exit_code = exit_code


@dataclass(frozen=True)
class Share:
    """One process's part of a batch.

    Args:
        images: [B', C, H, W].
        labels: [B'].
        count: B'; 0 if the batch has fewer images than there are processes. One image then stands in for the share.
        weight: B' / B: times the part's mean loss, and added up over processes, it is the batch's mean.
        batch: B, the number of images of the whole batch.
    """

    images: Tensor
    labels: Tensor
    count: int
    weight: float
    batch: int

    def halves(self) -> tuple[Share, Share]:
        """Divide the part; one image is divided into itself and a stand-in without weight."""
        first = (self.count + 1) // 2
        if first == self.count:
            return self, Share(self.images[:1], self.labels[:1], 0, 0.0, self.batch)
        second, weight = self.count - first, self.weight / self.count
        return (
            Share(self.images[:first], self.labels[:first], first, weight * first, self.batch),
            Share(self.images[first:], self.labels[first:], second, weight * second, self.batch),
        )


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share the work, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> ProcessGroup:
        """Read the variables of torchrun; without them there is a single process.

        `UsageError` if RANK and WORLD_SIZE are not numbers, or contradict each other.
        """
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise UsageError(
                "RANK and WORLD_SIZE do not fit",
                f"they are {rank!r} and {size!r}",
                "start with torchrun, or unset them",
            )
        return cls(int(rank), int(size))

    @property
    def main(self) -> bool:
        """Whether this process writes, logs and reports."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """Return the positions of a batch that this process works on.

        The parts of all processes are the batch, in equal sizes as far as it can be divided. A process that gets
        nothing of a small batch gets its first image as a stand-in: it takes part in each step, with weight 0.
        """
        each, more = divmod(batch, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more)) if self.rank < batch else slice(0, 1)

    def share(self, images: Tensor, labels: Tensor) -> Share:
        """Return this process's part of a batch; all processes hold the same batch."""
        mine = self.part(len(labels))
        return self.share_of(images[mine], labels[mine], len(labels))

    def share_of(self, images: Tensor, labels: Tensor, batch: int) -> Share:
        """Return the share that consists of what `part` selected from a batch of `batch` images."""
        count = len(labels) if self.rank < batch else 0
        return Share(images, labels, count, count / batch if batch else 1.0, batch)

    def add_gradients(self, model: nn.Module) -> None:
        """Replace the gradients by their sums over all processes, in one collective call."""
        if self.size == 1 or is_sharded(model):
            return  # FSDP has added up those of sharded weights
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        together = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(together)
        sizes = [grad.numel() for grad in grads]
        for grad, summed in zip(grads, torch.split(together, sizes), strict=True):
            grad.copy_(summed.view(grad.shape))

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a scalar over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the order of their ranks, in every process.

        Rows are [N', K] on the CPU; K is the same in all processes that have rows.
        """
        if self.size == 1:
            return rows
        parts = []
        for source in range(self.size):
            shape = torch.tensor(rows.shape if source == self.rank else [0, 0])
            dist.broadcast(shape, source)
            if not shape[0]:
                continue
            part = rows.contiguous() if source == self.rank else torch.empty(shape.tolist(), dtype=rows.dtype)
            dist.broadcast(part, source)
            parts.append(part)
        return torch.cat(parts) if parts else rows

    def first(self, data: bytes | None) -> bytes | None:
        """Return the first process's bytes in every process; what the others pass does not count."""
        if self.size == 1:
            return data
        size = torch.tensor([-1 if data is None else len(data)])
        dist.broadcast(size, 0)
        if int(size) < 0:
            return None
        content = torch.frombuffer(bytearray(data or b"") if self.main else bytearray(int(size)), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return content.numpy().tobytes()

    @torch.no_grad()
    def synchronise(self, model: nn.Module) -> None:
        """Average the running statistics of batch norm; `IntegrityError` if the processes hold different weights.

        Slices of sharded weights are not compared: no two processes hold the same one.
        """
        if self.size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(self.size)
            else:
                dist.broadcast(buffer, 0)
        held = [value for value in model.state_dict().values() if not hasattr(value, "to_local")]
        hashes = [sha256_bytes(value.cpu().contiguous().numpy().tobytes()) for value in held]
        self.require_same("weights", "".join(hashes))

    def require_same(self, what: str, text: str) -> None:
        """Check that all processes hold the same text, such as a digest.

        If not, every process raises an `IntegrityError`; `what` names it in the message.
        """
        if self.size == 1:
            return
        mine = torch.frombuffer(bytearray.fromhex(sha256_bytes(text.encode())), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_of_them, mine)
        if any(not torch.equal(other, mine) for other in all_of_them):
            raise IntegrityError(
                f"the processes differ in their {what}", "they must work on the same", "give all the same files"
            )


SINGLE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class SharedCheckpoint:
    """A checkpoint that only the first process writes and reads, and all processes resume from."""

    inner: CheckpointStore
    group: ProcessGroup

    def load(self) -> bytes | None:
        """Return the latest state, or None; the same in every process."""
        return self.group.first(self.inner.load() if self.group.main else None)

    def save(self, data: bytes) -> None:
        """Replace the latest state, in the first process only."""
        if self.group.main:
            self.inner.save(data)


@contextmanager
def joined(group: ProcessGroup, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the group of processes while the block runs; nothing to do for a single process or if it has joined.

    `timeout` is how long one collective call may wait. If another process fails or times out, it raises a `PeerError`.
    """
    if group.size == 1 or dist.is_initialized():
        yield
        return
    store = _join(group, timeout)
    try:
        yield
    except BaseException as error:
        failed = _failure(error, store)
        if not torch.cuda.is_available():  # with NCCL, an orderly exit would wait for the other processes
            with suppress(RuntimeError):
                dist.destroy_process_group()
        if failed is error:
            raise
        raise failed from error
    dist.destroy_process_group()


def _join(group: ProcessGroup, timeout: timedelta) -> Store:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        found, _, _ = next(rendezvous("env://", group.rank, group.size, timeout=timeout))
        found.set_timeout(timeout)
        store = PrefixStore(f"salun-{next(_JOINED)}", found)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=group.rank, world_size=group.size)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            "cannot join the other processes", str(error).split("\n")[0], "start with torchrun; see MASTER_ADDR"
        ) from error
    return store


def _failure(error: BaseException, store: Store) -> BaseException:
    """Return what to raise: this process's own error, after it is reported to the others, or that of another one."""
    ours = not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)))
    with suppress(RuntimeError):  # the process that hosts the store may have exited
        if ours:
            store.compare_set(_FAILURE, "", str(getattr(error, "exit_code", 1)))
        else:
            store.wait([_FAILURE], _PEER)
            return PeerError(int(store.get(_FAILURE)))
    return error if ours else PeerError(1)
