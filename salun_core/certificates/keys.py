"""Signing keys in PEM files: creates, reads and checks them. No message and no log holds the content of a key."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from salun_core.certificates.envelope import keyid
from salun_core.errors import UsageError

SIGNING_VARIABLE = "SALUN_SIGNING_KEY"
VERIFY_VARIABLE = "SALUN_VERIFY_KEY"
_ADJACENT = "salun.pub"
ADJACENT_KEY = f"{_ADJACENT} beside the certificate"  # a value in the JSON output of `salun verify`
_MAX_KEY_BYTES = 16 * 1024
_PRIVATE_MARK = b"PRIVATE KEY-----"
_CREATE = "create a key with `salun key create`"


@dataclass(frozen=True)
class CreatedKey:
    """A new pair of keys: its two files, and the id by which certificates name it."""

    private: Path
    public: Path
    keyid: str


@dataclass(frozen=True)
class TrustedKeys:
    """The trusted public keys, and where they came from, for the message."""

    keys: tuple[Ed25519PublicKey, ...]
    source: str


def create_key(place: Path) -> CreatedKey:
    """Create a signing key: `place`.pem for the signer (mode 0600), `place`.pub for those who verify.

    An existing file is never replaced (UsageError).
    """
    private, public = place.with_name(f"{place.name}.pem"), place.with_name(f"{place.name}.pub")
    for path in (private, public):  # before anything is written, so that no half of a pair is left
        if path.exists() or path.is_symlink():
            raise _exists(path)
    key = Ed25519PrivateKey.generate()
    _write_new(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write_new(public, public_pem(key.public_key()), 0o644)
    return CreatedKey(private, public, keyid(key.public_key()))


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return a public key as in a .pub file (SubjectPublicKeyInfo, PEM)."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise UsageError(f"cannot write {path}", error.strerror or "", "check the path and its permissions") from error


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already", "a key is never overwritten", "choose another name with --out")


def load_signing_key(path: Path | None = None) -> Ed25519PrivateKey:
    """Read the private key that signs certificates, by default from the file that `SALUN_SIGNING_KEY` names.

    UsageError if every user may read the file, or if it holds no unencrypted ed25519 key in PKCS8 PEM.
    """
    named = path or _signing_path()
    data = _read(named, private=True)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise UsageError(
            f"the signing key in {named} is encrypted",
            "a sweep cannot enter its password",
            f"decrypt it once with `openssl pkey -in {named.name} -out NEW.pem`, and protect that file",
        ) from error
    except (ValueError, UnsupportedAlgorithm):
        raise _not_a_key(named, "private key in PEM (PKCS8)") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_type(named)
    return key


def find_signing_key() -> Ed25519PrivateKey | None:
    """Read the key that `SALUN_SIGNING_KEY` names; None if it is not set. Raises as `load_signing_key`."""
    return load_signing_key() if os.environ.get(SIGNING_VARIABLE, "").strip() else None


def _signing_path() -> Path:
    named = os.environ.get(SIGNING_VARIABLE, "").strip()
    if not named:
        raise UsageError(
            "no signing key is set",
            f"{SIGNING_VARIABLE} names no file",
            f"create one with `salun key create --out DIR/NAME` and set {SIGNING_VARIABLE}=DIR/NAME.pem",
        )
    if "-----" in named:
        raise UsageError(
            f"{SIGNING_VARIABLE} holds a key",
            "it must hold the path of a key file",
            "mount the Secret as a file and set its path",
        )
    return Path(named)


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read an ed25519 public key in PEM."""
    data = _read(path, private=False)
    if _PRIVATE_MARK in data:
        raise UsageError(f"{path} holds a private key", "only the public key is needed here", "name the .pub file")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise _not_a_key(path, "public key in PEM (SubjectPublicKeyInfo)") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _other_type(path)
    return key


def load_trusted_keys(paths: Sequence[Path], certificate: Path) -> TrustedKeys:
    """Read the public keys that may have signed a certificate; no key inside it is trusted.

    Without paths, the files in `SALUN_VERIFY_KEY` (separated by colons) count; if that is empty, `salun.pub` next to
    the certificate.
    """
    named, source = list(paths), "--key"
    if not named:
        named = [Path(part) for part in os.environ.get(VERIFY_VARIABLE, "").split(os.pathsep) if part.strip()]
        source = VERIFY_VARIABLE
    adjacent = certificate.with_name(_ADJACENT)
    if not named and adjacent.is_file():
        named, source = [adjacent], ADJACENT_KEY
    if not named:
        raise UsageError(
            "no trusted key is named",
            "a certificate is only as trustworthy as the key that verifies it",
            f"give --key SIGNER.pub, set {VERIFY_VARIABLE}, or put {_ADJACENT} next to the certificate",
        )
    return TrustedKeys(tuple(load_public_key(path) for path in named), source)


def _read(path: Path, *, private: bool) -> bytes:
    data, mode = read_small(path, _MAX_KEY_BYTES)
    if not 0 < len(data) <= _MAX_KEY_BYTES:
        raise _not_a_key(path, "signing key" if private else "public key")
    # On a read-only mount only the container's processes see the file: a Secret's volume, whose mode Kubeflow sets.
    mounted = os.statvfs(path).f_flag & os.ST_RDONLY
    if private and mode & (stat.S_IROTH | stat.S_IWOTH) and not mounted:
        raise UsageError(
            f"every user may read or write the signing key {path}",
            f"its mode is {stat.S_IMODE(mode):04o}",
            "run chmod 600 on it",
        )
    return data


def read_small(path: Path, limit: int) -> tuple[bytes, int]:
    """Read a regular file, and return its content, cut after `limit` + 1 bytes, and its mode."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for a writer
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"{path} is not a regular file", "it is a pipe or a device", "name the file itself")
            return file.read(limit + 1), mode
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot read {path}", why, "check the path and its permissions") from error


def _not_a_key(path: Path, kind: str) -> UsageError:
    return UsageError(f"{path} holds no {kind}", "it is another file, or damaged", f"name a PEM file, or {_CREATE}")


def _other_type(path: Path) -> UsageError:
    return UsageError(f"{path} holds a key of another type", "certificates are signed with ed25519", _CREATE)
