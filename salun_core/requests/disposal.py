"""One thing to dispose of, and the rules that say when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from salun_core.config import Document
from salun_core.storage.erase import StoredKey, Upload


class RetentionRules(Document):
    """How long things are kept; the defaults are the most that is allowed."""

    scratch_hours: Annotated[int, Field(ge=0, le=24)] = Field(default=24, description="forget data of a settled run")
    mask_days: Annotated[int, Field(ge=0, le=30)] = Field(default=30, description="masks of a settled run")
    weights_days: Annotated[int, Field(ge=0, le=30)] = Field(
        default=30, description="weights and list of training samples of a superseded version"
    )
    artifact_days: Annotated[int, Field(ge=0, le=30)] = Field(
        default=7, description="weights and masks under Kubeflow's pipeline root"
    )
    orphan_hours: Annotated[int, Field(ge=1, le=720)] = Field(
        default=24, description="files that no version needs, and versions that were never published"
    )
    upload_hours: Annotated[int, Field(ge=1, le=720)] = Field(default=24, description="uploads that never ended")
    every_hours: Annotated[int, Field(ge=0, le=24)] = Field(
        default=12, description="how often purge runs: what would be too old by the next time goes now"
    )

    def over(self, since: datetime, now: datetime, **limit: int) -> bool:
        """Return whether something would pass its limit (a `timedelta`) before the next purge."""
        return now - since + timedelta(hours=self.every_hours) >= timedelta(**limit)


class Kind(StrEnum):
    """What is disposed of, in the order in which it is done."""

    SCRATCH = "forget data"
    MASK = "mask"
    ARTIFACT = "pipeline artifact"
    REQUEST = "request's target"
    UPLOAD = "unfinished upload"
    MATERIALISE = "make whole"
    WEIGHTS = "superseded weights"
    STAGED = "unpublished version"
    ORPHAN = "orphan"


@dataclass(frozen=True)
class Disposal:
    """One thing to dispose of.

    Args:
        kind: what it is.
        keys: the keys to erase; of a pipeline artifact below the pipeline root. The last one goes last.
        size: in bytes, all S3 versions.
        reason: by which rule.
        run: the run it belongs to.
        line: the model line.
        version: digest of the version.
        files: names of the version's files that go.
        request: the request.
        keep_hashes: of a request: whether hashes of what it named must stay.
        upload: the unfinished upload.
    """

    kind: Kind
    keys: tuple[str, ...]
    size: int
    reason: str
    run: str | None = None
    line: str | None = None
    version: str | None = None
    files: tuple[str, ...] = ()
    request: str | None = None
    keep_hashes: bool = False
    upload: Upload | None = None


def disposal(kind: Kind, items: Sequence[StoredKey], reason: str, **facts: Any) -> Disposal:  # noqa: ANN401
    """Return the disposal of stored keys; `facts` are its other fields."""
    return Disposal(kind, tuple(item.key for item in items), sum(item.size for item in items), reason, **facts)
