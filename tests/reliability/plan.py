"""What is asked of the workers: so many requests, dealt out to lines, each with samples that no other names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support import toy_line as toy

SAMPLES_EACH = 2


class Asked(NamedTuple):
    """A request: its id, its line, and the numbers of the samples that it names."""

    id: str
    line: str
    numbers: tuple[int, ...]

    @property
    def samples(self) -> set[str]:
        """The samples' ids."""
        return {toy.sample(number) for number in self.numbers}


@dataclass(frozen=True)
class Plan:
    """All that a crew needs to know; the same in each of its processes.

    Args:
        uri: the store.
        folder: where the harness and its processes leave word for each other.
        environ: variables with which the store is found.
        lines: the model lines.
        requests: how many, over all lines.
        workers: how many processes.
        harness: the process that asks.
        seed: of the kills.
        max_requests: of one run.
        lease_seconds: of a run; it is not renewed.
        backoff: factor of the pauses before a call is sent again.
    """

    uri: str
    folder: Path
    environ: dict[str, str]
    lines: tuple[str, ...]
    requests: int
    workers: int
    harness: int
    seed: int = 0
    max_requests: int = 4
    lease_seconds: int = 2
    backoff: float = 1.0

    def asked(self) -> list[Asked]:
        """Return all requests."""
        return [self._asked(number) for number in range(self.requests)]

    def _asked(self, number: int) -> Asked:
        place, start = number % len(self.lines), SAMPLES_EACH * number  # no two versions have the same bytes
        mixed = hashlib.sha256(str(number).encode()).hexdigest()[:6]  # keys of neighbours are not neighbours
        return Asked(f"r-{mixed}-{number}", self.lines[place], tuple(range(start, start + SAMPLES_EACH)))

    def share(self, worker: int) -> Iterator[tuple[int, Asked]]:
        """Yield the requests that a worker files, with their numbers."""
        yield from ((number, item) for number, item in enumerate(self.asked()) if number % self.workers == worker)

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.folder / "journal"

    def goes_on(self) -> bool:
        """Return whether the harness is alive and did not say to stop."""
        return Path(f"/proc/{self.harness}").exists() and not self.told("stop")

    @property
    def policy(self) -> dict[str, int]:
        """Settings of the sweeps: nobody gives up, for nothing here is impossible."""
        return {"max_requests": self.max_requests, "lease_seconds": self.lease_seconds, "max_attempts": 10_000}

    def tell(self, name: str, text: str) -> None:
        """Leave word under a name; whoever reads it sees all of it or the word before."""
        part = self.folder / f".{name}"
        part.write_text(text)
        part.replace(self.folder / name)

    def told(self, name: str) -> str:
        """Return the word under a name; empty where there is none."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""
