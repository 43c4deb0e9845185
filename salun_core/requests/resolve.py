"""Finds the training samples that a request names, in the version of the model that will forget them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from salun_core.data.forget_set import ForgetSet, resolve_forget
from salun_core.data.targets import SamplesTarget, Target
from salun_core.requests.schema import DeletionRequest

if TYPE_CHECKING:
    from salun_core.data.split import SplitManifest
    from salun_core.data.table import Table
    from salun_core.tasks.task import Task


@dataclass(frozen=True)
class Resolved:
    """What one request names.

    Args:
        ids: training samples of the version, and the pseudo ids of concepts, sorted; empty: nothing to erase.
        digest: digest of its forget set.
        named: how many samples it names, in training or not.
        concepts: the pseudo ids of concepts among the ids; no data set holds them.
    """

    ids: Sequence[str]
    digest: str
    named: int
    concepts: frozenset[str] = frozenset()

    @cached_property
    def samples(self) -> frozenset[str]:
        """The training samples among the ids, which count against the limits of a run."""
        return frozenset(self.ids) - self.concepts


class Resolver(Protocol):
    """Resolves requests against one version of a model line."""

    @property
    def train_count(self) -> int:
        """How many samples the version was trained on and has not forgotten."""
        ...

    def resolve(self, request: DeletionRequest) -> Resolved:
        """Find what a request names.

        Raises:
            SalunError: it names what does not exist, such as an unknown class or another data set.
        """
        ...

    def freeze_forget_set(self, requests: Sequence[DeletionRequest]) -> bytes:
        """Return the document that the run reads: all that the requests name."""
        ...


class TableResolver:
    """Resolves requests against a data set and the split manifest of a version.

    Args:
        table: the rows of the data set, checked against the split; None if the model came without data.
        split: which of them the version was trained on and has not forgotten.
        task: of the model; it checks what such a model can forget.
        fetch: replaces a target that names a manifest of ids by one that holds them.
    """

    def __init__(
        self,
        table: Table | None,
        split: SplitManifest,
        task: Task[Any],
        fetch: Callable[[Target], Target] = lambda target: target,
    ) -> None:
        self._table, self._split, self._task, self._fetch = table, split, task, fetch

    @property
    def train_count(self) -> int:
        """How many samples the version was trained on and has not forgotten."""
        return len(self._split.train)

    def resolve(self, request: DeletionRequest) -> Resolved:
        """Find what a request names; ids that the data do not have need no erasure and are no error.

        Raises:
            UsageError: it names an unknown class, or something that such a model cannot forget.
            IntegrityError: it belongs to another data set.
        """
        target = self._fetch(request.target)
        found = self._forget_set([target])
        named = len(target.ids or ()) if isinstance(target, SamplesTarget) else len(found.ids)
        return Resolved(found.ids, found.digest, named, frozenset(concept.pseudo_id for concept in found.concepts))

    def freeze_forget_set(self, requests: Sequence[DeletionRequest]) -> bytes:
        """Return the forget set of all requests together, as canonical JSON."""
        return self._forget_set([self._fetch(request.target) for request in requests]).canonical()

    def _forget_set(self, targets: Sequence[Target]) -> ForgetSet:
        self._task.check_targets(targets)
        known = [found for target in targets if (found := self._without_unknown_ids(target)) is not None]
        return resolve_forget(known, self._table, self._split)

    def _without_unknown_ids(self, target: Target) -> Target | None:
        if not isinstance(target, SamplesTarget) or self._table is None:
            return target
        ids = [sample for sample in target.ids or () if sample in self._table.position]
        return target.model_copy(update={"ids": ids}) if ids else None
