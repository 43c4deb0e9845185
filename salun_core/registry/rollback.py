"""Moves HEAD back to an earlier version; whether it may is decided by whoever knows what would come back."""

from __future__ import annotations

from collections.abc import Sequence

from salun_core.config import parse
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.registry.lookup import Version, ancestry, read_head
from salun_core.registry.manifest import Head
from salun_core.storage.keys import head_key
from salun_core.storage.objects import ObjectStore
from salun_core.times import utc_now


def undone_by(store: ObjectStore, line: str, version: str) -> Sequence[Version]:
    """Return the versions that a rollback would undo, the newest first.

    Args:
        store: where.
        line: the model line.
        version: digest of the version to go back to.

    Raises:
        UsageError: it is HEAD already, or no ancestor of HEAD.
    """
    past = ancestry(store, line)
    place = next((index for index, item in enumerate(past) if item.digest == version), None)
    if not place:
        why = "it is HEAD" if place == 0 else f"it is not among the {len(past)} versions that HEAD came from"
        raise UsageError(f"cannot roll {line} back to {version[:12]}", why, f"see `salun model history {line}`")
    return past[:place]


def roll_back(store: ObjectStore, line: str, version: str, expected: str) -> Head:
    """Make an ancestor of HEAD the HEAD again.

    Args:
        store: where.
        line: the model line.
        version: digest of the ancestor.
        expected: digest of the version that must be HEAD now.

    Raises:
        ConflictError: another version is HEAD.
        IntegrityError: the line has no HEAD.
    """
    found = read_head(store, line)
    if found is None:
        raise IntegrityError(f"model line {line} has no HEAD", "it is gone", "restore it from a copy")
    head, etag = found
    if head.version != expected:
        raise ConflictError(
            f"HEAD of {line} is {head.version[:12]}, not {expected[:12]}",
            "another version was published meanwhile",
            "look again at what the rollback would undo",
        )
    fields = {"line": line, "version": version, "sequence": head.sequence + 1, "published_at": utc_now(), "run": None}
    moved = parse(Head, fields, "HEAD")
    store.put_if(head_key(line), moved.model_dump_json().encode(), etag)
    return moved
