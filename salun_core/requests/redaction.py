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
    """Replace a stored request by its redacted form, which cannot be undone. Repeating it changes nothing.

    This is the only change of a request's document. Its receipt stays the same.

    Args:
        store: where the request is stored.
        request_id: the request; its caller has settled it.
        keep_hashes: keep salted hashes, so that a reopened request can be erased again; False deletes those that
            an earlier redaction kept.
        ids: the sample ids of a manifest, if the request names one.

    Returns:
        Whether the document changed.

    Raises:
        UsageError: no request has this id.
        IntegrityError: the document is damaged, or was moved.
        ConflictError: other processes change it again and again.
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
