"""Training with weights that are sharded over processes, for models that do not fit one device (torch's FSDP2).

Each process keeps a slice of every parameter along its first dimension, and the same slice of its gradient, of the
optimiser's state and of the mask. `fully_shard` collects a block's weights before its forward and its backward pass and
drops them afterwards. A step is elementwise and works on the slices alone, so weights outside the mask keep their bits.

All processes must run the same forward and backward passes in the same order. A process that runs another number of
them waits in a collective call until the others fail or the time of the group is over (`distributed.TIMEOUT`). So a
batch is never divided when a device is full, and methods whose passes depend on measurements are refused.

Saliency scores have the bits of one process: every process computes the gradient of the same whole batch, and all but
the first one multiply their loss by 0. The sum over processes is then the first one's gradient, without any rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from salun_core.errors import UsageError
from salun_core.saliency.masked_step import own, own_part

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_STATE = {"sgd": 1, "adam": 2, "adamw": 2}  # moments of each weight


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose weights are collected together, by name; a block precedes those inside it.

    A block is an element of a list or a sequence of modules with at least two layers that have parameters: a layer of
    a transformer, a residual block. What is in no block belongs to the model as a whole.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        for name, child in module.named_children() if isinstance(module, _CONTAINERS) else ():
            if sum(any(True for _ in layer.parameters(recurse=False)) for layer in child.modules()) > 1:
                found[f"{path}.{name}".lstrip(".")] = child
    return found


def shard_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model's weights over all processes, in place, to `DTensor`s; each keeps its slices on its device.

    The model must be the same in all processes, in main memory. Blocks move to the device one after the other, so the
    whole model need not fit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in (*reversed(blocks_of(model).values()), model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss of a process is its share of the batch's mean, so gradients are added up, not averaged. Gloo
            # has no other reduction than the sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a model are slices."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the slices of all processes; every process must call it. Other tensors stay as they are."""
    collect = getattr(tensor, "full_tensor", None)
    return tensor if collect is None else collect()


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's slice of a tensor, sharded as a parameter of its shape; as it is if that is not sharded."""
    if not hasattr(parameter, "to_local"):
        return tensor
    return _as_slice(own_part(tensor, parameter).to(own(parameter).device).clone(), parameter)


def _as_slice(slices: Tensor, parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(slices, mesh, placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a model, sharded or not; each process takes its slices."""
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    for name, value in model.state_dict().items():
        own(value).copy_(own_part(state[name], value))


@torch.no_grad()
def collected(model: nn.Module, like: nn.Module, main: bool) -> nn.Module:
    """Return a sharded model as a whole, in main memory of the first process; every process must call it.

    One tensor at a time is whole on the device. `like` is a module of the same architecture that is not sharded. The
    other processes get a model on the meta device, without weights.
    """
    target = copy.deepcopy(like).to("cpu" if main else "meta")
    named = target.state_dict()
    for name, value in model.state_dict().items():
        found = whole(value)
        if main:
            named[name].copy_(found)
    return target


def collected_scores(model: nn.Module, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores as a whole from slices by parameter name, in main memory of every process.

    Every process must call it.
    """
    parameters = dict(model.named_parameters())
    return {name: whole(_as_slice(value, parameters[name])).cpu() for name, value in slices.items()}


def require_several(size: int) -> None:
    """Raise `UsageError` if there is one process only: there is nothing to shard over."""
    if size == 1:
        raise UsageError(
            "one process cannot shard the weights",
            "sharding: fsdp divides them over several",
            "start several, by --processes or torchrun, or leave `sharding` out",
        )


def bytes_per_process(model: nn.Module, size: int, optimizer: str = "adam", masked: bool = True) -> int:
    """Return the memory in bytes that one of several processes needs for a training step, without activations.

    Slices of float32 weights, gradients and moments, one byte of the mask for each weight, and what is collected at
    once: the weights outside all blocks, those of two blocks, because one is collected while another one computes, and
    the gradients of one. The model may be on the meta device; a `size` of 1 is a training without sharding.
    """
    each = 4 * (2 + _STATE[optimizer]) + masked
    slices = sum(-(-len(item) // size) * item[0].numel() if item.dim() else 1 for item in _weights(model))
    if size == 1:
        return each * slices
    units = sorted(_units(model).values(), reverse=True)
    outside, *blocks = [_outside(model), *units]
    return each * slices + 4 * (outside + 2 * max(blocks, default=0) + max(blocks, default=outside))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in model.parameters() if parameter.numel())


def _units(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each block, without those of the blocks inside it."""
    blocks = blocks_of(model)
    sizes = {name: sum(item.numel() for item in block.parameters()) for name, block in blocks.items()}
    inner = {name: _nearest(name, blocks) for name in blocks}
    return {name: sizes[name] - sum(sizes[other] for other in blocks if inner[other] == name) for name in blocks}


def _nearest(name: str, blocks: Mapping[str, nn.Module]) -> str:
    """Return the name of the smallest block around another one; empty if there is none."""
    return max((other for other in blocks if name.startswith(f"{other}.")), key=len, default="")


def _outside(model: nn.Module) -> int:
    blocks = blocks_of(model)
    inside = {id(item) for block in blocks.values() for item in block.parameters()}
    return sum(item.numel() for item in model.parameters() if id(item) not in inside)
