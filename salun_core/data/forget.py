"""What is to be forgotten: targets as people name them, and the set of training samples that they resolve to."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from salun_core.config import Document, parse, read_document
from salun_core.data.split import SplitManifest
from salun_core.data.table import Table
from salun_core.digest import check_digest, digest_json
from salun_core.errors import DataError, UsageError, unknown_name


class SamplesTarget(Document):
    """Single training samples, by id."""

    kind: Literal["samples"] = "samples"
    dataset_digest: str | None = Field(default=None, description="data set that the ids belong to; checked when given")
    ids: list[str] | None = Field(default=None, min_length=1, description="sample ids")
    manifest_uri: str | None = Field(default=None, description="s3:// address of a JSON list of ids, in place of `ids`")
    sha256: str | None = Field(default=None, description="SHA-256 of that manifest's bytes")

    @model_validator(mode="after")
    def _one_source(self) -> SamplesTarget:
        if (self.ids is None) == (self.manifest_uri is None):
            raise ValueError("give exactly one of `ids` and `manifest_uri`")
        if (self.manifest_uri is None) != (self.sha256 is None):
            raise ValueError("`sha256` goes with `manifest_uri`, and it needs it")
        return self


class ClassTarget(Document):
    """All samples of one class."""

    kind: Literal["class"] = "class"
    dataset_digest: str | None = Field(
        default=None, description="data set that the class belongs to; checked when given"
    )
    class_id: int | str = Field(description="class id from 0, or its name")


class SubjectTarget(Document):
    """All samples of one person, found through the data set's own metadata column."""

    kind: Literal["subject"] = "subject"
    subject_ref: str = Field(min_length=1, max_length=256, description="opaque reference, as in the metadata column")


class ConceptTarget(Document):
    """A concept of a text-to-image model, by prompts."""

    kind: Literal["concept"] = "concept"
    prompts: list[str] = Field(min_length=1)
    anchor_prompt: str = Field(min_length=1)


class RedactedTarget(Document):
    """What is left of a target once its request is settled; with the data set, its hashes find the samples again."""

    kind: Literal["redacted"] = "redacted"
    of: Literal["samples", "class", "subject", "concept"] = Field(description="kind of the target before")
    count: Annotated[int, Field(ge=0, strict=True)] = Field(
        description="how many ids or prompts it named, 1 of another kind; 0 where a manifest held the ids"
    )
    dataset_digest: str | None = Field(default=None, description="data set that it belonged to; checked when given")
    class_id: int | str | None = Field(default=None, description="the class, of a class only")
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = Field(
        default=None, description="key of the hashes; none where nothing was to be found again"
    )
    hashes: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default=[], description="sorted HMAC-SHA256 of `<of> NUL <sample id or subject reference>`"
    )

    @model_validator(mode="after")
    def _fits(self) -> RedactedTarget:
        if (self.class_id is not None) != (self.of == "class"):
            raise ValueError("`class_id` goes with a class, and that needs it")
        if self.hashes and self.salt is None:
            raise ValueError("`hashes` need their `salt`")
        return self


ForgetTarget = Annotated[
    SamplesTarget | ClassTarget | SubjectTarget | ConceptTarget | RedactedTarget, Field(discriminator="kind")
]
Target = SamplesTarget | ClassTarget | SubjectTarget | ConceptTarget | RedactedTarget
_KINDS: dict[str, type[Document]] = {
    "samples": SamplesTarget,
    "class": ClassTarget,
    "subject": SubjectTarget,
    "concept": ConceptTarget,
    "redacted": RedactedTarget,
}


class ForgetSet(Document):
    """The training samples that one or more targets resolve to; content-addressed."""

    format: Literal["salun.forget-set/v1"] = "salun.forget-set/v1"
    dataset_digest: str = Field(description="data set that the ids belong to")
    split_digest: str = Field(description="split manifest whose training split they are in")
    ids: list[str] = Field(description="sorted unique ids of training samples")
    kinds: list[str] = Field(description="sorted kinds of the targets that it came from")
    classes: list[int] = Field(default=[], description="sorted classes that are forgotten as a whole")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the set's canonical JSON."""
        return digest_json(self.model_dump(mode="json"))


def read_targets(path: Path) -> list[Target]:
    """Read one forget target, or a list of them, from YAML or JSON.

    Raises:
        UsageError: the file is missing or has faults.
    """
    document = read_document(path)
    return [parse_target(item, str(path)) for item in (document if isinstance(document, list) else [document])]


def parse_target(data: Any, source: str) -> Target:  # noqa: ANN401 - plain data from YAML or JSON
    """Build a forget target from plain data.

    Raises:
        UsageError: an unknown kind (with the nearest match) or faults.
    """
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise UsageError(f"{source} is no forget target", "it has no `kind`", f"give one of {', '.join(_KINDS)}")
    if kind not in _KINDS:
        raise unknown_name("forget target", kind, _KINDS)
    return cast(Target, parse(_KINDS[kind], data, source))


def redact(target: Target, salt: str | None, ids: Sequence[str] | None = None) -> RedactedTarget:
    """Return what may be kept of a target once its request is settled.

    Hashes are kept of sample ids and of a subject only: a class names no person and stays, prompts find no samples.

    Args:
        target: the target; one that is redacted already loses at most its hashes.
        salt: key of the hashes, 32 random hex digits; None keeps no hashes.
        ids: the sample ids of a manifest, where the target names one.
    """
    if isinstance(target, RedactedTarget):
        return target if salt else target.model_copy(update={"salt": None, "hashes": []})
    if isinstance(target, ConceptTarget):
        return RedactedTarget(of="concept", count=len(target.prompts))
    if isinstance(target, ClassTarget):
        return RedactedTarget(of="class", count=1, dataset_digest=target.dataset_digest, class_id=target.class_id)
    if isinstance(target, SubjectTarget):
        return RedactedTarget(of="subject", count=1, salt=salt, hashes=_hashes("subject", [target.subject_ref], salt))
    return RedactedTarget(
        of="samples",
        count=len(target.ids or ()),
        dataset_digest=target.dataset_digest,
        salt=salt,
        hashes=_hashes("samples", target.ids or ids or (), salt),
    )


def _hashes(of: str, names: Iterable[str], salt: str | None) -> list[str]:
    return sorted({_hash(of, name, salt) for name in names}) if salt else []


def _hash(of: str, name: str, salt: str) -> str:
    data = f"{of}\0{name}".encode("utf-8", "surrogatepass")  # an id may be the name of a file
    return hmac.new(bytes.fromhex(salt), data, hashlib.sha256).hexdigest()


def resolve_forget(targets: Sequence[Target], table: Table, split: SplitManifest) -> ForgetSet:
    """Find the training samples that targets name (their union).

    Args:
        targets: at least one; `manifest_uri` must have been fetched into `ids` before.
        table: the data.
        split: the split that the model was trained on.

    Returns:
        The forget set; it may be empty when nothing that was named is in the training split.

    Raises:
        UsageError: an id or class that the data do not have; a concept; a redacted target that kept no hashes.
        IntegrityError: a target is of another data set.
    """
    targets = [_class_again(target) for target in targets]
    ids: set[str] = set()
    for target in targets:
        ids |= _resolve_one(target, table, split)
    classes = sorted({_class_id(target, table) for target in targets if isinstance(target, ClassTarget)})
    kinds = {target.of if isinstance(target, RedactedTarget) else target.kind for target in targets}
    if classes and all(table.labels[table.position[sample]] in classes for sample in ids):
        kinds = {"class"}  # whatever else was named lies within the classes
    return ForgetSet(
        dataset_digest=split.dataset_digest,
        split_digest=split.digest,
        ids=sorted(ids & split.train.keys()),
        kinds=sorted(kinds),
        classes=classes,
    )


def require_partial(forget: ForgetSet, split: SplitManifest) -> None:
    """Check that there is something to forget and something to keep.

    Raises:
        DataError: the forget set is empty, or is the whole training split.
    """
    if not forget.ids:
        raise DataError(
            "forget set is empty",
            "nothing that was named is in the training split",
            "there is nothing to erase; check the names",
        )
    if len(forget.ids) >= len(split.train):
        raise DataError(
            "forget set is the whole training data",
            f"all {len(split.train)} samples",
            "nothing would be left to keep; delete the model",
        )


def _class_again(target: Target) -> Target:
    if isinstance(target, RedactedTarget) and target.class_id is not None:
        return ClassTarget(dataset_digest=target.dataset_digest, class_id=target.class_id)
    return target


def _resolve_one(target: Target, table: Table, split: SplitManifest) -> set[str]:
    if isinstance(target, RedactedTarget):
        return _found_again(target, table, split)
    if isinstance(target, ConceptTarget):
        raise UsageError(
            "a classifier cannot forget a concept", "prompts name images of a text-to-image model", "name a class"
        )
    if isinstance(target, SubjectTarget):
        return _samples_of({target.subject_ref}, table)
    if target.dataset_digest is not None:
        check_digest("the data set of a forget target", target.dataset_digest, split.dataset_digest)
    if isinstance(target, ClassTarget):
        wanted = _class_id(target, table)
        return {sample for sample, label in zip(table.ids, table.labels, strict=True) if label == wanted}
    if target.ids is None:
        raise UsageError("forget manifest was not fetched", "its ids lie in the store", "give a store that holds it")
    return _known_ids(target.ids, table)


def _found_again(target: RedactedTarget, table: Table, split: SplitManifest) -> set[str]:
    """Hash all that the data name and return the samples whose hashes the target kept; what is gone is no fault."""
    if target.salt is None or not target.hashes:
        raise UsageError(
            "a redacted target cannot be found again", "nothing was kept of what it named", "file it again"
        )
    if target.dataset_digest is not None:
        check_digest("the data set of a forget target", target.dataset_digest, split.dataset_digest)
    kept, names = set(target.hashes), table.subjects if target.of == "subject" else table.ids
    found = {name for name in set(names) if name is not None and _hash(target.of, name, target.salt) in kept}
    return _samples_of(found, table) if target.of == "subject" else found


def _samples_of(subjects: set[str], table: Table) -> set[str]:
    if not any(table.subjects):
        raise UsageError("the data name no subjects", "the spec has no `subject_column`", "add it to the data spec")
    return {sample for sample, subject in zip(table.ids, table.subjects, strict=True) if subject in subjects}


def _known_ids(ids: Sequence[str], table: Table) -> set[str]:
    unknown = [sample for sample in ids if sample not in table.position]
    if unknown:
        raise UsageError(
            f"{len(unknown)} of {len(ids)} ids are not in the data",
            f"the first of them is number {list(ids).index(unknown[0]) + 1}",
            "correct them; nothing was forgotten",
        )
    return set(ids)


def _class_id(target: ClassTarget, table: Table) -> int:
    names = list(table.classes)
    if isinstance(target.class_id, str):
        if target.class_id not in names:
            raise unknown_name("class", target.class_id, names)
        return names.index(target.class_id)
    if not 0 <= target.class_id < len(names):
        raise UsageError(
            f"there is no class {target.class_id}", f"the data have {len(names)}", f"give 0 to {len(names) - 1}"
        )
    return target.class_id
