"""Finds the training samples that a request names, in the version of the model that will forget them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from salun_core.data.forget_set import ForgetSet, resolve_forget, samples_of
from salun_core.data.targets import SamplesTarget, SubjectTarget, Target
from salun_core.requests.schema import DeletionRequest

if TYPE_CHECKING:
    from salun_core.data.split import SplitManifest
    from salun_core.data.table import Table
    from salun_core.tasks.task import Task


AMBIGUOUS = "its class is the name of one and the index of another: file it again with class_name or class_index"
"""The reason of a hold for review."""


@dataclass(frozen=True)
class Resolved:
    """What one request names.

    Args:
        ids: training samples of the version, and the pseudo ids of concepts, sorted; empty: nothing to erase.
        digest: digest of its forget set.
        named: how many samples it names, in training or not.
        concepts: the pseudo ids of concepts among the ids; no data set holds them.
        unknown: how many of the names are not in the data set at all, as after a typing error.
    """

    ids: Sequence[str]
    digest: str
    named: int
    concepts: frozenset[str] = frozenset()
    unknown: int = 0

    @cached_property
    def samples(self) -> frozenset[str]:
        """The training samples among the ids, which count against the limits of a run."""
        return frozenset(self.ids) - self.concepts


def unmatched(unknown: int, trained: int) -> str:
    """Return the reason of a hold for review, which names nothing that the request does: only the two counts."""
    some = "one name is" if unknown == 1 else f"{unknown} names are"
    return f"{some} not in the data; of what it names, {trained} are in training"


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
        """Find what a request names; ids and subjects that the data do not have are counted and raise no error.

        AmbiguousTargetError if it names a class by a value that may mean two classes.
        """
        target = self._fetch(request.target)
        found = self._forget_set([target])
        named = len(target.ids or ()) if isinstance(target, SamplesTarget) else len(found.ids)
        concepts = frozenset(concept.pseudo_id for concept in found.concepts)
        return Resolved(found.ids, found.digest, named, concepts, self._unknown(target))

    def look_up(self, target: Target) -> tuple[set[str], int]:
        """Return the samples of the data that a target names, in training or not, and how many names are unknown."""
        known = self._without_unknown_ids(target)
        assert self._table is not None
        found = set() if known is None else samples_of(known, self._table, self._split)
        return found, self._unknown(target)

    def freeze_forget_set(self, requests: Sequence[DeletionRequest]) -> bytes:
        """Return the forget set of all requests together, as canonical JSON."""
        return self._forget_set([self._fetch(request.target) for request in requests]).canonical()

    def _forget_set(self, targets: Sequence[Target]) -> ForgetSet:
        self._task.check_targets(targets)
        known = [found for target in targets if (found := self._without_unknown_ids(target)) is not None]
        return resolve_forget(known, self._table, self._split)

    def _unknown(self, target: Target) -> int:
        """Return how many of a target's ids or subjects the data do not have; a redacted one was matched before."""
        if self._table is None:
            return 0
        if isinstance(target, SubjectTarget):
            return int(not self._table.knows_subject(target.subject_ref))
        ids = target.ids or () if isinstance(target, SamplesTarget) else ()
        known = self._table.known(ids)
        return sum(sample not in known for sample in ids)

    def _without_unknown_ids(self, target: Target) -> Target | None:
        if not isinstance(target, SamplesTarget) or self._table is None:
            return target
        known = self._table.known(target.ids or ())
        ids = [sample for sample in target.ids or () if sample in known]
        return target.model_copy(update={"ids": ids}) if ids else None
