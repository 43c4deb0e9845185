import hashlib
import json

import pytest

from salun_core.digest import sha256_file
from salun_core.errors import ModelError
from salun_core.registry.manifest import weight_files, weights_digest
from tests.support.folder_model import UNET, VAE, WEIGHTS, write_folder

A, B, C = "a" * 64, "b" * 64, "c" * 64
FOLDER = {"model_index.json": A, UNET: B, "unet/config.json": C}


def test_a_single_weight_file_gives_the_model_digest():
    assert weights_digest({"model.safetensors": A, "model.json": B, "split.parquet": C, "mask.safetensors": C}) == A


def test_a_folder_digest_covers_every_file_that_affects_images(tmp_path):
    files = {name: sha256_file(path) for name, path in write_folder(tmp_path).items()}
    expected = {name: digest for name, digest in files.items() if name not in {"model.json", "split.parquet"}}
    text = json.dumps(expected, sort_keys=True, separators=(",", ":"))
    assert weights_digest(files) == hashlib.sha256(text.encode()).hexdigest()
    assert weights_digest(dict(reversed(files.items()))) == weights_digest(files)
    for name in files:
        beside = name in {"model.json", "split.parquet"}
        assert (weights_digest({**files, name: A}) == weights_digest(files)) is beside, name


def test_the_digest_of_a_folder_never_changes():
    assert weights_digest(FOLDER) == "098241ad457479a4e751d4217d819c03467213fc9355c1c4e2ef59836667cc82"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "not a model"),
        ({"model.json": A, "mask.safetensors": B}, "not a model"),
        ({"model_index.json": A, "unet/config.json": B}, "not a model"),
        ({UNET: A, "unet/config.json": B}, "not a model"),
        ({**FOLDER, "model.safetensors": A}, "two models"),
        ({"model.safetensors": A, "model_index.json": B}, "two models"),
        ({"model.safetensors": A, UNET: B}, "two models"),
    ],
)
def test_no_model_or_two_models_have_no_digest(files, why):
    with pytest.raises(ModelError, match=why):
        weights_digest(files)


def test_weight_files(tmp_path):
    assert weight_files(write_folder(tmp_path)) == sorted(WEIGHTS)
    assert weight_files(["model.safetensors", "mask.safetensors", "model.json"]) == ["model.safetensors"]
    assert weight_files(["vae/config.json", VAE]) == [VAE]
