"""DSSE envelopes with one ed25519 signature, in one form only: each byte of the file is part of what is checked.

A usual DSSE reader takes any JSON layout and any base64 of the same bytes. This one takes the canonical form (RFC 8785)
alone, so that a certificate is its bytes: no other file opens as the same certificate.
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
_DAMAGED = "fetch it again; if it still differs, it is not what was signed"


class Signature(Document):
    """One signature of an envelope."""

    keyid: str = Field(description="SHA-256 of the raw public key, in hex")
    sig: str = Field(description="ed25519 over the pre-authentication encoding, in standard base64")


class Envelope(Document):
    """A signed payload, as DSSE lays it out."""

    payload: str = Field(description="the payload in standard base64")
    payloadType: str = Field(description="what the payload is")  # noqa: N815 - DSSE's name
    signatures: list[Signature] = Field(min_length=1, max_length=1, description="exactly one")


def keyid(key: Ed25519PublicKey) -> str:
    """Return the id of a public key: the SHA-256 of its 32 raw bytes, in hex."""
    return sha256_bytes(key.public_bytes_raw())


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return what DSSE v1 signs.

    Example:
        >>> pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, key: Ed25519PrivateKey) -> bytes:
    """Sign a payload; the same payload and key give the same bytes.

    Args:
        payload: canonical JSON.
        payload_type: what it is.
        key: the signer's.

    Returns:
        The envelope in canonical JSON, without a final newline.

    Raises:
        IntegrityError: the payload is no canonical JSON, or too large.
    """
    _check_canonical(payload, "what is to be signed")
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
    """Check an envelope and return its payload.

    Args:
        data: the whole file.
        trusted: the public keys that may have signed it; a key inside the file counts for nothing.
        payload_type: what the payload must be.

    Returns:
        The payload, canonical JSON that one of the trusted keys signed.

    Raises:
        IntegrityError: the signature is wrong or of another key, or one byte differs from the canonical form.
        UsageError: no key is trusted.
    """
    keys = {keyid(key): key for key in trusted}
    if not keys:
        raise UsageError("no key is trusted", "a signature proves nothing without one", "name the signer's public key")
    envelope = _read(data)
    if envelope.payloadType != payload_type:
        raise _damaged("it is no envelope of an in-toto statement")
    payload, signature = _decode(envelope.payload), _decode(envelope.signatures[0].sig)
    key = keys.get(envelope.signatures[0].keyid)
    if key is None:
        raise IntegrityError(
            "the certificate was not signed by a trusted key",
            f"it names key {envelope.signatures[0].keyid[:12]!r}, trusted: {', '.join(name[:12] for name in keys)}",
            "get the public key from the signer by another way, and name it with --key",
        )
    try:
        key.verify(signature, pre_authentication_encoding(payload_type, payload))
    except InvalidSignature as error:
        raise IntegrityError(
            "the certificate's signature is wrong", "it was changed after it was signed", _DAMAGED
        ) from error
    _check_canonical(payload, "the certificate's payload")
    return payload


def claimed_keyid(data: bytes) -> str:
    """Return the id of the key that an envelope says it was signed with; nothing is verified.

    Raises:
        IntegrityError: it is no envelope in its canonical form.
    """
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
        raise _damaged(f"it has over {MAX_ENVELOPE_BYTES} bytes")


def _check_canonical(data: bytes, what: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        document = json.loads(data)
        canonical = canonical_json(document)
    except IntegrityError as error:
        raise _damaged(f"{what} has no canonical form") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{what} is no JSON") from error
    if canonical != data:
        raise _damaged(f"{what} is not in the canonical form (RFC 8785, no final newline)")
    return document


def _decode(text: str) -> bytes:
    """Decode base64 that is written in the one canonical way: padded, and with zeros as its unused bits."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged("its base64 is broken") from error
    if base64.b64encode(data).decode() != text:
        raise _damaged("its base64 is not the canonical one")
    return data


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("the certificate is damaged", why, _DAMAGED)
