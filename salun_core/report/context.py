"""What the report tells beside the evidence: which model, its history, and how to make it again."""

from __future__ import annotations

from pydantic import Field

from salun_core.config import Document
from salun_core.registry.manifest import retraining_recommended


class Ancestor(Document):
    """One earlier version of the model line."""

    version: str = Field(description="digest of the version")
    method: str = Field(description="how it was made: train, import, salun, retrain, ...")
    forgotten: int = Field(default=0, ge=0, description="samples that its run forgot")
    published_at: str = Field(description="ISO 8601 in UTC")
    full_training: bool = Field(default=False, description="trained anew, which clears the debt")


class UnlearningDebt(Document):
    """What has been forgotten since the last full training, this run included."""

    ratio: float = Field(description="forgotten samples over those in the last full training")
    runs: int = Field(description="unlearning runs since then")

    @property
    def alarming(self) -> bool:
        """Whether a full training is advised."""
        return retraining_recommended(self.ratio, self.runs)


class ReportContext(Document):
    """Facts of the run that are no measurements."""

    title: str = Field(default="Unlearning report", description="heading")
    model_line: str = Field(description="name of the model line")
    parent: str | None = Field(default=None, description="digest of the version before")
    child: str | None = Field(default=None, description="digest of the version after")
    lineage: list[Ancestor] = Field(default=[], description="versions of the line up to the parent, oldest first")
    reproduce: str | None = Field(default=None, description="command that makes the run again")
    created_at: str = Field(description="ISO 8601 in UTC; the report holds no other clock")

    def debt(self, forgotten: int, train_count: int, method: str) -> UnlearningDebt | None:
        """Return the line's debt after this run.

        Args:
            forgotten: samples that this run forgot.
            train_count: samples in the training split before this run.
            method: of this run; `retrain` clears the debt.

        Returns:
            The debt, or None where no lineage is known. The first version counts as fully trained.
        """
        if not self.lineage:
            return None
        if method == "retrain":
            return UnlearningDebt(ratio=0.0, runs=0)
        since = [place for place, item in enumerate(self.lineage) if item.full_training or item.method == "retrain"]
        earlier = self.lineage[max(since, default=0) + 1 :]
        before = sum(item.forgotten for item in earlier)
        whole = train_count + before
        return UnlearningDebt(ratio=(before + forgotten) / whole if whole else 0.0, runs=len(earlier) + 1)
