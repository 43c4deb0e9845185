"""A model line as one caller reads it: HEAD, and the version, card, task and split that HEAD names."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from salun_core.data.split import SplitManifest, stored_split
from salun_core.errors import UsageError
from salun_core.models.card import CARD, Card
from salun_core.registry.lookup import Version, no_head, read_file, read_head, read_version, require_head
from salun_core.registry.manifest import Head
from salun_core.storage.documents import parse_stored
from salun_core.storage.objects import FileStore
from salun_core.tasks import task_named
from salun_core.tasks.task import Task


@dataclass(frozen=True)
class OpenLine:
    """A model line at one version, by default HEAD; each part is read once, on first use, and verified by its digest.

    HEAD may move meanwhile: what this object has read stays that of one version. `again` looks where HEAD is now.
    """

    store: FileStore
    name: str
    pinned: str | None = None

    @cached_property
    def head(self) -> Head | None:
        """HEAD of the line, or None if it has none; IntegrityError if it is damaged."""
        found = read_head(self.store, self.name)
        return found[0] if found else None

    @cached_property
    def digest(self) -> str:
        """Digest of the version; UsageError if the line has no HEAD."""
        if self.pinned is not None:
            return self.pinned
        if self.head is None:
            raise no_head(self.name)
        return self.head.version

    @cached_property
    def version(self) -> Version:
        """Digest and manifest; UsageError if there is no such version, IntegrityError if it is damaged."""
        return Version(self.digest, read_version(self.store, self.name, self.digest))

    @cached_property
    def card(self) -> Card:
        """The model card; IntegrityError if it is gone or damaged."""
        data = read_file(self.store, self.version, CARD)
        kind: type[Card] = Card
        with suppress(UsageError, ValueError, AttributeError, RecursionError):  # the parser reports what is wrong
            kind = task_named(json.loads(data).get("task", "classification")).card_type
        return parse_stored(kind, data, CARD)

    @cached_property
    def task(self) -> Task[Any]:
        """The task of the model."""
        return task_named(self.card.task)

    @cached_property
    def split(self) -> SplitManifest:
        """Which samples the version was trained on; errors as for `stored_split`."""
        return stored_split(self.store, self.version)

    def at(self, digest: str) -> OpenLine:
        """Return the line at a version, which is this object if it has read that one."""
        return self if vars(self).get("digest") == digest else replace(self, pinned=digest)

    def again(self) -> OpenLine:
        """Read HEAD again, and keep what was read of its version if HEAD has not moved.

        UsageError if there is no HEAD, IntegrityError if it is damaged.
        """
        return self.at(require_head(self.store, self.name).version)
