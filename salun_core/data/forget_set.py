"""The forget set: the training samples and the concepts that forget targets resolve to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from salun_core.config import Document
from salun_core.data.classes import find_class
from salun_core.data.split import SplitManifest
from salun_core.data.table import Table
from salun_core.data.targets import (
    ClassTarget,
    ConceptTarget,
    RandomTarget,
    RedactedTarget,
    SubjectTarget,
    Target,
    hash_of,
)
from salun_core.digest import canonical_json, check_digest, sha256_bytes
from salun_core.errors import DataError, UsageError


class ForgetSet(Document):
    """The training samples and concepts that one or more targets resolve to; content-addressed."""

    format: Literal["salun.forget-set/v1"] = "salun.forget-set/v1"
    dataset_digest: str = Field(description="data set that the ids belong to")
    split_digest: str = Field(description="split manifest whose training split they are in")
    ids: list[str] = Field(description="sorted unique ids of training samples, and a pseudo id for each concept")
    kinds: list[str] = Field(description="sorted kinds of the targets that it came from")
    classes: list[int] = Field(default=[], description="sorted classes that are forgotten as a whole")
    concepts: list[ConceptTarget] = Field(default=[], description="concepts that are forgotten, sorted by pseudo id")

    of_kind: dict[str, list[int]] = Field(
        default={}, description="positions in `ids` by kind, sorted, if there are several kinds; a sample may have two"
    )

    @model_validator(mode="after")
    def _counted(self) -> ForgetSet:
        if self.concepts and not {concept.pseudo_id for concept in self.concepts} <= set(self.ids):
            raise ValueError("`ids` lacks the pseudo id of a concept")
        return self

    def canonical(self) -> bytes:
        """Return the canonical JSON; what only some sets have is omitted if it is empty."""
        unused = {name for name in ("concepts", "of_kind") if not getattr(self, name)}
        return canonical_json(self.model_dump(mode="json", exclude=unused))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the set's canonical JSON."""
        return sha256_bytes(self.canonical())

    @cached_property
    def samples(self) -> list[str]:
        """The training samples: `ids` without the pseudo ids of concepts, sorted."""
        pseudo = {concept.pseudo_id for concept in self.concepts}
        return [name for name in self.ids if name not in pseudo]


def resolve_forget(targets: Sequence[Target], table: Table | None, split: SplitManifest) -> ForgetSet:
    """Resolve targets to the union of their training samples and concepts; it may be empty.

    The caller has fetched `manifest_uri` into `ids`, and `tasks.resolve_targets` has checked that the kind of model can
    forget the targets. A model without data has no table and an empty split.
    """
    targets = [restored(target) for target in targets]
    concepts = {target.pseudo_id: target for target in targets if isinstance(target, ConceptTarget)}
    named = [target for target in targets if not isinstance(target, ConceptTarget)]
    of_kind, classes = _of_data(named, table, split) if named else ({}, [])
    trained = {kind: set(split.train.find(found)) for kind, found in of_kind.items()}
    trained |= {"concept": set(concepts)} if concepts else {}
    ids = sorted(set[str]().union(*trained.values()))
    place = {name: index for index, name in enumerate(ids)}
    positions = {kind: sorted(place[name] for name in trained[kind]) for kind in sorted(trained)}
    return ForgetSet(
        dataset_digest=split.dataset_digest,
        split_digest=split.digest,
        ids=ids,
        kinds=sorted(trained),
        classes=classes,
        concepts=[concepts[name] for name in sorted(concepts)],
        of_kind=positions if len(positions) > 1 else {},
    )


def require_partial(forget: ForgetSet, split: SplitManifest) -> None:
    """Raise DataError if the forget set is empty or is the whole training split; concepts alone retain all samples."""
    if not forget.ids:
        empty = f"class {', '.join(map(str, forget.classes))} has no images" if forget.classes else "no named sample is"
        raise DataError(
            "forget set is empty",
            f"{empty} in the training split",
            "there is nothing to erase; check the names, and whether it was forgotten before",
        )
    if forget.samples and len(forget.samples) >= len(split.train):
        raise DataError(
            "forget set is the whole training data",
            f"all {len(split.train)} samples",
            "nothing would be left to keep; delete the model",
        )


def restored(target: Target) -> Target:
    """Return the target of a redacted class or random share; return other targets unchanged."""
    if isinstance(target, RedactedTarget) and target.of == "class":
        return ClassTarget(**target.model_dump(include=set(ClassTarget.model_fields) - {"kind"}))
    if isinstance(target, RedactedTarget) and target.of == "random":
        return RandomTarget.model_validate(target.model_dump(include={"fraction", "seed"}))
    return target


def kind_of(target: Target) -> str:
    """Return the kind of a target: for a redacted one the original kind, and `samples` for a random share."""
    kind = target.of if isinstance(target, RedactedTarget) else target.kind
    return "samples" if kind == "random" else kind


def _of_data(
    targets: Sequence[Target], table: Table | None, split: SplitManifest
) -> tuple[dict[str, set[str]], list[int]]:
    """Return the samples of targets by kind, and the classes that are forgotten completely."""
    if table is None:
        raise UsageError(
            "the model came without training data", "only concepts can be forgotten from it", "name a concept"
        )
    of_kind: dict[str, set[str]] = {}
    for target in targets:
        of_kind.setdefault(kind_of(target), set()).update(samples_of(target, table, split))
    ids = set[str]().union(*of_kind.values())
    classes = sorted({find_class(target, table.classes) for target in targets if isinstance(target, ClassTarget)})
    if classes and set(table.labels_at(table.rows_of(list(ids))).tolist()) <= set(classes):
        return {"class": ids}, classes  # the other targets lie within the classes
    return of_kind, classes


def samples_of(target: Target, table: Table, split: SplitManifest) -> set[str]:
    """Return the samples of the data that a target other than a concept names, in training or not."""
    if isinstance(target, RandomTarget):
        return set(target.draw(split.train))
    if isinstance(target, SubjectTarget):
        return _of_subjects({target.subject_ref}, table)
    assert not isinstance(target, ConceptTarget)
    if target.dataset_digest is not None:
        check_digest("the data set of a forget target", target.dataset_digest, split.dataset_digest)
    if isinstance(target, RedactedTarget):
        return _samples_of_hashes(target, table)
    if isinstance(target, ClassTarget):
        return set(table.of_class(find_class(target, table.classes)))
    if target.ids is None:
        raise UsageError("forget manifest was not fetched", "its ids are in the store", "give a store that holds it")
    known = table.known(target.ids)
    unknown = [sample for sample in target.ids if sample not in known]
    if unknown:
        raise UsageError(
            f"{len(unknown)} of {len(target.ids)} ids are not in the data",
            f"the first of them is number {target.ids.index(unknown[0]) + 1}",
            "correct them; nothing was forgotten",
        )
    return set(target.ids)


def _samples_of_hashes(target: RedactedTarget, table: Table) -> set[str]:
    """Return the samples whose hashes a redacted target holds; samples no longer in the data are ignored."""
    if target.salt is None or not target.hashes:
        raise not_kept()
    kept, names = set(target.hashes), table.subjects if target.of == "subject" else table.ids
    found = {name for name in set(names) if name is not None and hash_of(target.of, name, target.salt) in kept}
    return _of_subjects(found, table) if target.of == "subject" else found


def not_kept() -> UsageError:
    """Build the error for a redacted target without hashes."""
    return UsageError(
        "a redacted target cannot be resolved", "it holds no hashes of the samples", "file the request again"
    )


def _of_subjects(subjects: set[str], table: Table) -> set[str]:
    if not table.has_subjects:
        raise UsageError("the data have no subjects", "the spec has no `subject_column`", "add it to the data spec")
    return {sample for subject in subjects for sample in table.of_subject(subject)}
