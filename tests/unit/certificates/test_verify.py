"""Verification of a version with folders against the fetched folder."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from salun_core.certificates.issue import certify
from salun_core.certificates.keys import public_pem
from salun_core.certificates.verify import verify_certificate
from salun_core.digest import sha256_file
from salun_core.errors import IntegrityError, ModelError
from salun_core.registry.lookup import Version
from salun_core.registry.manifest import VersionManifest, weights_digest
from salun_core.registry.versions import fetch_version, stage_version
from tests.support.certified import evidence_of, input_of, judged
from tests.support.folder_model import UNET, files_in, write_folder

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def erased_by(manifest, after=None):
    """What the certificate of an erasure that made this version is made from."""
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    documents = judged(evidence_of(after or weights_digest(digests)))
    return input_of(version=Version(manifest.digest, manifest), documents=documents, frozen_digest=None)


def manifest_in(folder, **changes):
    """The manifest of a folder, without a store."""
    files = {name: {"sha256": sha256_file(path), "size": 1} for name, path in files_in(folder).items()}
    fields = {"line": "faces", "method": "salun", "created_at": "2026-02-03T10:00:00+00:00", "run": "run-7"}
    return VersionManifest.model_validate({**fields, "files": {**files, **changes}})


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """A model folder, its certificate and the public key in one folder."""
    monkeypatch.delenv("SALUN_VERIFY_KEY", raising=False)
    write_folder(tmp_path / "model")
    (tmp_path / "certificate.json").write_bytes(certify(*erased_by(manifest_in(tmp_path / "model")), KEY))
    (tmp_path / "salun.pub").write_bytes(public_pem(KEY.public_key()))
    return tmp_path


def verify(folder):
    return verify_certificate(folder / "certificate.json", folder / "model")


def test_a_fetched_version_with_folders_verifies(store, tmp_path, monkeypatch):
    monkeypatch.delenv("SALUN_VERIFY_KEY", raising=False)
    files = write_folder(tmp_path / "made")
    digest, manifest = stage_version(store, {"line": "faces", "method": "salun", "run": "run-7"}, files)
    fetch_version(store, "faces", digest, tmp_path / "model")
    (tmp_path / "certificate.json").write_bytes(certify(*erased_by(manifest), KEY))
    (tmp_path / "salun.pub").write_bytes(public_pem(KEY.public_key()))
    found = verify(tmp_path)
    assert found.files == len(files)
    assert [item.name for item in found.certificate.subject] == sorted(files)


SPOILT = {
    "changed": (lambda model: (model / UNET).write_bytes(b"x"), f"{UNET} was changed"),
    "missing": (lambda model: (model / "vae" / "config.json").unlink(), "vae/config.json is missing"),
    "extra": (lambda model: (model / "unet" / "x").write_bytes(b""), "'unet/x' is not in the certificate"),
    "hidden": (lambda model: (model / "unet" / ".x").write_bytes(b""), "'unet/.x' is not in the certificate"),
    "new folder": (
        lambda model: ((model / "new").mkdir(), (model / "new/x").write_bytes(b"")),
        "'new/x' is not in the cert",
    ),
    "moved": (lambda model: (model / "unet").rename(model / "other"), "unet/config.json is missing"),
    "link": (lambda model: (model / "unet" / "x").symlink_to("config.json"), "holds more than regular files.*'unet/x'"),
    "pipe": (lambda model: os.mkfifo(model / "unet" / "x"), "holds more than regular files.*'unet/x'"),
    "empty folder": (lambda model: (model / "unet" / "x").mkdir(), "holds more than regular files.*'unet/x/'"),
    "deep": (lambda model: (model / "unet/a/b/c").mkdir(parents=True), "holds more than regular files.*'unet/a/b/c'"),
    "linked folder": (
        lambda model: ((model / "vae").rename(model.with_name("v")), (model / "vae").symlink_to(model.with_name("v"))),
        "holds more than regular files.*'vae'",
    ),
}


@pytest.mark.parametrize(("spoil", "why"), SPOILT.values(), ids=SPOILT)
def test_each_difference_in_a_folder_is_refused(certified, spoil, why):
    assert verify(certified).files == 11
    spoil(certified / "model")
    with pytest.raises(IntegrityError, match=why):
        verify(certified)


def test_evidence_must_cover_the_whole_folder(tmp_path):
    write_folder(tmp_path)
    manifest = manifest_in(tmp_path)
    for other in (manifest.files[UNET].sha256, manifest.files["model_index.json"].sha256):
        with pytest.raises(IntegrityError, match="another model"):
            certify(*erased_by(manifest, other), KEY)
    both = manifest_in(tmp_path, **{"model.safetensors": {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(ModelError, match="two models"):
        certify(*erased_by(both, "0" * 64), KEY)
