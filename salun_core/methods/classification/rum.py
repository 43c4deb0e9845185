"""RUM: divide the forget set by memorisation and forget its parts one after the other, the least memorised first.

    S_1, ..., S_n    D_f in equal parts, by ascending m(x, y) = -log p_θo(y | x)
    θ_k = U(θ_{k-1}; forget S_k, retain D_r ∪ S_{k+1} ∪ ... ∪ S_n),    θ_0 = θ_o

U is any method with all its epochs, n is `forget_parts`. The original of each run of U is θ_{k-1}, and the mask is that
of the whole run. m is a proxy for memorisation: the confidence of the model at the end of its training.

Source: Zhao et al., "What makes unlearning hard and what to do about it", NeurIPS 2024 (RUM); Zhao & Triantafillou,
"Scalability of memorization-based machine unlearning", 2024 (proxies). Deviations: docs/research/deviations.md, row
`forget_parts`.

A killed run resumes in its part, because the checkpoint keeps the weights that the part began with. It may end

- before the first epoch of a part is kept: the checkpoint is that of the part before, with all its epochs. That part
  has nothing left to do, and the next one begins again;
- within a part: the finished epochs of the part are kept, and its original is θ_{k-1} from the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.evaluation.evidence import EpochRecord
from salun_core.evaluation.outputs import outputs_of
from salun_core.methods.checkpoint import StageCheckpoint, opened, require_run
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, Trained, Training

ForgetOnce = Callable[[ClassifierContext[Any], Training], Trained]
"""One run of the method on one part."""


def partition(model: nn.Module, forget: ImageSource, parts: int) -> list[Tensor]:
    """Return the indices of each part of D_f, int64; equal memorisation keeps the order of D_f.

    There are fewer parts if D_f has fewer images.
    """
    order = np.argsort(outputs_of(model, forget).losses, kind="stable")
    return [torch.from_numpy(part) for part in np.array_split(order, min(parts, len(forget)))]


def _divided(context: ClassifierContext[Any], parts: list[Tensor]) -> Iterator[ClassifierContext[Any]]:
    """Yield the context of each part; later parts are retained until it is their turn."""
    for number, part in enumerate(parts):
        later = torch.cat([part.new_empty(0), *parts[number + 1 :]])
        retain = context.retain.joined(context.forget.select(later)) if len(later) else context.retain
        yield replace(context, forget=context.forget.select(part), retain=retain)


def forget_in_parts(forget_once: ForgetOnce, context: ClassifierContext[Any], training: Training) -> Trained:
    """Run a method on each part of D_f in turn, and change the context's model in place.

    Epochs are counted over all parts. The checkpoint of another run is a `ConflictError`.
    """
    checkpoint, fingerprint, on_epoch = training.checkpoint, training.fingerprint, training.on_epoch
    model = context.model
    assert model is not None
    parts = partition(model, context.forget, context.config.forget_parts)
    training.group.require_same("parts of the forget set", str([part.tolist() for part in parts]))
    data = checkpoint.load() if checkpoint else None
    header, tensors = opened(data) if data is not None else ({}, {})
    if header:
        require_run(header, fingerprint)
    history = [EpochRecord(**record) for record in header.get("history", [])]
    spent, reached = header.get("passes", len(context.forget) / 3), header.get("part", 0)
    for number, given in enumerate(_divided(context, parts)):
        if number < reached:
            continue
        resumed = None
        if header and number == reached:
            model.load_state_dict(StageCheckpoint.start_of(tensors))
            resumed = StageCheckpoint.loop_of(tensors)
        original = copy.deepcopy(model).requires_grad_(False).eval() if context.original is not None else None
        store, before = None, len(history)
        if checkpoint:
            kept = [record.model_dump() for record in history]
            mark = {"fingerprint": fingerprint, "part": number, "history": kept, "passes": spent}
            start = {name: value.detach().clone() for name, value in model.state_dict().items()}
            store = StageCheckpoint(checkpoint, mark, start, resumed)

        def told(record: EpochRecord, before: int = before) -> None:
            if on_epoch:
                on_epoch(_counted(record, before))

        own = replace(training, checkpoint=store, fingerprint=f"{fingerprint} part {number}", on_epoch=told)
        part = forget_once(replace(given, original=original), own)
        history += [_counted(record, before) for record in part.history]
        spent += part.cost
    return Trained(history, spent)


def _counted(record: EpochRecord, before: int) -> EpochRecord:
    return record.model_copy(update={"epoch": before + record.epoch})


def expected_cost(row: ClassifierMethod[Any], context: ClassifierContext[Any]) -> float:
    """Return the cost of a run in image passes before it begins: the parts have their sizes, but other images."""
    if context.config.forget_parts == 1:
        return row.cost(context)
    order = np.arange(len(context.forget))
    parts = [torch.from_numpy(part) for part in np.array_split(order, min(context.config.forget_parts, len(order)))]
    return len(order) / 3 + sum(row.cost(given) for given in _divided(context, parts))
