"""Diffusers folders: written back bit for bit but for the denoiser, and refused for anything that is wrong there."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import shutil

import torch
from safetensors.torch import load_file, save_file

from salun_core.data.split import SPLIT, read_split
from salun_core.digest import digest_json, sha256_file
from salun_core.errors import IntegrityError, ModelError, UsageError
from salun_core.models.diffusers_folder import folder_digest, load_diffusion, model_files, save_diffusion
from tests.support.tiny_diffusion import edit_json, save_model_folder

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    base = tmp_path_factory.mktemp("original")
    return save_model_folder("sd1", base / "model", base)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def test_the_digest_covers_the_files_of_the_model_only(folder):
    digest = folder_digest(folder)
    assert digest == digest_json({name: sha256_file(folder / name) for name in model_files(folder)})
    (folder / "run.json").write_text("{}")
    assert folder_digest(folder) == digest
    edit_json(folder / "scheduler/scheduler_config.json", beta_end=0.02)
    assert folder_digest(folder) != digest


def test_a_new_denoiser_changes_its_own_file_only(folder, tmp_path):
    loaded = load_diffusion(folder)
    with torch.no_grad():
        loaded.network.conv_in.weight.add_(1)
    digest = save_diffusion(tmp_path / "new", loaded, loaded.network, loaded.card, loaded.split, {"run.json": b"{}"})
    changed = [
        name for name in model_files(folder) if sha256_file(folder / name) != sha256_file(tmp_path / "new" / name)
    ]
    assert changed == [UNET]
    again = load_diffusion(tmp_path / "new")
    assert again.digest == digest == folder_digest(tmp_path / "new")
    weights = again.network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.network.state_dict().items())


def test_unchanged_denoiser_gives_the_same_bytes(folder, tmp_path):
    loaded = load_diffusion(folder)
    assert save_diffusion(tmp_path / "new", loaded, loaded.network, loaded.card, loaded.split) == loaded.digest


def test_half_precision_is_kept(folder, tmp_path):
    half = {name: tensor.half() for name, tensor in load_file(folder / UNET).items()}
    save_file(half, folder / UNET, metadata={"format": "pt"})
    loaded = load_diffusion(folder)
    assert loaded.network.dtype == torch.float16
    digest = save_diffusion(tmp_path / "new", loaded, loaded.network.float(), loaded.card, loaded.split)
    assert digest == loaded.digest


def test_denoiser_of_another_architecture_is_refused(folder, tmp_path):
    loaded = load_diffusion(folder)
    with pytest.raises(ModelError, match="does not fit the folder"):
        save_diffusion(tmp_path / "new", loaded, torch.nn.Linear(2, 2), loaded.card, loaded.split)
    assert not (tmp_path / "new").exists()


def test_nothing_is_downloaded(folder, monkeypatch):
    """Any look at the network would fail here."""
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_diffusion(folder)


def _spoil(folder, name, value):
    weights = load_file(folder / name)
    first = sorted(weights)[0]
    weights[first].view(-1)[0] = value
    save_file(weights, folder / name, metadata={"format": "pt"})


def _without_tensor(folder):
    weights = load_file(folder / UNET)
    weights.pop("conv_in.bias")
    save_file(weights, folder / UNET, metadata={"format": "pt"})


def _with_another_split(folder):
    split = read_split(folder)
    split.model_copy(update={"dataset_digest": "0" * 64}).write(folder / SPLIT)


FAULTS = {
    "no index": (lambda f: (f / "model_index.json").unlink(), UsageError, "not a diffusers folder"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), UsageError, "names vae, and there is no such folder"),
    "two missing": (
        lambda f: [shutil.rmtree(f / name) for name in ("vae", "tokenizer")],
        UsageError,
        "names tokenizer, vae",
    ),
    "safety checker missing": (
        lambda f: edit_json(
            f / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]
        ),
        UsageError,
        "names safety_checker",
    ),
    "bin": (
        lambda f: (f / "unet/diffusion_pytorch_model.bin").write_bytes(b"x"),
        UsageError,
        "diffusion_pytorch_model.bin is refused.*safe_serialization=True",
    ),
    "ckpt": (lambda f: (f / "v1.ckpt").write_bytes(b"x"), UsageError, "v1.ckpt is refused.*from_single_file"),
    "code": (lambda f: (f / "unet/model.py").write_text("1"), UsageError, "is code"),
    "link": (lambda f: (f / "unet/more.json").symlink_to("/etc/hostname"), UsageError, "is not a plain file"),
    "foreign class": (
        lambda f: edit_json(f / "model_index.json", unet=["os", "system"]),
        ModelError,
        "class os.system is not on the allow-list",
    ),
    "class of another library": (
        lambda f: edit_json(f / "model_index.json", unet=["evil", "UNet2DConditionModel"]),
        ModelError,
        "evil.UNet2DConditionModel is not on the allow-list",
    ),
    "custom pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name=["pipeline", "Mine"]),
        ModelError,
        "names a custom pipeline",
    ),
    "code of its own": (
        lambda f: edit_json(f / "text_encoder/config.json", auto_map={"AutoModel": "m.M"}),
        ModelError,
        "requests code of its own",
    ),
    "no weights": (lambda f: (f / UNET).unlink(), UsageError, "unet is not complete.*weights"),
    "no configuration": (lambda f: (f / "unet/config.json").unlink(), UsageError, "unet is not complete.*config.json"),
    "nan": (lambda f: _spoil(f, UNET, float("nan")), ModelError, "weights of unet are not finite"),
    "nan vae": (
        lambda f: _spoil(f, "vae/diffusion_pytorch_model.safetensors", float("inf")),
        ModelError,
        "weights of vae are not finite",
    ),
    "a tensor is missing": (_without_tensor, ModelError, "missing conv_in.bias"),
    "cut short": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:500]), IntegrityError, "are damaged"),
    "another split": (_with_another_split, IntegrityError, "split"),
    "another denoiser than the card's": (
        lambda f: edit_json(f / "model.json", architecture="UNet2DModel"),
        ModelError,
        "the card does not fit",
    ),
    "a classifier's card": (
        lambda f: edit_json(f / "model.json", task="classification"),
        UsageError,
        "is not a valid DiffusionCard",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_own_error(folder, name):
    spoil, kind, message = FAULTS[name]
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        load_diffusion(folder)
    assert "\n" not in str(caught.value)


def test_unused_components_need_no_folder(folder):
    edit_json(folder / "model_index.json", safety_checker=[None, None], feature_extractor=None)
    assert "safety_checker" not in load_diffusion(folder).components.parts


def test_tokenizer_is_read_from_its_two_published_files(folder):
    """Full-size folders bring vocab.json and merges.txt, and no tokenizer.json."""
    tokenizer = load_diffusion(folder).components.parts["tokenizer"]
    wanted = tokenizer("an image of a two").input_ids
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    (folder / "tokenizer/tokenizer.json").unlink()
    assert load_diffusion(folder).components.parts["tokenizer"]("an image of a two").input_ids == wanted
