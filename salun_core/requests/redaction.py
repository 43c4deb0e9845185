"""Takes what a settled request named out of its document; how much it was and salted hashes may stay."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from salun_core.data.forget_set import redact
from salun_core.errors import ConflictError
from salun_core.requests import reading
from salun_core.requests.schema import DeletionRequest
from salun_core.storage.keys import request_key
from salun_core.storage.objects import ObjectStore

_ATTEMPTS = 8


def redact_request(store: ObjectStore, request_id: str, keep_hashes: bool, ids: Sequence[str] | None = None) -> bool:
    """Replace a stored request by its redacted form; there is no way back. Doing it again changes nothing.

    This is the one change of a request's document. Its receipt stays the same.

    Args:
        store: where it is kept.
        request_id: the request; its caller has settled it.
        keep_hashes: keep salted hashes, so that a reopened request can be erased again; False deletes those that
            an earlier redaction kept.
        ids: the sample ids of a manifest, where the request names one.

    Returns:
        Whether anything was changed.

    Raises:
        UsageError: there is no such request.
        IntegrityError: the document is damaged, or was moved.
        ConflictError: others change it all the time.
    """
    key = request_key(request_id)
    for _ in range(_ATTEMPTS):
        stored = store.get(key)
        if stored is None:
            raise reading.unknown(store, request_id)
        request = reading.parse_request(stored.data, request_id)
        redacted = redacted_request(request, keep_hashes, ids)
        if redacted == request:
            return False
        try:
            store.put_if(key, redacted.canonical(), stored.etag)
        except ConflictError:
            continue
        return True
    raise ConflictError(f"cannot redact request {request_id}", "it changes all the time", "run it again later")


def redacted_request(request: DeletionRequest, keep_hashes: bool, ids: Sequence[str] | None = None) -> DeletionRequest:
    """Return a request without what it names; arguments as `redact_request`."""
    target = redact(request.target, secrets.token_hex(16) if keep_hashes else None, ids)
    return request.model_copy(update={"target": target, "sha256": request.filed_sha256})
