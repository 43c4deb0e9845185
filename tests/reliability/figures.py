"""The figures of one row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.reliability.audit import Verdict


@dataclass
class Figures:
    """What a row measured.

    Args:
        name: of the row.
        workers: processes that worked at once.
        kills: SIGKILLs.
        requests: deletion requests.
        polls: reads of HEAD.
        versions: versions that were published.
        seconds: how long it took.
        verdict: what the auditor counted.
        more: what else is to be told.
        holds: whether the row's own bounds hold, beside the verdict.
    """

    name: str
    workers: int = 1
    kills: int = 0
    requests: int = 0
    polls: int = 0
    versions: int = 0
    seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    more: str = ""
    holds: bool = True

    def tell(self, more: str) -> None:
        """Add what else is to be told."""
        self.more = "; ".join(filter(None, [self.more, more]))

    @property
    def passed(self) -> bool:
        """Whether the row holds."""
        return self.holds and not self.verdict.faults
