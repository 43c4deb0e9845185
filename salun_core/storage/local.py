"""Files on the local disk: written whole or not at all, and the errors that they meet."""

from __future__ import annotations

import errno
import os
import tempfile
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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; its folder is made, a file there is replaced.

    Args:
        path: the file.
        data: its bytes.

    Raises:
        StoreError: it cannot be written; what was there is unchanged.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o644)  # mkstemp makes it private; others may read what we write
        temporary.replace(path)
    except OSError as error:
        raise disk_error(f"cannot write {path.name}", path, error) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
