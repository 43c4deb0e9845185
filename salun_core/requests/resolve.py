"""Finds the training samples that a request names, in the very version of the model that is to forget them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from salun_core.data.forget import ForgetSet, SamplesTarget, Target, resolve_forget
from salun_core.digest import canonical_json
from salun_core.requests.schema import DeletionRequest

if TYPE_CHECKING:
    from salun_core.data.split import SplitManifest
    from salun_core.data.table import Table


@dataclass(frozen=True)
class Resolved:
    """What one request names.

    Args:
        ids: training samples of the version, sorted; none where there is nothing to erase.
        digest: digest of its forget set.
        named: how many samples it names, whether in training or not.
    """

    ids: Sequence[str]
    digest: str
    named: int


class Resolver(Protocol):
    """Resolves requests against one version of a model line."""

    @property
    def version(self) -> str:
        """Digest of the version."""
        ...

    @property
    def train_count(self) -> int:
        """How many samples the version was trained on and has not forgotten."""
        ...

    def resolve(self, request: DeletionRequest) -> Resolved:
        """Find what a request names.

        Raises:
            SalunError: it names something that cannot be: a class that there is not, another data set.
        """
        ...

    def seal(self, requests: Sequence[DeletionRequest]) -> bytes:
        """Return the document that the run reads: all that the requests name."""
        ...


class TableResolver:
    """Resolves requests against a data set and the split manifest of a version.

    Args:
        version: digest of the version.
        table: the rows of the data set, checked against the split.
        split: which of them the version was trained on and has not forgotten.
        fetch: replaces a target that names a manifest of ids by one that holds them.
    """

    def __init__(
        self,
        version: str,
        table: Table,
        split: SplitManifest,
        fetch: Callable[[Target], Target] = lambda target: target,
    ) -> None:
        self._version, self._table, self._split, self._fetch = version, table, split, fetch

    @property
    def version(self) -> str:
        """Digest of the version."""
        return self._version

    @property
    def train_count(self) -> int:
        """How many samples the version was trained on and has not forgotten."""
        return len(self._split.train)

    def resolve(self, request: DeletionRequest) -> Resolved:
        """Find what a request names; ids that the data do not know are nothing to erase, and no fault.

        Raises:
            UsageError: it names a class that there is not, or something that a classifier cannot forget.
            IntegrityError: it is of another data set.
        """
        target = self._fetch(request.target)
        found = self._set([target])
        named = len(target.ids or ()) if isinstance(target, SamplesTarget) else len(found.ids)
        return Resolved(found.ids, found.digest, named)

    def seal(self, requests: Sequence[DeletionRequest]) -> bytes:
        """Return the forget set of all requests together, as canonical JSON."""
        together = self._set([self._fetch(request.target) for request in requests])
        return canonical_json(together.model_dump(mode="json"))

    def _set(self, targets: Sequence[Target]) -> ForgetSet:
        known = [found for target in targets if (found := self._known(target)) is not None]
        return resolve_forget(known, self._table, self._split)

    def _known(self, target: Target) -> Target | None:
        """Leave out the ids that the data do not have."""
        if not isinstance(target, SamplesTarget):
            return target
        ids = [sample for sample in target.ids or () if sample in self._table.position]
        return target.model_copy(update={"ids": ids}) if ids else None
