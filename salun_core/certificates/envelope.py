"""DSSE envelopes with one ed25519 signature, in one canonical form, so that every byte of the file is verified.

Other DSSE readers accept any JSON layout and any base64 of the same bytes. This one accepts the canonical form only
(RFC 8785), so that no two different files open as the same certificate.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from salun_core.config import Document, parse
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import IntegrityError, SalunError, UsageError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE_BYTES = 1024 * 1024
_DAMAGED = "fetch it again: salun certificate ID --out FILE; if the error stays, it is not the signed file"


class Signature(Document):
    """One signature of an envelope."""

    keyid: str = Field(description="SHA-256 of the raw public key, in hex")
    sig: str = Field(description="ed25519 over the pre-authentication encoding, in standard base64")


class Envelope(Document):
    """A signed payload in the layout of DSSE."""

    payload: str = Field(description="the payload in standard base64")
    payloadType: str = Field(description="what the payload is")  # noqa: N815 - DSSE's name
    signatures: list[Signature] = Field(min_length=1, max_length=1, description="exactly one")


def keyid(key: Ed25519PublicKey) -> str:
    """Return the id of a public key: the SHA-256 of its 32 raw bytes, in hex."""
    return sha256_bytes(key.public_bytes_raw())


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return what DSSE v1 signs: `DSSEv1`, then type and payload, each after its length in bytes, joined by spaces."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, key: Ed25519PrivateKey) -> bytes:
    """Sign canonical JSON and return the envelope; the same payload and key give the same bytes."""
    _check_canonical(payload, "the payload to sign")
    signature = key.sign(pre_authentication_encoding(payload_type, payload))
    data = canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": keyid(key.public_key()), "sig": base64.b64encode(signature).decode()}],
        }
    )
    _check_size(data)
    return data


def open_envelope(data: bytes, trusted: Iterable[Ed25519PublicKey], payload_type: str = PAYLOAD_TYPE) -> bytes:
    """Verify an envelope and return its payload: canonical JSON that one of the trusted keys signed.

    A key inside the file is never trusted. IntegrityError if one byte differs from the canonical form.
    """
    keys = {keyid(key): key for key in trusted}
    if not keys:
        raise UsageError(
            "no key is trusted", "a signature proves nothing without a key", "name the signer's public key"
        )
    envelope = _read(data)
    if envelope.payloadType != payload_type:
        raise _damaged("it is not an envelope of an in-toto statement")
    payload, signature = _decode(envelope.payload), _decode(envelope.signatures[0].sig)
    key = keys.get(envelope.signatures[0].keyid)
    if key is None:
        raise IntegrityError(
            "the certificate was not signed by a trusted key",
            f"it names key {envelope.signatures[0].keyid[:12]!r}, trusted: {', '.join(name[:12] for name in keys)}",
            "get the public key from the signer, not with the certificate, and name it with --key",
        )
    try:
        key.verify(signature, pre_authentication_encoding(payload_type, payload))
    except InvalidSignature as error:
        raise IntegrityError(
            "the certificate's signature is invalid", "it was changed after it was signed", _DAMAGED
        ) from error
    _check_canonical(payload, "the certificate's payload")
    return payload


def claimed_keyid(data: bytes) -> str:
    """Return the id of the key that an envelope names as its signer, without any verification."""
    return _read(data).signatures[0].keyid


def _read(data: bytes) -> Envelope:
    _check_size(data)
    document = _check_canonical(data, "the certificate")
    try:
        return parse(Envelope, document, "the certificate")
    except SalunError as error:
        raise _damaged(error.why) from error


def _check_size(data: bytes) -> None:
    if len(data) > MAX_ENVELOPE_BYTES:
        raise _damaged(f"it is larger than {MAX_ENVELOPE_BYTES} bytes")


def _check_canonical(data: bytes, what: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        document = json.loads(data)
        canonical = canonical_json(document)
    except IntegrityError as error:
        raise _damaged(f"{what} has no canonical form") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{what} is not valid JSON") from error
    if canonical != data:
        raise _damaged(f"{what} is not in the canonical form (RFC 8785, no final newline)")
    return document


def _decode(text: str) -> bytes:
    """Decode base64 in canonical form: padded, with zeros as unused bits."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged("its base64 is not valid") from error
    if base64.b64encode(data).decode() != text:
        raise _damaged("its base64 is not in canonical form")
    return data


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("the certificate is damaged", why, _DAMAGED)
