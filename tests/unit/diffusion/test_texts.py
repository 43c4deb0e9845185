"""Prompts: each encoded once, checked, and cached on disk."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import torch

from salun_core.diffusion.conditions import encode_prompts, truncated_prompts
from salun_core.diffusion.families import family_of
from salun_core.diffusion.latents import cached
from salun_core.errors import UsageError
from salun_core.models.diffusers_folder import load_diffusion
from tests.support.tiny_diffusion import PROMPTS, SIDE, TEXT_LENGTH, save_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("texts")
    return save_model_folder("sd1", base / "model", base)


@pytest.fixture
def loaded(folder):
    return load_diffusion(folder)


def _counted(loaded):
    calls = []
    loaded.components.parts["text_encoder"].register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return calls


def test_repeated_prompts_are_encoded_once(loaded):
    calls = _counted(loaded)
    table = encode_prompts(loaded.components, PROMPTS * 20, SIDE, SIDE)
    assert list(table.names) == [*PROMPTS, ""]
    assert calls == [3, 1]


@pytest.mark.parametrize("prompts", [[], [""], ["a bag", "  "]])
def test_empty_prompts_are_refused(loaded, prompts):
    with pytest.raises(UsageError, match="a prompt is empty"):
        encode_prompts(loaded.components, prompts, SIDE, SIDE)


def test_truncated_prompts_are_logged(loaded, capsys):
    long = " ".join(["image"] * TEXT_LENGTH)
    assert truncated_prompts(loaded.components, [*PROMPTS, long]) == [long]
    encode_prompts(loaded.components, [long], SIDE, SIDE)
    assert "cut off" in capsys.readouterr().err


def test_embeddings_are_cached_and_verified(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_CACHE_DIR", str(tmp_path))
    family, calls = family_of(loaded), _counted(loaded)
    first = family.conditions(PROMPTS)
    second = family.conditions(PROMPTS)
    assert calls == [3, 1]
    assert torch.equal(first.rows["encoder_hidden_states"], second.rows["encoder_hidden_states"])
    (kept,) = tmp_path.rglob("*.safetensors")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    third = family.conditions(PROMPTS)
    assert calls == [3, 1, 3, 1]
    assert torch.equal(first.rows["encoder_hidden_states"], third.rows["encoder_hidden_states"])


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALUN_CACHE_DIR", str(tmp_path / "file"))
    assert cached("latents", "0" * 64, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
