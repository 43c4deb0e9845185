"""Errors of the local disk that a transfer meets."""

from __future__ import annotations

import errno
from pathlib import Path

from salun_core.errors import StoreError


def disk_error(what: str, path: Path, error: OSError) -> StoreError:
    """Build the error for a local file that cannot be read or written.

    Args:
        what: what was being done.
        path: the file or folder.
        error: what the system said.
    """
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    remedy = "free some space there, or choose another folder" if full else "check the path and its permissions"
    return StoreError(what, f"{path}: {error.strerror or type(error).__name__}", remedy)
