"""The auditor: looks at all that is stored and all that was noted, and counts what went wrong."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from salun_core.errors import SalunError, UsageError
from salun_core.registry.lookup import Version, ancestry, read_head, read_version
from salun_core.requests import index
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Outcome, Status
from salun_core.storage.keys import certificate_key
from salun_core.storage.objects import FileStore
from salun_core.times import utc_clock
from tests.reliability import journal
from tests.reliability.plan import Asked
from tests.support import toy_line as toy

_CLOCK_SLACK = 0.5  # seconds between a write and its note


@dataclass
class Verdict:
    """How often each rule was broken; all zero is well.

    Args:
        lost: requests that were receipted and are not completed, or whose samples HEAD still knows.
        twice: requests that were completed more than once, samples erased by two versions, events written twice.
        resurrected: samples that a HEAD had forgotten and a later one knows.
        torn: reads of a HEAD whose manifest or files were missing or of another digest.
        backwards: reads of a HEAD of a lower sequence than the read before.
        forks: HEADs that do not descend from the HEAD before.
        misplaced: requests that stand at no index status, or at two.
        false_certificates: certificates that are missing, or say something that is not so.
        false_conflicts: writes of ours that were called somebody else's.
        visible: versions that showed before they were whole and checked.
        early: leases that were taken while another held them.
        errors: exceptions that no worker should meet.
        blocked: lines that a run that was gone blocked for too long.
        outcomes: runs whose outcome is missing, untrue, or changed after it was final.
        kept: trials in which scratch files of dead runs outlived a purge a day later.
    """

    lost: int = 0
    twice: int = 0
    resurrected: int = 0
    torn: int = 0
    backwards: int = 0
    forks: int = 0
    misplaced: int = 0
    false_certificates: int = 0
    false_conflicts: int = 0
    visible: int = 0
    early: int = 0
    errors: int = 0
    blocked: int = 0
    outcomes: int = 0
    kept: int = 0

    @property
    def faults(self) -> dict[str, int]:
        """What is not zero."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name)}


class Auditor:
    """Audits a store.

    Args:
        store: the store.
        notes: the journal.
    """

    def __init__(self, store: FileStore, notes: Path) -> None:
        self.store, self.notes = store, list(journal.read(notes))
        self.ledger = Ledger(store, utc_clock)
        self._chains: dict[str, dict[str, Version]] = {}
        self._gone: dict[tuple[str, str], set[str] | None] = {}

    def audit(self, asked: Iterable[Asked], lines: Iterable[str]) -> Verdict:
        """Return the verdict over all requests and all lines."""
        verdict = Verdict()
        for line in lines:
            self._line(line, verdict)
        standing = Counter(entry.request for status in Status for entry in index.entries(self.store, status))
        for item in asked:
            self._request(item, standing, verdict)
        self._noted(verdict)
        return verdict

    def length(self, line: str) -> int:
        """Return how many versions were published after a line's first."""
        return len(self._chain(line)) - 1

    def _line(self, line: str, verdict: Verdict) -> None:
        chain = list(reversed(self._chain(line).values()))
        if not chain:
            verdict.torn += 1
            return
        for before, after in zip(chain, chain[1:], strict=False):
            new = self._forgotten(after) - self._forgotten(before)
            verdict.resurrected += len(self._forgotten(before) - self._forgotten(after))
            verdict.twice += after.manifest.forget_count - len(new)
        self._heads(line, chain, verdict)

    def _heads(self, line: str, chain: list[Version], verdict: Verdict) -> None:
        """Compare every HEAD that anybody saw with all later ones; the sequence tells the order."""
        bodies = [note["body"] for note in self.notes if note["kind"] == "head" and note["line"] == line]
        seen = sorted({(body["sequence"], body["version"]) for body in bodies})
        kept: set[str] = set()
        places = {version.digest: place for place, version in enumerate(chain)}
        verdict.forks += sum(digest not in places for _, digest in seen)
        lost: set[str] = set()
        for _, digest in [*seen, (0, chain[-1].digest)]:
            gone = self._at(line, digest)
            if gone is None:
                verdict.torn += 1
                continue
            lost |= kept - gone
            kept |= gone
        verdict.resurrected += len(lost)

    def _at_head(self, line: str) -> set[str] | None:
        found = read_head(self.store, line)
        return self._at(line, found[0].version) if found else None

    def _at(self, line: str, digest: str) -> set[str] | None:
        try:
            return self._forgotten(Version(digest, read_version(self.store, line, digest)))
        except (SalunError, AssertionError):
            return None

    def _forgotten(self, version: Version) -> set[str]:
        key = (version.manifest.line, version.digest)
        if key not in self._gone:
            self._gone[key] = toy.forgotten(self.store, version)
        return self._gone[key]

    def _request(self, item: Asked, standing: Mapping[str, int], verdict: Verdict) -> None:
        try:
            events = self.ledger.events(item.id)
        except UsageError:
            verdict.lost += 1
            return
        completed = [event for event in events if event.to_status is Status.COMPLETED]
        erased = item.samples <= (self._at_head(item.line) or set())
        verdict.lost += not completed or not erased
        verdict.twice += len(completed) > 1
        verdict.misplaced += standing[item.id] != 1
        if completed:
            verdict.false_certificates += not self._certified(item, completed[-1].outcome)

    def _certified(self, item: Asked, outcome: Outcome | None) -> bool:
        """Return whether a request's certificate names a version of the lineage that was the first to forget it."""
        stored = self.store.get(certificate_key(item.id))
        if stored is None:
            return False
        body = json.loads(stored.data)
        chain = self._chain(item.line)
        version = chain.get(body["version"])
        if (body["request"], body["outcome"]) != (item.id, outcome) or outcome is Outcome.NOTHING_TO_ERASE:
            return False  # every sample of the plan was trained on
        before = chain.get(version.manifest.parent) if version else None
        return bool(before) and item.samples <= self._forgotten(version) and not item.samples & self._forgotten(before)

    def _chain(self, line: str) -> dict[str, Version]:
        if line not in self._chains:
            self._chains[line] = {version.digest: version for version in self._history(line)}
        return self._chains[line]

    def _history(self, line: str) -> list[Version]:
        try:
            return ancestry(self.store, line)
        except SalunError:
            return []

    def _noted(self, verdict: Verdict) -> None:
        bodies = defaultdict(set)
        for note in self.notes:
            if note["kind"] == "event":
                bodies[note["key"]].add(note["sha256"])
        verdict.twice += sum(len(found) > 1 for found in bodies.values())
        verdict.errors += sum(note["kind"] == "error" for note in self.notes)
        leases = defaultdict(list)
        for note in self.notes:
            if note["kind"] == "lease":
                leases[note["body"]["line"]].append(note)
        verdict.early += sum(_early(found) for found in leases.values())


def _early(notes: list[Mapping[str, Any]]) -> int:
    """Count the leases that were taken from a holder whose time was not over, by this machine's clock."""
    ordered = sorted(notes, key=lambda note: note["body"]["beat"])
    count = 0
    for before, after in zip(ordered, ordered[1:], strict=False):
        first, second = before["body"], after["body"]
        follows = second["beat"] == first["beat"] + 1 and second["holder"] != first["holder"]
        waited = after["at"] - before["at"] > first["seconds"] - _CLOCK_SLACK
        count += follows and not first["released"] and not waited
    return count
