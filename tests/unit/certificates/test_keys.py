"""Keys are created once, checked when they are read, and never shown."""

from __future__ import annotations

import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from salun_core.certificates.envelope import PAYLOAD_TYPE, keyid, open_envelope, sign
from salun_core.certificates.keys import create_key, load_public_key, load_signing_key, load_trusted_keys
from salun_core.errors import UsageError


@pytest.fixture(autouse=True)
def _no_keys_named(monkeypatch):
    monkeypatch.delenv("SALUN_SIGNING_KEY", raising=False)
    monkeypatch.delenv("SALUN_VERIFY_KEY", raising=False)


@pytest.fixture
def made(tmp_path):
    return create_key(tmp_path / "keys" / "salun.v1")


def private_pem(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def written(path, data, mode=0o600):
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_a_new_pair_signs_and_verifies(made):
    assert (made.private.name, made.public.name) == ("salun.v1.pem", "salun.v1.pub")
    assert stat.S_IMODE(made.private.stat().st_mode) == 0o600
    public = load_public_key(made.public)
    assert open_envelope(sign(b"{}", PAYLOAD_TYPE, load_signing_key(made.private)), [public]) == b"{}"
    assert made.keyid == keyid(public)


@pytest.mark.parametrize("there", ["salun.pem", "salun.pub"])
def test_no_file_is_overwritten(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        create_key(tmp_path / "salun")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there, "mine")]


def test_a_broken_link_is_not_followed(tmp_path):
    (tmp_path / "salun.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists"):
        create_key(tmp_path / "salun")
    assert not (tmp_path / "elsewhere").exists()


def test_the_environment_names_the_signing_key(made, monkeypatch):
    with pytest.raises(UsageError, match="salun key create"):
        load_signing_key()
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(made.private))
    assert keyid(load_signing_key().public_key()) == made.keyid


def test_a_key_inside_the_environment_variable_is_refused_and_not_shown(made, monkeypatch):
    monkeypatch.setenv("SALUN_SIGNING_KEY", made.private.read_text())
    with pytest.raises(UsageError) as caught:
        load_signing_key()
    assert made.private.read_text().splitlines()[1] not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "fine"), [(0o400, True), (0o440, True), (0o660, True), (0o644, False), (0o602, False)]
)
def test_a_signing_key_readable_by_every_user_is_refused(made, mode, fine):
    made.private.chmod(mode)
    if fine:
        load_signing_key(made.private)
    else:
        with pytest.raises(UsageError, match="every user"):
            load_signing_key(made.private)


def test_a_mounted_secret_may_be_a_link(made, tmp_path):
    (tmp_path / "mounted.pem").symlink_to(made.private)
    assert load_signing_key(tmp_path / "mounted.pem")


BAD_PRIVATE = {
    "another curve": (private_pem(ed448.Ed448PrivateKey.generate()), "another type"),
    "another kind": (private_pem(ec.generate_private_key(ec.SECP256R1())), "another type"),
    "encrypted": (private_pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"secret")), "encrypted"),
    "empty": (b"", "no signing key"),
    "text": (b"hello", "no private key"),
    "large": (b"a" * 20_000, "no signing key"),
    "cut": (private_pem(Ed25519PrivateKey.generate())[:-40], "no private key"),
}


@pytest.mark.parametrize(("data", "message"), BAD_PRIVATE.values(), ids=BAD_PRIVATE)
def test_an_invalid_signing_key_is_refused_and_not_shown(tmp_path, data, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_signing_key(written(tmp_path / "key.pem", data))
    lines = data.decode().splitlines()
    assert len(lines) < 2 or lines[1] not in str(caught.value)


def test_only_an_ed25519_public_key_is_trusted(made, tmp_path):
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    cases = {
        "private key": made.private.read_bytes(),
        "another type": other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "no public key": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    }
    for message, data in cases.items():
        with pytest.raises(UsageError, match=message):
            load_public_key(written(tmp_path / "key.pub", data))


@pytest.mark.parametrize("make", [None, os.mkdir, os.mkfifo])
def test_an_unreadable_key_is_refused_without_waiting(tmp_path, make):
    if make:
        make(tmp_path / "key.pub")
    with pytest.raises(UsageError):
        load_public_key(tmp_path / "key.pub")


def test_trusted_keys_come_from_the_option_then_the_environment_then_the_folder(made, tmp_path, monkeypatch):
    certificate = tmp_path / "certificate.json"
    with pytest.raises(UsageError, match="--key SIGNER.pub"):
        load_trusted_keys([], certificate)
    adjacent, other, third = (create_key(tmp_path / name) for name in ("salun", "other", "third"))
    found = load_trusted_keys([], certificate)
    assert ([keyid(key) for key in found.keys], found.source) == ([adjacent.keyid], "salun.pub beside the certificate")
    monkeypatch.setenv("SALUN_VERIFY_KEY", f"{other.public}:{third.public}")
    found = load_trusted_keys([], certificate)
    assert ([keyid(key) for key in found.keys], found.source) == ([other.keyid, third.keyid], "SALUN_VERIFY_KEY")
    found = load_trusted_keys([made.public], certificate)
    assert ([keyid(key) for key in found.keys], found.source) == ([made.keyid], "--key")
