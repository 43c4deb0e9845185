"""Issues erasure certificates: signs what is attested, and writes it once for each request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from salun_core.config import parse
from salun_core.digest import sha256_bytes
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.requests.envelope import claimed_keyid, keyid
from salun_core.requests.facts import Facts, build_statement
from salun_core.requests.statement import (
    DISPOSAL_TYPE,
    STATEMENT_TYPE,
    DisposalAddendum,
    DisposalDone,
    Disposals,
    ErasureCertificate,
    open_statement,
    sign_statement,
)
from salun_core.storage.names import addendum_key, certificate_key
from salun_core.storage.objects import ObjectStore, StoredObject

__all__ = ["DisposalDone", "Disposals", "Facts", "build_statement", "certify", "issue", "issue_addendum"]

_ATTEMPTS = 8


def certify(facts: Facts, signer: Ed25519PrivateKey) -> bytes:
    """Return a signed certificate: the bytes of its file; see `build_statement`."""
    return sign_statement(build_statement(facts, keyid(signer.public_key())), signer)


def issue(store: ObjectStore, facts: Facts, signer: Ed25519PrivateKey) -> str:
    """Write the certificate of a request; the call may be repeated.

    One that this key signed for the same version and outcome is kept. Any other is moved to the addenda first, and
    the new one says which it supersedes.

    Args:
        store: where.
        facts: what it is made from.
        signer: the signing key.

    Returns:
        The SHA-256 of the certificate's file.

    Raises:
        IntegrityError: the facts contradict each other, or the certificate that is there is damaged.
        GateRefusedError: the gate refused the version.
        ConflictError: others wrote the certificate again and again meanwhile.
    """
    key = certificate_key(facts.request.id)
    for _ in range(_ATTEMPTS):
        stored = store.get(key)
        if stored and _says_the_same(stored.data, facts, signer):
            return sha256_bytes(stored.data)
        try:
            return _write(store, key, stored, facts, signer)
        except ConflictError:
            continue  # another settle of the same request was faster: look at what it wrote
    raise ConflictError(f"{key} is written by others", "each time before we could", "settle the request again")


def _says_the_same(data: bytes, facts: Facts, signer: Ed25519PrivateKey) -> bool:
    public = signer.public_key()
    if claimed_keyid(data) != keyid(public):
        return False
    source = f"the certificate of request {facts.request.id}"
    found = open_statement(ErasureCertificate, data, [public], source).predicate
    if found.request.id != facts.request.id:
        raise IntegrityError(f"{source} is of another request", "it was copied or moved", "restore the right one")
    return (found.model.version, found.outcome) == (facts.version, facts.outcome)


def _write(store: ObjectStore, key: str, stored: StoredObject | None, facts: Facts, signer: Ed25519PrivateKey) -> str:
    if stored is None:
        data = certify(facts, signer)
        store.put_new(key, data)
        return sha256_bytes(data)
    old = sha256_bytes(stored.data)
    data = certify(replace(facts, supersedes=old), signer)
    store.put_new(addendum_key(facts.request.id, f"certificate-{old[:12]}.json"), stored.data)
    store.put_if(key, data, stored.etag)
    return sha256_bytes(data)


def issue_addendum(store: ObjectStore, request_id: str, done: Sequence[DisposalDone], signer: Ed25519PrivateKey) -> str:
    """Add to a request's certificate what was deleted since; the same facts give the same addendum.

    Args:
        store: where.
        request_id: the request.
        done: what was deleted, and when.
        signer: the signing key.

    Returns:
        The SHA-256 of the addendum's file.

    Raises:
        UsageError: the request has no certificate, or `done` is empty.
        ConflictError: an addendum of that name holds other bytes.
    """
    stored = store.get(certificate_key(request_id))
    if stored is None:
        raise UsageError(f"request {request_id} has no certificate", "none was issued yet", "settle the request first")
    subject = {"name": f"{request_id}.json", "digest": {"sha256": sha256_bytes(stored.data)}}
    predicate = {"request": request_id, "done": tuple(done), "signer": keyid(signer.public_key())}
    addendum = parse(
        DisposalAddendum,
        {"_type": STATEMENT_TYPE, "predicateType": DISPOSAL_TYPE, "subject": [subject], "predicate": predicate},
        f"the addendum to the certificate of request {request_id}",
    )
    data = sign_statement(addendum, signer)
    store.put_new(addendum_key(request_id, f"disposal-{sha256_bytes(addendum.canonical())[:12]}.json"), data)
    return sha256_bytes(data)
