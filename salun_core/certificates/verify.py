"""Verifies an erasure certificate: envelope, signature, contents, and every file of the model folder.

All of that is offline. Whether the version was rolled back later is known from a revocation, or from the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from salun_core.certificates.envelope import MAX_ENVELOPE_BYTES, claimed_keyid
from salun_core.certificates.keys import load_trusted_keys, read_small
from salun_core.certificates.statement import (
    DisposalAddendum,
    DisposalDone,
    ErasureCertificate,
    Revocation,
    RevocationAddendum,
    open_statement,
    read_unverified,
)
from salun_core.digest import sha256_bytes, sha256_file
from salun_core.errors import IntegrityError, UsageError
from salun_core.registry.rollbacks import undoing, versions_in_use
from salun_core.requests.reading import read_last
from salun_core.requests.schema import Status
from salun_core.storage import open_store
from salun_core.storage.keys import addenda_prefix, addendum_key, certificate_key
from salun_core.storage.local_files import list_tree, write_whole
from salun_core.storage.objects import ObjectStore

_SHOWN = 10


@dataclass(frozen=True)
class Verification:
    """The result of a verification in which every check passed.

    Args:
        keyid: of the trusted key that signed it.
        key_source: where that key came from.
        files: number of files of the model folder that were compared; None if no folder was given.
        superseded_by: SHA-256 of the certificate of the request that the store has now, if it is another one.
        in_store: whether the store was asked.
    """

    certificate: ErasureCertificate
    sha256: str
    keyid: str
    key_source: str
    files: int | None
    addenda: tuple[DisposalAddendum, ...]
    superseded_by: str | None = None
    in_store: bool = False


def verify_certificate(
    path: Path,
    model: Path | None = None,
    keys: Sequence[Path] = (),
    addenda: Sequence[Path] = (),
    store_uri: str | None = None,
) -> Verification:
    """Verify a certificate with files on this machine and, with `store_uri`, against the store that it comes from.

    Offline, a later rollback of the version is known only from a revocation among the addenda. The weights of the model
    folder are not loaded.
    """
    trusted = load_trusted_keys(keys, path)
    data = _read(path)
    certificate = open_statement(ErasureCertificate, data, trusted.keys, str(path))
    digest = sha256_bytes(data)
    added: list[DisposalAddendum] = []
    for item in addenda:
        content = _read(item)
        if _is_revocation(content):
            revocation = open_statement(RevocationAddendum, content, trusted.keys, str(item))
            _check_addendum(item, revocation, certificate, digest)
            raise _revoked(path, certificate, revocation.predicate)
        addendum = open_statement(DisposalAddendum, content, trusted.keys, str(item))
        _check_addendum(item, addendum, certificate, digest)
        added.append(addendum)
    newer = _check_in_store(path, open_store(store_uri), certificate, digest) if store_uri else None
    files = _check_model(model, certificate) if model is not None else None
    found = (certificate, digest, claimed_keyid(data), trusted.source, files, tuple(added))
    return Verification(*found, superseded_by=newer, in_store=bool(store_uri))


def _is_revocation(data: bytes) -> bool:
    """Whether a file claims to be a revocation; it is not verified."""
    try:
        read_unverified(RevocationAddendum, data, "it")
    except IntegrityError:
        return False
    return True


def _revoked(path: Path, certificate: ErasureCertificate, revocation: Revocation) -> IntegrityError:
    why = (
        f"{_certified(certificate)} was rolled back on {revocation.at[:16].replace('T', ' ')} UTC: {revocation.reason}"
    )
    request = certificate.predicate.request.id
    return IntegrityError(
        f"{path} is revoked", why, f"ask for the request's new certificate: salun request show {request}"
    )


def _check_in_store(path: Path, store: ObjectStore, certificate: ErasureCertificate, sha256: str) -> str | None:
    """Check that a certificate still holds in its store: version in use, not revoked, request completed.

    Anything that cannot be read or is missing refuses. The lineage of HEAD decides, so that a rollback is seen although
    nobody signed a revocation. Returns the SHA-256 of the request's current certificate, if it is another one.
    """
    request, model = certificate.predicate.request.id, certificate.predicate.model
    current, copy = store.get(certificate_key(request)), addendum_key(request, f"certificate-{sha256[:12]}.json")
    newest = sha256_bytes(current.data) if current else None
    kept = store.get(copy) if newest != sha256 else current
    if kept is None or sha256_bytes(kept.data) != sha256:
        what = f"the store has another certificate of request {request}" if current else "the store does not have it"
        raise IntegrityError(f"{path} is not of this store", what, "give the --store that issued it, or reject it")
    last = read_last(store, request)
    standing = last.to_status.value if last else "received"
    remedy = f"fetch its new certificate: salun certificate {request} --out FILE"
    if newest == sha256:
        remedy = f"wait until it is completed, then {remedy}"
        if last and last.to_status is Status.COMPLETED:
            remedy = f'queue the request again: salun request reopen {request} --reason "..."'
    if how := undoing(store, model.line, model.version):
        why = f"{_certified(certificate)} {how}; request {request} is {standing}"
        raise IntegrityError(f"{path} is not valid any more", why, remedy)
    for addendum in fetch_addenda_of(store, request):  # fail closed: whoever signed it
        if addendum.revocation and addendum.certificate == sha256:
            raise IntegrityError(f"{path} is revoked", addendum.revocation.reason, remedy)
    if newest == sha256 and (last is None or last.to_status is not Status.COMPLETED):
        since = f" since {last.at[:16].replace('T', ' ')} UTC: {last.reason}" if last else ""
        raise IntegrityError(f"{path} is not valid any more", f"request {request} is {standing}{since}", remedy)
    return None if newest == sha256 else newest


def undoing_of(store: ObjectStore, request_id: str) -> str:
    """Return how the version in a request's certificate was undone; empty if it is in use or nothing was certified."""
    stored = store.get(key := certificate_key(request_id))
    if stored is None:
        return ""
    model = read_unverified(ErasureCertificate, stored.data, key).predicate.model
    how = undoing(store, model.line, model.version)
    return f"{model.line}@{model.version[:12]} {how}" if how else ""


def undone_of(store: ObjectStore, line: str, request_ids: Iterable[str]) -> list[str]:
    """Return the completed requests of a line whose erasure is undone; `undoing_of` returns how.

    It reads the certificates only if a version of the line is not in the lineage of HEAD.
    """
    in_use = versions_in_use(store, line)
    if in_use is None:
        return []
    found = []
    for request_id in request_ids:
        stored = store.get(key := certificate_key(request_id))
        if stored and read_unverified(ErasureCertificate, stored.data, key).predicate.model.version not in in_use:
            found.append(request_id)
    return found


def fetch_certificate(store_uri: str, request_id: str, out: Path) -> str:
    """Write a request's certificate to a file, byte for byte, and return its SHA-256. It is not verified."""
    data = _stored(store_uri, request_id)
    write_whole(out, data)
    return sha256_bytes(data)


def certificate_digest(store_uri: str, request_id: str) -> str:
    """Return the SHA-256 of a request's certificate in the store; errors as for `fetch_certificate`."""
    return sha256_bytes(_stored(store_uri, request_id))


def _stored(store_uri: str, request_id: str) -> bytes:
    stored = open_store(store_uri).get(certificate_key(request_id))
    if stored is None:
        raise UsageError(
            f"request {request_id!r} has no certificate",
            "none was issued yet, or there is no such request",
            f"check its status: salun request show {request_id}",
        )
    return stored.data


@dataclass(frozen=True)
class StoredAddendum:
    """A later addition to a certificate, as it is in the store; its signature was not verified.

    Args:
        certificate: SHA-256 of the certificate that it belongs to.
        done: what was deleted, and when.
        revocation: why the certificate is not valid any more; None: it is about disposals.
    """

    name: str
    data: bytes
    certificate: str
    done: tuple[DisposalDone, ...] = ()
    revocation: Revocation | None = None


def fetch_addenda(store_uri: str, request_id: str) -> list[StoredAddendum]:
    """Return the addenda of a request's certificates, those of superseded certificates included. None is verified."""
    return fetch_addenda_of(open_store(store_uri), request_id)


def fetch_addenda_of(store: ObjectStore, request_id: str) -> list[StoredAddendum]:
    """Return the addenda of a request in an open store; see `fetch_addenda`."""
    found = []
    for entry in store.list(addenda_prefix(request_id)):
        name = entry.key.rpartition("/")[2]
        kind = name.partition("-")[0]
        stored = store.get(entry.key) if kind in {"disposal", "revocation"} else None
        if stored is None:
            continue
        if kind == "disposal":
            disposal = read_unverified(DisposalAddendum, stored.data, entry.key)
            sha256, done = disposal.subject[0].digest.sha256, disposal.predicate.done
            found.append(StoredAddendum(name, stored.data, sha256, done))
        else:
            revocation = read_unverified(RevocationAddendum, stored.data, entry.key)
            sha256, fields = revocation.subject[0].digest.sha256, revocation.predicate
            found.append(StoredAddendum(name, stored.data, sha256, revocation=fields))
    return found


def _read(path: Path) -> bytes:
    return read_small(path, MAX_ENVELOPE_BYTES)[0]  # one byte more than allowed is refused as too large


def _check_addendum(
    path: Path, addendum: DisposalAddendum | RevocationAddendum, certificate: ErasureCertificate, digest: str
) -> None:
    belongs = addendum.predicate.request == certificate.predicate.request.id
    if not belongs or addendum.subject[0].digest.sha256 != digest:
        raise IntegrityError(
            f"{path} does not belong to this certificate",
            f"it is about another certificate, of request {addendum.predicate.request}",
            "name only the addenda of this certificate",
        )


def _check_model(folder: Path, certificate: ErasureCertificate) -> int:
    """Compare every file of a folder with the certificate's subject, and return the number of files."""
    expected = {item.name: item.digest.sha256 for item in certificate.subject}
    names = _plain_files(folder, certificate)
    faults = [f"{name} is missing" for name in sorted(expected.keys() - names)]
    faults += [f"{name!r} is not in the certificate" for name in sorted(names - expected.keys())]
    for name in sorted(names & expected.keys()):
        try:
            changed = sha256_file(folder / name) != expected[name]
        except OSError as error:
            raise UsageError(f"cannot read {folder / name}", error.strerror or "", "check its permissions") from error
        faults += [f"{name} was changed"] if changed else []
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise IntegrityError(
            f"{folder} is not the certified model",
            "; ".join(faults[:_SHOWN]) + more,
            f"fetch it again: salun model pull {_certified(certificate)} --out DIR",
        )
    return len(expected)


def _certified(certificate: ErasureCertificate) -> str:
    model = certificate.predicate.model
    return f"{model.line}@{model.version[:12]}"


def _plain_files(folder: Path, certificate: ErasureCertificate) -> frozenset[str]:
    try:
        found = list_tree(folder)
    except OSError as error:
        raise UsageError(
            f"cannot read the model folder {folder}",
            error.strerror or "",
            f"check the path and its permissions, or fetch it: salun model pull {_certified(certificate)} --out DIR",
        ) from error
    if found.strange:
        raise IntegrityError(
            f"{folder} holds more than regular files",
            f"{', '.join(repr(name) for name in found.strange[:_SHOWN])}: a link, a device, an empty or a deep folder",
            f"a version has regular files only; fetch it again: salun model pull {_certified(certificate)} --out DIR",
        )
    return found.files
