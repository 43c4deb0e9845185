"""What a denoiser is told: class labels or prompt embeddings, computed once and looked up by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salun_core.errors import DataError, UsageError

Conditions = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConditionTable:
    """All conditions of a run, one row each.

    Args:
        names: of the rows: class names or prompts; the name of the null condition is empty.
        rows: by argument name of the denoiser (`class_labels`, `encoder_hidden_states`, ...): tensors [K, ...].
        null: row of the null condition, for classifier-free guidance; None where the model has none.
        tokens: by row, the positions in `encoder_hidden_states` of the concept's own tokens; an empty row, or none at
            all, means every position after the first.
    """

    names: Sequence[str]
    rows: Mapping[str, Tensor]
    null: int | None = None
    tokens: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if any(len(tensor) != len(self.names) for tensor in self.rows.values()) or not self.rows:
            raise DataError("conditions do not fit their names", "they differ in number", "encode the prompts again")
        known = [tensor for tensor in self.rows.values() if tensor.is_floating_point() and not tensor.is_meta]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in known):
            raise DataError("a condition is not finite", "an embedding holds NaN", "check the text encoder's weights")

        if self.tokens:
            self._check_tokens()

    def _check_tokens(self) -> None:
        length = self.rows["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in self.rows else 0
        places = [place for row in self.tokens for place in row]
        if len(self.tokens) != len(self.names) or any(not 0 <= place < length for place in places):
            raise DataError("token positions do not fit the conditions", "", "encode the prompts again")

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Tensor) -> Conditions:
        """Return the conditions of rows, int64 [B], as tensors [B, ...]."""
        return {name: tensor[index.to(tensor.device)] for name, tensor in self.rows.items()}

    def nulls(self, count: int) -> Conditions:
        """Return the null condition, so many times.

        Raises:
            UsageError: the model has none.
        """
        if self.null is None:
            raise UsageError(
                "the model has no null condition", "it was trained without label drop", "set guidance_scale: 1"
            )
        return self.take(torch.full((count,), self.null, dtype=torch.int64))

    def own_tokens(self) -> Tensor:
        """Return where each row's own tokens are: bool [K, L], on the CPU.

        Raises:
            UsageError: the conditions are not texts.
        """
        if "encoder_hidden_states" not in self.rows:
            raise UsageError("the conditions have no tokens", "they are not texts", "choose another method")
        length = self.rows["encoder_hidden_states"].shape[1]
        marks = torch.zeros(len(self), length, dtype=torch.bool)
        every = range(min(1, length - 1), length)
        for row in range(len(self)):
            marks[row, list(self.tokens[row] if self.tokens and self.tokens[row] else every)] = True
        return marks

    def row(self, name: str) -> int:
        """Return the row of a name.

        Raises:
            UsageError: there is none.
        """
        if name not in self.names:
            raise UsageError(f"there is no condition {name[:60]!r}", "it was not encoded", "name it in the target")
        return list(self.names).index(name)

    def to(self, device: torch.device | str) -> ConditionTable:
        """Return the table with its tensors on a device."""
        return replace(self, rows={name: rows.to(device) for name, rows in self.rows.items()})
