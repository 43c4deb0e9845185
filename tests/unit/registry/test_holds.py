"""Holds of versions, and the records of deleted weights."""

from datetime import UTC, datetime

import pytest

from salun_core.errors import ConflictError, UsageError
from salun_core.registry.holds import (
    VersionDisposal,
    hold_version,
    holds,
    read_disposal,
    record_disposal,
    release_version,
)
from salun_core.registry.versions import publish


@pytest.fixture
def version(store, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return publish(store, {"line": "faces", "method": "train"}, {path.name: path})[0].version


def at_noon():
    return datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_hold_and_release(store, version):
    hold = hold_version(store, "faces", version, "ana", "audit 7", at_noon)
    assert hold == hold_version(store, "faces", version, "bob", "another", at_noon)  # the first stands
    assert (hold.by, hold.at) == ("ana", "2026-01-31T12:00:00+00:00")
    assert holds(store, "faces") == [hold]
    assert holds(store, "face") == []
    assert release_version(store, "faces", version) == hold
    assert holds(store, "faces") == []
    with pytest.raises(UsageError, match="is not held"):
        release_version(store, "faces", version)
    with pytest.raises(UsageError, match="no such version"):
        hold_version(store, "faces", "0" * 64, "ana", "audit", at_noon)
    with pytest.raises(UsageError, match="reason"):
        hold_version(store, "faces", version, "ana", "two\nlines", at_noon)


def test_a_deleted_version_cannot_be_held_and_the_first_record_stands(store, version):
    def record(by):
        fields = {"line": "faces", "version": version, "files": ["model.safetensors"], "size": 7}
        return VersionDisposal(**fields, at="2026-02-01T00:00:00+00:00", by=by, reason="30 days are over")

    assert read_disposal(store, "faces", version) is None
    assert record_disposal(store, record("purge")) == record_disposal(store, record("another")) == record("purge")
    assert read_disposal(store, "faces", version) == record("purge")
    with pytest.raises(ConflictError, match="were deleted at 2026-02-01"):
        hold_version(store, "faces", version, "ana", "audit", at_noon)
