"""No byte of a certificate, an addendum or the model can change unnoticed; files of the format stay valid."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from salun_core.certificates.envelope import MAX_ENVELOPE_BYTES, PAYLOAD_TYPE, open_envelope, sign
from salun_core.certificates.keys import load_public_key, public_pem
from salun_core.certificates.statement import DisposalAddendum, ErasureCertificate, open_statement
from salun_core.certificates.verify import verify_certificate
from salun_core.digest import canonical_json
from salun_core.errors import IntegrityError, UsageError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "certificates" / "v1"
CERTIFICATE = (FIXTURE / "certificate.json").read_bytes()
PUBLIC = load_public_key(FIXTURE / "salun.pub")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PAYLOAD = b'{"a":1}'
ORDER = 2**252 + 27742317777372353535851937790883648493  # of ed25519's group


@pytest.fixture
def copy(tmp_path, monkeypatch):
    monkeypatch.delenv("SALUN_VERIFY_KEY", raising=False)
    return shutil.copytree(FIXTURE, tmp_path / "v1")


def refused(data, kind=ErasureCertificate):
    try:
        open_statement(kind, data, [PUBLIC], "it")
    except (IntegrityError, UsageError):
        return True
    return False


def test_the_files_of_the_format_stay_valid(copy):
    found = verify_certificate(copy / "certificate.json", copy / "model", addenda=[copy / "disposal.json"])
    assert (found.files, found.certificate.predicate.request.id, len(found.addenda)) == (3, "r-1", 1)


def test_a_certificate_is_written_as_it_was_read():
    certificate = open_statement(ErasureCertificate, CERTIFICATE, [PUBLIC], "it")
    assert certificate.canonical() == open_envelope(CERTIFICATE, [PUBLIC])


@pytest.mark.parametrize("bit", [0, 5])  # 5 turns letters into the other case
def test_each_changed_byte_is_refused(bit):
    changed = (
        CERTIFICATE[:place] + bytes([byte ^ 1 << bit]) + CERTIFICATE[place + 1 :]
        for place, byte in enumerate(CERTIFICATE)
    )
    assert [place for place, data in enumerate(changed) if not refused(data)] == []


@pytest.mark.parametrize("more", [b"", b" ", b"\n"], ids=["deleted", "space", "newline"])
def test_each_deleted_byte_and_each_added_white_space_is_refused(more):
    width = 0 if more else 1
    places = range(len(CERTIFICATE) + 1 - width)
    taken = [at for at in places if not refused(CERTIFICATE[:at] + more + CERTIFICATE[at + width :])]
    assert taken == []


@pytest.mark.parametrize("cut", [0, 1, 100, len(CERTIFICATE) - 1])
def test_a_truncated_certificate_is_refused(cut):
    assert refused(CERTIFICATE[:cut])


def test_each_changed_byte_of_an_addendum_is_refused():
    data = bytearray((FIXTURE / "disposal.json").read_bytes())
    assert not refused(bytes(data), DisposalAddendum)
    for place in range(len(data)):
        data[place] ^= 1
        assert refused(bytes(data), DisposalAddendum), place
        data[place] ^= 1


@pytest.mark.parametrize("name", sorted(path.name for path in (FIXTURE / "model").iterdir()))
def test_each_changed_byte_of_the_model_is_refused(copy, name):
    data = (copy / "model" / name).read_bytes()
    for place, byte in enumerate(data):
        (copy / "model" / name).write_bytes(data[:place] + bytes([byte ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError, match=f"{name} was changed"):
            verify_certificate(copy / "certificate.json", copy / "model")


def test_all_faults_of_a_model_folder_are_reported_at_once(copy):
    model = copy / "model"
    (model / "model.json").write_bytes(b"{}")
    (model / "split.parquet").unlink()
    (model / ".hidden").write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        verify_certificate(copy / "certificate.json", model)
    assert "split.parquet is missing; '.hidden' is not in the certificate; model.json was changed" in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("model.json")])
def test_only_regular_files_may_be_in_the_model_folder(copy, make):
    make(copy / "model" / "more")
    with pytest.raises(IntegrityError, match="more than regular files"):
        verify_certificate(copy / "certificate.json", copy / "model")


def test_a_file_replaced_by_a_link_to_its_copy_is_refused(copy):
    (copy / "model" / "model.json").rename(copy / "kept")
    (copy / "model" / "model.json").symlink_to(copy / "kept")
    with pytest.raises(IntegrityError, match="more than regular files"):
        verify_certificate(copy / "certificate.json", copy / "model")


def test_an_addendum_of_another_certificate_is_refused(copy):
    from salun_core.certificates.issue import certify
    from tests.support.certified import input_of

    (copy / "other.json").write_bytes(certify(*input_of(), KEY))
    (copy / "other.pub").write_bytes(public_pem(KEY.public_key()))
    with pytest.raises(IntegrityError, match="does not belong to this certificate"):
        verify_certificate(
            copy / "other.json", keys=[copy / "other.pub", copy / "salun.pub"], addenda=[copy / "disposal.json"]
        )


def test_a_key_that_is_not_trusted_is_refused():
    with pytest.raises(IntegrityError, match="not signed by a trusted key"):
        open_envelope(CERTIFICATE, [KEY.public_key()])
    with pytest.raises(UsageError, match="no key is trusted"):
        open_envelope(CERTIFICATE, [])
    assert open_envelope(CERTIFICATE, [KEY.public_key(), PUBLIC])


def envelope(**changed):
    return {**json.loads(sign(PAYLOAD, PAYLOAD_TYPE, KEY)), **changed}


def _open(document):
    return open_envelope(document if isinstance(document, bytes) else canonical_json(document), [KEY.public_key()])


def _signature():
    return json.loads(sign(PAYLOAD, PAYLOAD_TYPE, KEY))["signatures"][0]


def _malleable():
    """The other signature that a lax verifier would take: s + the order of the group."""
    raw = base64.b64decode(_signature()["sig"])
    scalar = int.from_bytes(raw[32:], "little") + ORDER
    return base64.b64encode(raw[:32] + scalar.to_bytes(32, "little")).decode()


FORGED = {
    "no signature": lambda: envelope(signatures=[]),
    "two signatures": lambda: envelope(signatures=[_signature()] * 2),
    "another keyid": lambda: envelope(signatures=[{**_signature(), "keyid": "0" * 64}]),
    "more in the signature": lambda: envelope(signatures=[{**_signature(), "cert": ""}]),
    "more in the envelope": lambda: envelope(more=1),
    "the other signature": lambda: envelope(signatures=[{**_signature(), "sig": _malleable()}]),
    "another payload type": lambda: envelope(payloadType="application/json"),
    "url-safe base64": lambda: envelope(payload="eyJhIjoxf_=="),
    "unused bits of base64": lambda: envelope(payload=envelope()["payload"][:-3] + "R=="),
    "no padding": lambda: envelope(payload=envelope()["payload"].rstrip("=")),
    "a list": lambda: [],
    "a number beyond JSON's": lambda: b"1" * 5000,
    "deep": lambda: b"[" * 100_000,
    "not UTF-8": lambda: b"\xff\xfe",
    "UTF-16": lambda: canonical_json(envelope()).decode().encode("utf-16"),
    "a lone surrogate": lambda: b'"\\ud800"',
    "a key twice": lambda: canonical_json(envelope()).replace(b"{", b'{"payload":"",', 1),
    "too large": lambda: b" " * (MAX_ENVELOPE_BYTES + 1),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_an_envelope_of_another_form_is_refused(forged):
    assert _open(envelope()) == PAYLOAD
    with pytest.raises(IntegrityError):
        _open(forged())


@pytest.mark.parametrize("payload", [b'{"a": 1}', b'{"b":1,"a":2}', b"{}\n", b"", b'{"a":1.0}', b"NaN"])
def test_a_payload_that_is_not_canonical_is_neither_signed_nor_opened(payload, monkeypatch):
    with pytest.raises(IntegrityError):
        sign(payload, PAYLOAD_TYPE, KEY)
    monkeypatch.setattr("salun_core.certificates.envelope._check_canonical", lambda *_: None)
    data = sign(payload, PAYLOAD_TYPE, KEY)
    monkeypatch.undo()
    with pytest.raises(IntegrityError, match="payload"):
        _open(data)


def test_a_payload_that_is_too_large_is_not_signed():
    with pytest.raises(IntegrityError, match="bytes"):
        sign(canonical_json("a" * MAX_ENVELOPE_BYTES), PAYLOAD_TYPE, KEY)


@settings(max_examples=30)
@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(-(2**53) + 1, 2**53 - 1), st.lists))
def test_an_opened_payload_equals_the_signed_one(document):
    payload = canonical_json(document)
    assert _open(sign(payload, PAYLOAD_TYPE, KEY)) == payload


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    assert refused(data)
