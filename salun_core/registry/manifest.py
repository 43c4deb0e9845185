"""The documents of a model line: version manifests, the HEAD pointer, lineage, and model digests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from salun_core.config import Document
from salun_core.digest import canonical_json, digest_json
from salun_core.errors import ModelError
from salun_core.storage.documents import Count, Digest, FileName, LineId, RunId, UtcTime, valid_tree

DEBT_LIMIT, RUNS_LIMIT = 0.05, 10
"""Share of forgotten samples and number of runs from which a full training is recommended; the alert rules agree."""


def retraining_recommended(debt: float, runs: int) -> bool:
    """Return whether a full training is recommended, from what was forgotten since the last one.

    `debt` is the share of the training samples that was forgotten since then, `runs` the number of unlearning runs.
    """
    return debt >= DEBT_LIMIT or runs >= RUNS_LIMIT


class FileEntry(Document):
    """A file of a version."""

    sha256: Digest = Field(description="SHA-256 of the file, and the name of its blob")
    size: Count = Field(description="size in bytes")


class Lineage(Document):
    """The debt of a version: what was forgotten since a model of its line was last trained in full."""

    runs_since_training: Count = Field(default=0, description="unlearning runs since the last full training")
    forgotten_since_training: Count = Field(default=0, description="samples forgotten since then")
    trained_on: Count = Field(default=0, description="samples that the last full training saw")

    @property
    def debt(self) -> float:
        """The fraction of the training samples that was forgotten since; 0 if their number is unknown."""
        return self.forgotten_since_training / self.trained_on if self.trained_on else 0.0

    @property
    def retraining_recommended(self) -> bool:
        """Whether so much was forgotten since the last full training that another one is recommended."""
        return retraining_recommended(self.debt, self.runs_since_training)

    def after_run(self, forgotten: int) -> Lineage:
        """Return the debt after one more unlearning run."""
        return Lineage(
            runs_since_training=self.runs_since_training + 1,
            forgotten_since_training=self.forgotten_since_training + forgotten,
            trained_on=self.trained_on,
        )


class VersionManifest(Document):
    """An immutable model version; its digest is the SHA-256 of this document's canonical JSON."""

    format: Literal["salun.version/v1"] = "salun.version/v1"
    line: LineId = Field(description="the model line it belongs to")
    parent: Digest | None = Field(default=None, description="digest of the version it was made from")
    created_at: UtcTime = Field(description="when it was staged, ISO 8601 in UTC")
    files: dict[FileName, FileEntry] = Field(min_length=1, description="its files by name, with `/` between folders")
    run: RunId | None = Field(default=None, description="the unlearning run that made it")
    method: str = Field(min_length=1, max_length=63, description="the method, or how it was trained")
    forget_set_digest: Digest | None = Field(default=None, description="digest of what was forgotten")
    forget_count: Count = Field(default=0, description="how many samples were forgotten")
    retrained: bool = Field(default=False, description="whether it was retrained in full")
    lineage: Lineage = Field(default_factory=Lineage, description="the debt since the last full training")

    @field_validator("files")
    @classmethod
    def _one_tree(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        valid_tree(files)
        return files

    def canonical(self) -> bytes:
        """Return the bytes that are stored and digested."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return digest_json(self.model_dump(mode="json"))


class Head(Document):
    """Which version of a line is in use."""

    format: Literal["salun.head/v1"] = "salun.head/v1"
    line: LineId = Field(description="the model line")
    version: Digest = Field(description="digest of the version in use")
    sequence: Annotated[int, Field(ge=1, strict=True)] = Field(description="one more with each publish")
    published_at: UtcTime = Field(description="when, ISO 8601 in UTC")
    run: RunId | None = Field(default=None, description="the run that published it")


SINGLE_WEIGHTS, PIPELINE_INDEX = "model.safetensors", "model_index.json"


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the files of a version that hold weights, sorted: `model.safetensors`, or any in a folder."""
    return sorted(name for name in names if name == SINGLE_WEIGHTS or ("/" in name and name.endswith(".safetensors")))


def weights_digest(files: Mapping[str, str]) -> str:
    """Return the digest that identifies a model, from the SHA-256 of its files by name; other files are ignored.

    For a single file of weights it is that file's SHA-256. For a diffusers folder it is the SHA-256 of the canonical
    JSON of `{name: SHA-256}` over `model_index.json` and every file in a folder, because scheduler and tokenizer affect
    the images too. ModelError if there are no weights, or two models at once.
    """
    weights = weight_files(files)
    single, folders = SINGLE_WEIGHTS in weights, PIPELINE_INDEX in files
    if single and not folders and weights == [SINGLE_WEIGHTS]:
        return files[SINGLE_WEIGHTS]
    if folders and not single and weights:
        return digest_json({name: digest for name, digest in files.items() if name == PIPELINE_INDEX or "/" in name})
    both = single and (folders or len(weights) > 1)
    raise ModelError(
        "the files are two models at once" if both else "the files are not a model",
        f"a model has {SINGLE_WEIGHTS}, or {PIPELINE_INDEX} and folders with weights in safetensors",
        "remove one of the two" if both else "give the whole folder of the model",
    )
