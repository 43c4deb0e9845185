"""Forget targets of a request, and their redacted form after the request is settled."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, model_validator

from salun_core.config import Document, parse, read_document
from salun_core.digest import digest_json
from salun_core.errors import UsageError, unknown_name


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
            raise ValueError("give `sha256` and `manifest_uri` together")
        return self


class ClassTarget(Document):
    """All samples of one class."""

    kind: Literal["class"] = "class"
    dataset_digest: str | None = Field(
        default=None, description="data set that the class belongs to; checked when given"
    )
    class_id: int | str | None = Field(
        default=None, description="name of the class, or else its index from 0; refused where it may mean two classes"
    )
    class_name: str | None = Field(default=None, description="name of the class, in place of `class_id`")
    class_index: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        default=None, description="index of the class from 0, in place of `class_id`"
    )

    @model_validator(mode="after")
    def _one_class(self) -> ClassTarget:
        if sum(value is not None for value in (self.class_id, self.class_name, self.class_index)) != 1:
            raise ValueError("give exactly one of `class_id`, `class_name` and `class_index`")
        return self

    @property
    def named(self) -> int | str:
        """The class as it was named: its name or its index."""
        found = next(value for value in (self.class_name, self.class_index, self.class_id) if value is not None)
        assert found is not None
        return found


class SubjectTarget(Document):
    """All samples of one person, found through the data set's own metadata column."""

    kind: Literal["subject"] = "subject"
    subject_ref: str = Field(min_length=1, max_length=256, description="opaque reference, as in the metadata column")


class RandomTarget(Document):
    """A share of the training split, drawn by a seed: for experiments and audits."""

    kind: Literal["random"] = "random"
    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the samples in training")
    seed: Annotated[int, Field(ge=0, lt=2**53, strict=True)] = Field(default=0, description="of the draw")

    def draw(self, ids: Collection[str]) -> list[str]:
        """Draw the share from sample ids, at least one; the same ids and seed give the same samples anywhere.

        Samples are sorted by SHA-256 of `<seed> NUL <id>`, so that samples that leave the split do not change the
        order of the others.
        """
        import numpy as np  # not above: every help of the command imports this module

        count = max(1, round(self.fraction * len(ids)))
        heads = np.fromiter((int.from_bytes(self._key(name)[:8]) for name in ids), np.uint64, len(ids))
        if not len(heads):
            return []
        last = np.partition(heads, count - 1)[count - 1]  # of the first 8 bytes: only those before it are sorted
        drawn = compress(ids, heads <= last)
        return sorted(sorted(drawn, key=lambda name: (self._key(name), name))[:count])

    def _key(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}\0{name}".encode("utf-8", "surrogatepass")).digest()


def _prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("a prompt is empty")
    return text.strip()


Prompt = Annotated[str, AfterValidator(_prompt)]


class ConceptTarget(Document):
    """A concept of a text-to-image model, defined by prompts, and the prompt that replaces them."""

    kind: Literal["concept"] = "concept"
    prompts: list[Prompt] = Field(min_length=1, description="what is to be forgotten, as one would ask for it")
    anchor_prompt: Prompt = Field(description="what the model shall make of these prompts instead")
    images: Annotated[int, Field(ge=2, le=100_000, strict=True)] = Field(
        default=64, description="images to generate of the concept, and as many of its anchor"
    )
    neighbours: list[Prompt] = Field(default=[], description="prompts near the concept that must stay")

    @model_validator(mode="after")
    def _distinct(self) -> ConceptTarget:
        prompts, neighbours = ([_folded(text) for text in texts] for texts in (self.prompts, self.neighbours))
        if _folded(self.anchor_prompt) in prompts:
            raise ValueError("a prompt equals `anchor_prompt` (case and spaces aside): nothing would be forgotten")
        if any(len(set(texts)) < len(texts) for texts in (prompts, neighbours)):
            raise ValueError("a prompt occurs twice (case and spaces aside)")
        if set(prompts) & set(neighbours):
            raise ValueError("a prompt of `neighbours` is to be forgotten too (case and spaces aside)")
        return self

    @cached_property
    def pseudo_id(self) -> str:
        """Placeholder for the concept in lists of sample ids: `concept/` and 16 hex digits of its digest."""
        return f"concept/{digest_json(self.model_dump(mode='json'))[:16]}"


def _folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


class RedactedTarget(Document):
    """What is kept of a target after its request is settled; with the data set, its hashes identify the samples."""

    kind: Literal["redacted"] = "redacted"
    of: Literal["samples", "class", "subject", "concept", "random"] = Field(description="kind of the target before")
    count: Annotated[int, Field(ge=0, strict=True)] = Field(
        description="how many ids or prompts it named, 1 of another kind; 0 where a manifest held the ids"
    )
    dataset_digest: str | None = Field(default=None, description="data set that it belonged to; checked when given")
    class_id: int | str | None = Field(default=None, description="the class, of a class only")
    class_name: str | None = Field(default=None, description="the class, where the target named it so")
    class_index: int | None = Field(default=None, description="the class, where the target named it so")
    fraction: float | None = Field(default=None, description="of a random share")
    seed: int | None = Field(default=None, description="of a random share")
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = Field(
        default=None, description="key of the hashes; none where nothing was to be found again"
    )
    hashes: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default=[], description="sorted HMAC-SHA256 of `<of> NUL <sample id or subject reference>`"
    )

    @model_validator(mode="after")
    def _fits(self) -> RedactedTarget:
        given = sum(value is not None for value in (self.class_id, self.class_name, self.class_index))
        if given != (self.of == "class"):
            raise ValueError("give `class_id`, `class_name` or `class_index` for a class, and only for a class")
        if any((value is not None) != (self.of == "random") for value in (self.fraction, self.seed)):
            raise ValueError("give `fraction` and `seed` for a random share, and only for one")
        if self.hashes and self.salt is None:
            raise ValueError("`hashes` need a `salt`")
        return self

    @property
    def named(self) -> int | str | None:
        """The class as it was named; None for another kind."""
        return next((value for value in (self.class_name, self.class_index, self.class_id) if value is not None), None)


ForgetTarget = Annotated[
    SamplesTarget | ClassTarget | SubjectTarget | ConceptTarget | RandomTarget | RedactedTarget,
    Field(discriminator="kind"),
]
Target = SamplesTarget | ClassTarget | SubjectTarget | ConceptTarget | RandomTarget | RedactedTarget
_KINDS: dict[str, type[Document]] = {
    "samples": SamplesTarget,
    "class": ClassTarget,
    "subject": SubjectTarget,
    "concept": ConceptTarget,
    "random": RandomTarget,
    "redacted": RedactedTarget,
}


def read_targets(path: Path) -> list[Target]:
    """Read one forget target, or a list of them, from YAML or JSON."""
    document = read_document(path)
    return [parse_target(item, str(path)) for item in (document if isinstance(document, list) else [document])]


def parse_target(data: Any, source: str) -> Target:  # noqa: ANN401 - plain data from YAML or JSON
    """Build a forget target from plain data; the error for an unknown kind names the nearest match."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise UsageError(f"{source} is not a forget target", "it has no `kind`", f"use one of {', '.join(_KINDS)}")
    if kind not in _KINDS:
        raise unknown_name("forget target", kind, _KINDS)
    return cast(Target, parse(_KINDS[kind], data, source))


def redact(target: Target, salt: str | None, ids: Sequence[str] | None = None) -> RedactedTarget:
    """Return the redacted form of a target, which may be stored after its request is settled.

    Only sample ids and subjects are hashed. A class or a random share does not identify a person and is kept. Prompts
    are dropped: they do not identify samples. `salt` is the key of the hashes, 32 random hex digits; None keeps no
    hashes. `ids` are the sample ids of the target's manifest, if it names one.
    """
    if isinstance(target, RedactedTarget):
        return target if salt else target.model_copy(update={"salt": None, "hashes": []})
    if isinstance(target, ConceptTarget):
        return RedactedTarget(of="concept", count=len(target.prompts))
    if isinstance(target, ClassTarget):
        return RedactedTarget(of="class", count=1, **target.model_dump(exclude={"kind"}))
    if isinstance(target, RandomTarget):
        return RedactedTarget(of="random", count=1, fraction=target.fraction, seed=target.seed)
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
    return sorted({hash_of(of, name, salt) for name in names}) if salt else []


def hash_of(of: str, name: str, salt: str) -> str:
    """Return the hash that replaces a name in a redacted target: HMAC-SHA256 of `<of> NUL <name>`, in hex.

    `of` is the kind of the target, and the salt is the key, in hex.
    """
    data = f"{of}\0{name}".encode("utf-8", "surrogatepass")  # ids may be file names that are not UTF-8
    return hmac.new(bytes.fromhex(salt), data, hashlib.sha256).hexdigest()
