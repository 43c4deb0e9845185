"""Removes what a settled request named from its document; only the count and, if needed, salted hashes stay."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from salun_core.data.targets import redact
from salun_core.errors import ConflictError
from salun_core.requests.reading import parse_request, unknown_request
from salun_core.storage.keys import request_key
from salun_core.storage.objects import ObjectStore

_ATTEMPTS = 8


def redact_request(store: ObjectStore, request_id: str, keep_hashes: bool, ids: Sequence[str] | None = None) -> bool:
    """Replace a settled request by its redacted form, and return whether that changed it; this cannot be undone.

    This is the only change of a request's document. Its receipt stays the same. With `keep_hashes`, salted hashes stay
    so that a reopened request can be erased again; without, also those of an earlier redaction go. `ids` are the sample
    ids of a manifest, if the request names one.
    """
    key = request_key(request_id)
    for _ in range(_ATTEMPTS):
        stored = store.get(key)
        if stored is None:
            raise unknown_request(store, request_id)
        request = parse_request(stored.data, request_id)
        target = redact(request.target, secrets.token_hex(16) if keep_hashes else None, ids)
        redacted = request.model_copy(update={"target": target, "sha256": request.filed_sha256})
        if redacted == request:
            return False
        try:
            store.put_if(key, redacted.canonical(), stored.etag)
        except ConflictError:
            continue
        return True
    raise ConflictError(
        f"cannot redact request {request_id}", f"other processes changed it {_ATTEMPTS} times", "try again later"
    )
