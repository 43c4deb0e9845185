"""Which versions of a model line are in use, superseded, or were never published, and which files all of them need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from salun_core.errors import IntegrityError
from salun_core.requests.runs import ENDED, RunStatus
from salun_core.requests.stock import Stock
from salun_core.storage.lineage import VersionManifest


class Standing(StrEnum):
    """How a version stands to its line."""

    HEAD = "head"
    SUPERSEDED = "superseded"
    STAGED = "staged"


@dataclass(frozen=True)
class VersionFacts:
    """A version and how it stands.

    Args:
        line: its model line.
        digest: its digest.
        manifest: its manifest.
        standing: in use, superseded, or never published.
        since: when it was superseded, or staged.
    """

    line: str
    digest: str
    manifest: VersionManifest
    standing: Standing
    since: datetime


def stand(stock: Stock) -> list[VersionFacts]:
    """Return how every version stands.

    A version is superseded when its child on HEAD's lineage was staged. One that HEAD does not descend from was
    published only if its run says so, or if the line was once rolled back and nothing speaks against it.

    Raises:
        IntegrityError: a manifest on HEAD's lineage is missing.
    """
    lines = sorted({line for line, _ in stock.manifests} | set(stock.heads))
    return [item for line in lines for item in _Line(stock, line).versions()]


class _Line:
    def __init__(self, stock: Stock, line: str) -> None:
        self.stock, self.line = stock, line
        self.manifests = {digest: item for (of, digest), item in stock.manifests.items() if of == line}
        self.head = stock.heads.get(line)
        self.chain = list(self._walk(self.head.version)) if self.head else []
        self.child = {parent: child for child, parent in zip(self.chain, self.chain[1:], strict=False)}

    def _walk(self, digest: str | None) -> Iterator[str]:
        while digest is not None:
            if digest not in self.manifests:
                raise IntegrityError(
                    f"the lineage of {self.line} is broken at {digest[:12]}",
                    "that manifest is missing, so nobody can tell which files are needed",
                    "restore it from a copy; no version is purged before",
                )
            yield digest
            digest = self.manifests[digest].parent

    def versions(self) -> Iterator[VersionFacts]:
        for digest, manifest in sorted(self.manifests.items()):
            standing, since = self._stand(digest, manifest)
            yield VersionFacts(self.line, digest, manifest, standing, since)

    def _stand(self, digest: str, manifest: VersionManifest) -> tuple[Standing, datetime]:
        staged = moment(manifest.created_at)
        if self.chain and digest == self.chain[0]:
            return Standing.HEAD, staged
        if digest in self.child:
            return Standing.SUPERSEDED, moment(self.manifests[self.child[digest]].created_at)
        if self._was_published(digest, manifest):
            return Standing.SUPERSEDED, max(staged, self._left(manifest))
        return Standing.STAGED, staged

    def _was_published(self, digest: str, manifest: VersionManifest) -> bool:
        if self.head is None or self.head.sequence == len(self.chain):  # HEAD never went back
            return False
        run = self.stock.runs.get(manifest.run or "")
        if run is None or run.status not in ENDED or run.status is RunStatus.PUBLISHED:
            return True
        children = self.stock.children.get((self.line, digest), ())
        return any(self._was_published(name, self.manifests[name]) for name in children)

    def _left(self, manifest: VersionManifest) -> datetime:
        """Return when HEAD left the branch of a version: when the next version after the fork was staged."""
        assert self.head is not None
        parent = manifest.parent
        while parent in self.manifests and parent not in self.chain:
            parent = self.manifests[parent].parent
        child = self.child.get(parent or "")
        return moment(self.manifests[child].created_at if child else self.head.published_at)


def moment(text: str) -> datetime:
    """Read a time of a stored document."""
    return datetime.fromisoformat(text)


def descendants(stock: Stock, line: str, digest: str) -> set[str]:
    """Return a version and all that were made from it."""
    found, todo = {digest}, [digest]
    while todo:
        new = set(stock.children.get((line, todo.pop()), ())) - found
        found |= new
        todo += new
    return found
