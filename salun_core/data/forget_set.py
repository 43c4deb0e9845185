"""The forget set: the training samples and the concepts that forget targets resolve to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from salun_core.config import Document
from salun_core.data.split import SplitManifest
from salun_core.data.table import Table
from salun_core.data.targets import (
    ClassTarget,
    ConceptTarget,
    ForgetTarget,
    RedactedTarget,
    SamplesTarget,
    SubjectTarget,
    Target,
    hash_of,
    parse_target,
    read_targets,
    redact,
)
from salun_core.digest import canonical_json, check_digest, sha256_bytes
from salun_core.errors import DataError, UsageError, unknown_name

__all__ = [
    "ClassTarget",
    "ConceptTarget",
    "ForgetSet",
    "ForgetTarget",
    "RedactedTarget",
    "SamplesTarget",
    "SubjectTarget",
    "Target",
    "parse_target",
    "read_targets",
    "redact",
    "require_partial",
    "resolve_forget",
]


class ForgetSet(Document):
    """The training samples and concepts that one or more targets resolve to; content-addressed."""

    format: Literal["salun.forget-set/v1"] = "salun.forget-set/v1"
    dataset_digest: str = Field(description="data set that the ids belong to")
    split_digest: str = Field(description="split manifest whose training split they are in")
    ids: list[str] = Field(description="sorted unique ids of training samples, and a pseudo id for each concept")
    kinds: list[str] = Field(description="sorted kinds of the targets that it came from")
    classes: list[int] = Field(default=[], description="sorted classes that are forgotten as a whole")
    concepts: list[ConceptTarget] = Field(default=[], description="concepts that are forgotten, sorted by pseudo id")

    @model_validator(mode="after")
    def _counted(self) -> ForgetSet:
        if self.concepts and not {concept.pseudo_id for concept in self.concepts} <= set(self.ids):
            raise ValueError("`ids` lacks the pseudo id of a concept")
        return self

    def canonical(self) -> bytes:
        """Return the bytes that are sealed and digested; without concepts they do not speak of them."""
        return canonical_json(self.model_dump(mode="json", exclude=set() if self.concepts else {"concepts"}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the set's canonical JSON."""
        return sha256_bytes(self.canonical())

    @cached_property
    def samples(self) -> list[str]:
        """The training samples alone: `ids` without the pseudo ids of concepts, sorted."""
        pseudo = {concept.pseudo_id for concept in self.concepts}
        return [name for name in self.ids if name not in pseudo]


def resolve_forget(targets: Sequence[Target], table: Table | None, split: SplitManifest) -> ForgetSet:
    """Find the training samples and the concepts that targets name (their union).

    It does not know what a kind of model can forget; `tasks.resolve_targets` checks that first.

    Args:
        targets: at least one; `manifest_uri` must have been fetched into `ids` before.
        table: the data; None for a model without data.
        split: the split that the model was trained on; empty for a model without data.

    Returns:
        The forget set; it may be empty if nothing that was named is in the training split.

    Raises:
        UsageError: an id or class that the data do not have; a redacted target without hashes.
        IntegrityError: a target is of another data set.
    """
    targets = [restored(target) for target in targets]
    concepts = {target.pseudo_id: target for target in targets if isinstance(target, ConceptTarget)}
    named = [target for target in targets if not isinstance(target, ConceptTarget)]
    ids, kinds, classes = _of_data(named, table, split) if named else (set(), set(), [])
    return ForgetSet(
        dataset_digest=split.dataset_digest,
        split_digest=split.digest,
        ids=sorted({*(ids & split.train.keys()), *concepts}),
        kinds=sorted(kinds | ({"concept"} if concepts else set())),
        classes=classes,
        concepts=[concepts[name] for name in sorted(concepts)],
    )


def require_partial(forget: ForgetSet, split: SplitManifest) -> None:
    """Check that there is something to forget and something to keep; beside concepts there always is.

    Raises:
        DataError: the forget set is empty, or is the whole training split.
    """
    if not forget.ids:
        raise DataError(
            "forget set is empty",
            f"{_named(forget)} in the training split",
            "there is nothing to erase; check the names, and whether it was forgotten before",
        )
    if forget.samples and len(forget.samples) >= len(split.train):
        raise DataError(
            "forget set is the whole training data",
            f"all {len(split.train)} samples",
            "nothing would be left to keep; delete the model",
        )


def _named(forget: ForgetSet) -> str:
    if not forget.classes:
        return "nothing that was named is"
    return f"class {', '.join(map(str, forget.classes))} has no images"


def restored(target: Target) -> Target:
    """Return the class target that a redacted one kept, and any other target as it is."""
    if isinstance(target, RedactedTarget) and target.class_id is not None:
        return ClassTarget(dataset_digest=target.dataset_digest, class_id=target.class_id)
    return target


def kind_of(target: Target) -> str:
    """Return the kind of a target; of a redacted one, the kind that it was."""
    return target.of if isinstance(target, RedactedTarget) else target.kind


def _of_data(
    targets: Sequence[Target], table: Table | None, split: SplitManifest
) -> tuple[set[str], set[str], list[int]]:
    """Return the samples that targets name in the data, the targets' kinds, and the classes named as a whole."""
    if table is None:
        raise UsageError(
            "the model came without training data", "only concepts can be forgotten from it", "name a concept"
        )
    ids: set[str] = set()
    for target in targets:
        ids |= _resolve_one(target, table, split)
    classes = sorted({_class_id(target, table) for target in targets if isinstance(target, ClassTarget)})
    if classes and all(table.labels[table.position[sample]] in classes for sample in ids):
        return ids, {"class"}, classes  # whatever else was named lies within the classes
    return ids, {kind_of(target) for target in targets}, classes


def _resolve_one(target: Target, table: Table, split: SplitManifest) -> set[str]:
    if isinstance(target, RedactedTarget):
        return _found_again(target, table, split)
    if isinstance(target, SubjectTarget):
        return _samples_of({target.subject_ref}, table)
    assert not isinstance(target, ConceptTarget)
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
        raise not_kept()
    if target.dataset_digest is not None:
        check_digest("the data set of a forget target", target.dataset_digest, split.dataset_digest)
    kept, names = set(target.hashes), table.subjects if target.of == "subject" else table.ids
    found = {name for name in set(names) if name is not None and hash_of(target.of, name, target.salt) in kept}
    return _samples_of(found, table) if target.of == "subject" else found


def not_kept() -> UsageError:
    """Build the error for a redacted target of which nothing was kept."""
    return UsageError("a redacted target cannot be found again", "nothing was kept of what it named", "file it again")


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
            raise _unknown_class(target.class_id, names)
        return names.index(target.class_id)
    if not 0 <= target.class_id < len(names):
        raise UsageError(
            f"there is no class {target.class_id}", f"the data have {len(names)}", f"give 0 to {len(names) - 1}"
        )
    return target.class_id


def _unknown_class(name: str, names: Sequence[str]) -> UsageError:
    alike = next((known for known in names if known.casefold() == name.casefold()), None)
    if alike is None:
        return unknown_name("class", name, names)
    return UsageError(f"unknown class {name!r}", "upper and lower case count", f"did you mean {alike!r}?")
