"""Facts of the report that are not in the evidence: the model line, its history, and the command of the run."""

from __future__ import annotations

from pydantic import Field

from salun_core.config import Document
from salun_core.registry.manifest import Lineage


class Ancestor(Document):
    """One earlier version of the model line."""

    version: str = Field(description="digest of the version")
    method: str = Field(description="how it was produced: train, import, salun, retrain, ...")
    forgotten: int = Field(default=0, ge=0, description="samples that its run forgot")
    published_at: str = Field(description="ISO 8601 in UTC")
    full_training: bool = Field(default=False, description="trained from fresh weights, which clears the debt")


class ReportContext(Document):
    """Facts of the run that are not measurements."""

    title: str = Field(default="Unlearning report", description="heading")
    model_line: str = Field(description="name of the model line")
    parent: str | None = Field(default=None, description="digest of the version before")
    child: str | None = Field(default=None, description="digest of the version after")
    lineage: list[Ancestor] = Field(default=[], description="versions of the line up to the parent, oldest first")
    reproduce: str | None = Field(default=None, description="command that repeats the run")
    created_at: str = Field(description="ISO 8601 in UTC; the only clock in the report")

    def debt(self, forgotten: int, train_count: int, method: str) -> Lineage | None:
        """Return the line's debt after this run, or None if the lineage is unknown.

        `train_count` is the size of the training split before this run. The method `retrain` clears the debt. The first
        version counts as fully trained.
        """
        if not self.lineage:
            return None
        if method == "retrain":
            return Lineage()
        since = [place for place, item in enumerate(self.lineage) if item.full_training or item.method == "retrain"]
        earlier = self.lineage[max(since, default=0) + 1 :]
        before = sum(item.forgotten for item in earlier)
        return Lineage(
            runs_since_training=len(earlier) + 1,
            forgotten_since_training=before + forgotten,
            trained_on=train_count + before,
        )
