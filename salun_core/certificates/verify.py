"""Verifies an erasure certificate offline: envelope, signature, contents, and every file of the model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salun_core.certificates.envelope import MAX_ENVELOPE_BYTES, claimed_keyid
from salun_core.certificates.keys import load_trusted_keys, read_small
from salun_core.certificates.statement import (
    DisposalAddendum,
    DisposalDone,
    ErasureCertificate,
    open_statement,
    read_unverified,
)
from salun_core.digest import sha256_bytes, sha256_file
from salun_core.errors import IntegrityError, UsageError
from salun_core.storage import open_store
from salun_core.storage.keys import addenda_prefix, certificate_key
from salun_core.storage.local_files import list_tree, write_whole

_SHOWN = 10


@dataclass(frozen=True)
class Verification:
    """The result of a verification in which every check passed.

    Args:
        certificate: what the file states.
        sha256: of the certificate's file.
        keyid: of the trusted key that signed it.
        key_source: where that key came from.
        files: number of files of the model folder that were compared; None if no folder was given.
        addenda: what the addenda state.
    """

    certificate: ErasureCertificate
    sha256: str
    keyid: str
    key_source: str
    files: int | None
    addenda: tuple[DisposalAddendum, ...]


def verify_certificate(
    path: Path, model: Path | None = None, keys: Sequence[Path] = (), addenda: Sequence[Path] = ()
) -> Verification:
    """Verify a certificate with files on this machine only.

    Args:
        path: the certificate's file.
        model: the model folder to compare with it; its weights are not loaded.
        keys: public keys of the trusted signers; for the default see `load_trusted_keys`.
        addenda: files that were added to the certificate later.

    Returns:
        The certificate, and what was compared.

    Raises:
        UsageError: a file cannot be read, or no key is trusted.
        IntegrityError: a byte of the certificate, of an addendum or of the model differs, or the signer is not trusted.
    """
    trusted = load_trusted_keys(keys, path)
    data = _read(path)
    certificate = open_statement(ErasureCertificate, data, trusted.keys, str(path))
    digest = sha256_bytes(data)
    added = tuple(open_statement(DisposalAddendum, _read(item), trusted.keys, str(item)) for item in addenda)
    for item, addendum in zip(addenda, added, strict=True):
        _check_addendum(item, addendum, certificate, digest)
    files = _check_model(model, certificate) if model is not None else None
    return Verification(certificate, digest, claimed_keyid(data), trusted.source, files, added)


def fetch_certificate(store_uri: str, request_id: str, out: Path) -> str:
    """Write a request's certificate to a file, byte for byte, and return its SHA-256. It is not verified.

    Raises:
        UsageError: the request has no certificate.
        StoreError: the store cannot be reached, or the file cannot be written.
    """
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
        name: its file name.
        data: its bytes.
        certificate: SHA-256 of the certificate that it belongs to.
        done: what was deleted, and when.
    """

    name: str
    data: bytes
    certificate: str
    done: tuple[DisposalDone, ...]


def fetch_addenda(store_uri: str, request_id: str) -> list[StoredAddendum]:
    """Return the addenda of a request's certificates, those of superseded certificates included. None is verified.

    Raises:
        IntegrityError: one of them is damaged.
        StoreError: the store cannot be reached.
    """
    store, found = open_store(store_uri), []
    for entry in store.list(addenda_prefix(request_id)):
        name = entry.key.rpartition("/")[2]
        stored = store.get(entry.key) if name.startswith("disposal-") else None
        if stored is not None:
            statement = read_unverified(DisposalAddendum, stored.data, entry.key)
            certificate = statement.subject[0].digest.sha256
            found.append(StoredAddendum(name, stored.data, certificate, statement.predicate.done))
    return found


def _read(path: Path) -> bytes:
    return read_small(path, MAX_ENVELOPE_BYTES)[0]  # one byte more than allowed is refused as too large


def _check_addendum(path: Path, addendum: DisposalAddendum, certificate: ErasureCertificate, digest: str) -> None:
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
