"""The masked optimizer step: a hook before torch's own step keeps weights outside the mask bit-identical.

Update rule (SalUn, eq. 3): θ_u = m ⊙ θ + (1 - m) ⊙ θ_o. The hook sets the gradient, including weight decay, to +0
outside the mask. Momentum, second moments and the update are then zero there, and subtracting `lr * 0` keeps all bits
of a weight. So θ_o is not copied, and torch does the arithmetic: salient weights get the same bits as without a mask.
A hook after the step would have to restore the weights, and the moments of frozen weights would still grow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from salun_core.errors import ModelError, UsageError
from salun_core.saliency.mask import SaliencyMask

O = TypeVar("O", bound=Optimizer)  # noqa: E741
_DECAY = "masked_weight_decay"
# Second moments outside the mask are 1, not 0: their numerator is 0, and torch's square root of 0 is slow on a CPU.
_MOMENTS = {"momentum_buffer": 0.0, "exp_avg": 0.0, "exp_avg_sq": 1.0, "max_exp_avg_sq": 1.0}
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def masked_optimizer(torch_optimizer: O, model: nn.Module, mask: SaliencyMask) -> O:
    """Make an optimizer (SGD, Adam or AdamW) leave every weight outside the mask bit-identical.

    The optimizer is changed in place and returned. It still works with schedulers, gradient scalers and data
    parallelism. Its `weight_decay` moves to the group key `masked_weight_decay` and acts inside the mask only. A step
    changes `.grad` (mask, weight decay): zero it before the next backward pass. The mask has exactly the model's
    parameters. Raises UsageError if the optimizer is of another type or already has a mask, and ModelError if the
    parameters do not fit.
    """
    if type(torch_optimizer) not in (SGD, Adam, AdamW):
        kind = type(torch_optimizer).__name__
        raise UsageError(
            f"{kind} cannot be masked",
            "bit-exact freezing is proven for SGD, Adam and AdamW",
            "use one of them",
        )
    if any(_DECAY in group for group in torch_optimizer.param_groups):
        raise UsageError(
            "the optimizer already has a mask",
            "two masks would be combined without notice",
            "build a new optimizer",
        )
    mask.check_fits({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    if any("betas" in group and not float(group["eps"]) for group in torch_optimizer.param_groups):
        raise UsageError(
            "Adam with eps = 0 cannot be masked", "the update of frozen weights would be 0 / 0", "set eps above 0"
        )
    keep = _keep_of(torch_optimizer, model, mask)
    _take_over(torch_optimizer, keep)
    torch_optimizer.register_step_pre_hook(functools.partial(_before_step, keep=keep))
    _after_first_steps(torch_optimizer, keep)
    torch_optimizer.register_load_state_dict_post_hook(functools.partial(_take_over, keep=keep))
    return torch_optimizer


def own(tensor: Tensor) -> Tensor:
    """Return this process's slice of a tensor that is sharded over processes (`DTensor`), sharing its memory.

    Other tensors are returned as they are.
    """
    sliced: Any = tensor.detach() if hasattr(tensor, "to_local") else None
    return tensor if sliced is None else sliced.to_local()


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor, the same in all processes, that this process's slice of a sharded one covers.

    If `like`, of the same shape, is not sharded, `whole` is returned.
    """
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return whole
    parts = torch.chunk(whole, mesh.size())  # as FSDP divides a parameter; the last processes may get nothing
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def _keep_of(optimizer: Optimizer, model: nn.Module, mask: SaliencyMask) -> dict[Tensor, Tensor]:
    """Return, by parameter, int8 values in its memory layout: -1 (all bits set) for salient weights, 0 for frozen."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    keep: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ModelError(
                    "the optimizer has a parameter that is not the model's",
                    "the mask does not cover it",
                    "build it from model.parameters()",
                )
            if parameter.dtype not in _BITS:
                raise UsageError(
                    f"{names[parameter]} cannot be masked", f"it is of type {parameter.dtype}", "use floating point"
                )
            salient, mine = own_part(mask.tensor(names[parameter]), parameter), own(parameter)
            keep[parameter] = torch.empty_like(mine, dtype=torch.int8, requires_grad=False).copy_(salient).neg_()
    return keep


def _take_over(optimizer: Optimizer, keep: dict[Tensor, Tensor]) -> None:
    """Move weight decay to the key of the mask and clear old moments outside the mask; also needed after a load."""
    _move_decay(optimizer)
    _clear_moments(optimizer, keep, optimizer.state)


def _move_decay(optimizer: Optimizer) -> None:
    """Move `weight_decay` to another key, because torch would apply it to frozen weights."""
    for group in optimizer.param_groups:
        group[_DECAY] = group["weight_decay"] or group.get(_DECAY, 0.0)
        group["weight_decay"] = 0.0


def _clear_moments(optimizer: Optimizer, keep: dict[Tensor, Tensor], parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        state = optimizer.state[parameter]
        for key, neutral in _MOMENTS.items():
            if isinstance(state.get(key), Tensor):
                state[key] = _laid_out_as(parameter, state[key])
                own(state[key]).masked_fill_(keep[parameter] == 0, neutral)


def _laid_out_as(parameter: Tensor, values: Tensor) -> Tensor:
    """Return values in the parameter's memory layout; torch's fused kernels read both as flat memory unchecked."""
    if values.stride() == parameter.stride():
        return values
    return torch.empty_like(parameter, dtype=values.dtype, requires_grad=False).copy_(values)


def _after_first_steps(optimizer: Optimizer, keep: dict[Tensor, Tensor]) -> None:
    """Clear moments again after a parameter's first step, which may create them with values outside the mask."""
    cleared: set[Tensor] = set()

    def clear_new(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = [parameter for parameter, state in stepped.state.items() if state and parameter not in cleared]
        _clear_moments(stepped, keep, new)
        cleared.update(new)

    optimizer.register_step_post_hook(clear_new)


@torch.no_grad()
def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], keep: dict[Tensor, Tensor]
) -> None:
    if any(callable(value) for value in (*args[1:], *kwargs.values())):
        raise UsageError(
            "a masked step takes no closure",
            "its gradient would come after the mask",
            "compute the gradient first",
        )
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise UsageError(
            "a fused optimizer with a gradient scaler cannot be masked",
            "its gradients are still scaled",
            "use fused=False",
        )
    _move_decay(optimizer)
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if any(parameter not in keep or parameter.grad.is_sparse for parameter in parameters):
            raise UsageError(
                "a parameter cannot be masked",
                "it was added after the mask, or its gradient is sparse",
                "build the optimizer with all parameters, and embeddings with sparse=False",
            )
        for parameter in parameters:
            parameter.grad = _laid_out_as(parameter, parameter.grad)
        if parameters:
            _mask_group(group, parameters, keep, group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def _mask_group(group: dict[str, Any], parameters: list[Tensor], keep: dict[Tensor, Tensor], decoupled: bool) -> None:
    grads = [own(parameter.grad) for parameter in parameters if parameter.grad is not None]
    parameters, keeps = [own(parameter) for parameter in parameters], [keep[parameter] for parameter in parameters]
    decay = group[_DECAY]
    if group["maximize"]:
        torch._foreach_neg_(grads)  # torch negates again: the masked zeros must be +0 after that
    if decay and decoupled:
        for parameter, kept in zip(parameters, keeps, strict=True):
            _decay_salient(parameter, kept, 1 - group["lr"] * decay, bool(group["foreach"]))
    elif decay:
        torch._foreach_add_(grads, parameters, alpha=decay)
    for kept, grad in zip(keeps, grads, strict=True):
        grad.view(_BITS[grad.dtype]).bitwise_and_(kept)  # +0 outside, even for NaN; branch-free
    if group["maximize"]:
        torch._foreach_neg_(grads)


def _decay_salient(parameter: Tensor, keep: Tensor, factor: float | Tensor, foreach: bool) -> None:
    """Multiply salient weights by `factor`, bit for bit as torch's AdamW does, and leave the others."""
    if parameter.dtype in (torch.float32, torch.float64) and isinstance(factor, float):
        rounded = float(torch.tensor(factor, dtype=parameter.dtype, device="cpu"))
        one = torch.ones((), dtype=parameter.dtype, device=parameter.device)
        # keep is -1 or 0, and 1 - (1 - factor) is exact for factors in [0.5, 2] (Sterbenz): no branch, no copy.
        parameter.mul_(torch.add(one, keep, alpha=1.0 - rounded))
        return
    bits = _BITS[parameter.dtype]
    scaled = parameter.clone()
    torch._foreach_mul_([scaled], factor) if foreach else scaled.mul_(
        factor
    )  # the foreach and the single-tensor kernel round bfloat16 differently on a CPU
    change = scaled.view(bits).bitwise_xor_(parameter.view(bits)).bitwise_and_(keep)
    parameter.view(bits).bitwise_xor_(change)
