"""Diffusers folders of others: imported as they are, without their pickled twins, and refused where that is all."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import shutil

from salun_core.data import DataSpec
from salun_core.digest import sha256_file
from salun_core.errors import UsageError
from salun_core.models.diffusers_folder import load_diffusion, model_files
from salun_core.tasks.diffusion.importing import import_diffusion
from tests.support.tiny_diffusion import CLASSES, SIDE, edit_json, save_raw

pytestmark = pytest.mark.slow
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return save_raw("sd1", tmp_path_factory.mktemp("raw") / "sd")


@pytest.fixture
def folder(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "sd")


def test_files_are_copied_byte_for_byte_and_the_card_is_read_off_them(folder, tmp_path):
    made = import_diffusion(str(folder), None, tmp_path / "model", "a photo of {label}", classes=CLASSES)
    loaded = load_diffusion(tmp_path / "model")
    assert loaded.digest == made.digest
    assert {name: sha256_file(folder / name) for name in model_files(folder)} == {
        name: sha256_file(tmp_path / "model" / name) for name in model_files(tmp_path / "model")
    }
    card = loaded.card
    assert (card.channels, card.height, card.width, card.classes) == (3, SIDE, SIDE, CLASSES)
    assert (card.prompt_of("one"), card.data, loaded.split.train) == ("a photo of one", None, {})


def test_data_bring_classes_and_split(folder, tmp_path):
    import_diffusion(str(folder), DataSpec(source="digits", size=SIDE, channels=3), tmp_path / "model")
    loaded = load_diffusion(tmp_path / "model")
    assert len(loaded.card.classes) == 10
    assert len(loaded.split.train) > 1000


def test_pickled_twins_and_variants_are_left_out(folder, tmp_path):
    for suffix in (".bin", ".fp16.safetensors"):
        (folder / f"{UNET}{suffix}").write_bytes(b"x")
    (folder / "v1-5.ckpt").write_bytes(b"x")
    import_diffusion(str(folder), None, tmp_path / "model", classes=CLASSES)
    assert f"{UNET}.bin" not in model_files(tmp_path / "model")
    assert f"{UNET}.fp16.safetensors" not in model_files(tmp_path / "model")


def test_pickle_without_a_twin_is_refused_with_the_conversion(folder, tmp_path):
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.bin")
    with pytest.raises(UsageError, match=r"is refused.*safe_serialization=True"):
        import_diffusion(str(folder), None, tmp_path / "model", classes=CLASSES)
    assert not (tmp_path / "model").exists()


def test_single_file_is_refused_with_the_conversion(tmp_path):
    with pytest.raises(UsageError, match=r"v1.ckpt is refused.*from_single_file"):
        import_diffusion(str(tmp_path / "v1.ckpt"), None, tmp_path / "model")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (folder / "unet/secret.json").symlink_to("/etc/hostname")
    with pytest.raises(UsageError, match="link out of its folder"):
        import_diffusion(str(folder), None, tmp_path / "model", classes=CLASSES)


def test_the_hubs_cache_is_read_through_its_links(folder, tmp_path, monkeypatch):
    """As the hub's client lays it out: snapshots are links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub/models--someone--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    for number, name in enumerate(model_files(folder)):
        blob = home / "blobs" / str(number)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (home / "refs").mkdir()
    (home / "refs/main").write_text("0" * 40)
    import_diffusion("someone/tiny", None, tmp_path / "model", classes=CLASSES)
    assert model_files(tmp_path / "model") == model_files(folder)


def test_name_that_is_nowhere_is_said_without_asking_the_network(tmp_path):
    with pytest.raises(UsageError, match="neither a folder nor in the hub's local cache"):
        import_diffusion("someone/nothing", None, tmp_path / "model")


def test_prompt_without_a_place_for_the_class_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="must hold {label}"):
        import_diffusion(str(folder), None, tmp_path / "model", "a photo", classes=CLASSES)


def test_folder_without_an_index_is_refused(folder, tmp_path):
    (folder / "model_index.json").unlink()
    with pytest.raises(UsageError, match="is not a diffusers folder"):
        import_diffusion(str(folder), None, tmp_path / "model")


def test_missing_component_is_named(folder, tmp_path):
    edit_json(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.raises(UsageError, match="names safety_checker"):
        import_diffusion(str(folder), None, tmp_path / "model")
