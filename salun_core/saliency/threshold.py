"""The exact k-th largest value of many tensors, without sorting or concatenating them.

Non-negative IEEE numbers have the same order as their bit patterns read as integers: the exponent is above the
mantissa, and both grow with the number. Radix selection therefore finds the k-th largest value digit by digit, 16 bits
at a time from the top, with one histogram per digit. There is no rounding, and all devices give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DIGIT = 16  # bits; two passes for float32, and a histogram of 65,536 bins takes 512 KB


def as_ordered(values: Tensor) -> Tensor:
    """Return the magnitudes of a floating-point tensor as flat integers in the same order.

    They are int32 for float32 and narrower, int64 for float64. They share the memory of contiguous values without a
    sign: the scores of a large model are not copied.
    """
    wide, integer = (torch.float64, torch.int64) if values.dtype == torch.float64 else (torch.float32, torch.int32)
    bits = values.detach().to(wide).flatten().view(integer)
    if bits.numel() and int(bits.min()) < 0:  # a sign is the top bit, of -0 too
        return bits.view(wide).abs().view(integer)
    return bits


def kth_largest(ordered: Sequence[Tensor], k: int) -> tuple[int, int]:
    """Return (value, ties): the k-th largest of tensors from `as_ordered`, and how many of the k largest equal it.

    The tensors have one dtype, and k is from 1 to the number of elements.
    """
    candidates = [values for values in ordered if values.numel()]
    bits = 64 if candidates[0].dtype == torch.int64 else 32
    prefix, remaining = 0, k
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = sum(_histogram(values, shift) for values in candidates)
        assert isinstance(counts, Tensor)
        from_top = counts.flip(0).cumsum(0)  # at i: elements whose digit is among the i + 1 largest
        position = int(torch.searchsorted(from_top, remaining))
        digit = (1 << _DIGIT) - 1 - position
        remaining -= int(from_top[position - 1]) if position else 0
        prefix |= digit << shift
        if shift:
            candidates = [kept for values in candidates if (kept := values[values >> shift == prefix >> shift]).numel()]
    return prefix, remaining


def _histogram(values: Tensor, shift: int) -> Tensor:
    digits = (values >> shift) & ((1 << _DIGIT) - 1)
    return torch.bincount(digits, minlength=1 << _DIGIT).cpu()
