"""Which stored files no version needs any more: by counting who refers to each, over all model lines.

Files are named by their content, so that versions share them. One stays as long as any version needs it, or a file
that stays is stored as its difference to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime, timedelta

from salun_core.requests.disposal import Disposal, Kind, RetentionRules, disposal
from salun_core.requests.stock import Stock, kind_of_key
from salun_core.requests.superseded import Standing, VersionFacts, stand
from salun_core.storage.erase import StoredKey
from salun_core.storage.identity import weight_files
from salun_core.storage.names import version_key

_PURGED_TOO = ("split.json", "mask.safetensors")  # the ids of the training samples, the critical weights


class Unneeded:
    """Sorts the versions of all lines, and finds the files that go.

    Args:
        stock: what there is.
        rules: how long it may stay.
        now: the time, with its time zone.

    Raises:
        IntegrityError: the lineage of a model line is broken.
    """

    def __init__(self, stock: Stock, rules: RetentionRules, now: datetime) -> None:
        self._stock, self._rules, self._now = stock, rules, now
        self._stored: dict[str, list[StoredKey]] = {}
        for item in stock.keys:
            kind, names = kind_of_key(item.key)
            if kind in {"blob", "delta"}:
                self._stored.setdefault(names["digest"], []).append(item)
        self.held: list[str] = []
        self.shared: list[str] = []
        self._superseded: list[VersionFacts] = []
        self._unpublished: list[VersionFacts] = []
        self._keep: set[str] = set()
        for version in stand(stock):
            self._sort(version)
        self._going = {digest for item in [*self._superseded, *self._unpublished] for digest in _digests(item)}
        self._keep |= {digest for digest in self._stored if digest not in self._keep and self._young(digest)}

    def _sort(self, item: VersionFacts) -> None:
        """Note what a version still needs, and put it on the list that it belongs to."""
        files = item.manifest.files
        needed = set(files)
        if item.standing is Standing.SUPERSEDED and self._rules.over(
            item.since, self._now, days=self._rules.weights_days
        ):
            if self._held(item):
                self.held.append(f"{item.line}@{item.digest}")
            else:
                self._superseded.append(item)
                needed -= set(purged_files(files))
        elif item.standing is Standing.STAGED and not self._in_use(item) and not self._held(item):
            self._unpublished.append(item)
            needed = set()
        self._keep |= {files[name].sha256 for name in needed}

    def _held(self, item: VersionFacts) -> bool:
        return (item.line, item.digest) in self._stock.held

    def _in_use(self, item: VersionFacts) -> bool:
        """Return whether a version that was staged may still be published."""
        run = item.manifest.run or ""
        if run in self._stock.holders.values() or self._now - item.since < timedelta(hours=self._rules.orphan_hours):
            return True
        return run in self._stock.runs and self._stock.finished_at(run, self._now) is None

    def _young(self, digest: str) -> bool:
        """Return whether a file that no version needs may be part of one that is being staged."""
        newest = max(item.modified for item in self._stored[digest])
        return digest not in self._going and self._now - newest < timedelta(hours=self._rules.orphan_hours)

    def disposals(self) -> Iterator[Disposal]:
        """Yield what goes: first the files that must be made whole, for what they rest on goes."""
        going = [*self._weights(), *self._staged(), *self._orphans()]
        erased = {names["digest"] for item in going for _, names in map(kind_of_key, item.keys) if "digest" in names}
        for digest in sorted(self._keep):
            if self._stock.bases.get(digest) in erased and not self._whole(digest):
                size = sum(item.size for item in self._stored.get(digest, []))
                yield Disposal(Kind.MATERIALISE, (digest,), size, "the file that it is a difference to goes")
        yield from going

    def _whole(self, digest: str) -> bool:
        return any(kind_of_key(item.key)[0] == "blob" and item.live for item in self._stored.get(digest, []))

    def _weights(self) -> Iterator[Disposal]:
        taken: set[str] = set()
        for item in self._superseded:
            if (item.line, item.digest) in self._stock.disposed:
                continue
            files = {name: item.manifest.files[name].sha256 for name in purged_files(item.manifest.files)}
            if not files:
                continue
            gone = {name: digest for name, digest in files.items() if digest not in self._keep}
            weights = weight_files(files)
            if not gone or (weights and not gone.keys() & weights):
                self.shared.append(f"{item.line}@{item.digest}")
                continue
            reason = f"superseded since {item.since:%Y-%m-%d %H:%M}"
            facts = {"run": item.manifest.run, "line": item.line, "version": item.digest, "files": tuple(sorted(gone))}
            yield disposal(Kind.WEIGHTS, self._take(gone.values(), taken), reason, **facts)

    def _staged(self) -> Iterator[Disposal]:
        manifests = {item.key: item for item in self._stock.keys}
        taken: set[str] = set()
        for item in self._unpublished:
            digests = [digest for digest in sorted(_digests(item)) if digest not in self._keep]
            last = manifests.get(version_key(item.line, item.digest))
            keys = [*self._take(digests, taken), *([last] if last else [])]
            reason = f"staged at {item.since:%Y-%m-%d %H:%M} and never published"
            facts = {"run": item.manifest.run, "line": item.line, "version": item.digest}
            yield disposal(Kind.STAGED, keys, reason, **facts)

    def _orphans(self) -> Iterator[Disposal]:
        for digest, items in sorted(self._stored.items()):
            if digest in self._keep:
                yield from self._second_copies(items)
            elif digest not in self._going or self._left_by_purge(digest):
                yield disposal(Kind.ORPHAN, items, "no version needs it")

    def _left_by_purge(self, digest: str) -> bool:
        """Return whether only versions that were disposed of already refer to a file: it was shared, or put back."""
        users = [item for item in [*self._superseded, *self._unpublished] if digest in _digests(item)]
        return all((item.line, item.digest) in self._stock.disposed for item in users)

    def _second_copies(self, items: list[StoredKey]) -> Iterator[Disposal]:
        """Yield what there is of a file besides the copy that is read; never its only one."""
        whole = next((item for item in items if item.live and kind_of_key(item.key)[0] == "blob"), None)
        read = whole or next((item for item in items if item.live), None)
        for item in items if read else ():
            if item is not read:
                yield disposal(Kind.ORPHAN, [item], "the file is stored in another form")

    def _take(self, digests: Iterable[str], taken: set[str]) -> list[StoredKey]:
        fresh = [digest for digest in dict.fromkeys(digests) if digest not in taken]
        taken.update(fresh)
        return [item for digest in fresh for item in self._stored.get(digest, [])]


def purged_files(names: Collection[str]) -> list[str]:
    """Return those of a version's files that go when it is superseded: weights, training samples, critical weights.

    Args:
        names: of all its files.
    """
    return [*weight_files(names), *(name for name in _PURGED_TOO if name in names)]


def _digests(item: VersionFacts) -> set[str]:
    return {entry.sha256 for entry in item.manifest.files.values()}
