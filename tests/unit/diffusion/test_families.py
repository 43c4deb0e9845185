"""Every family from its folder through conditions, latents, prediction and sampling."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

from dataclasses import replace

import torch

from salun_core.data.images import ImageSet
from salun_core.diffusion.examples import noised
from salun_core.diffusion.families import family_of
from salun_core.diffusion.sampling import images
from salun_core.errors import ModelError, UsageError
from salun_core.models.card import DiffusionEvaluation
from salun_core.models.diffusers_folder import load_diffusion
from tests.support.tiny_diffusion import CLASS_TOLD, CLASSES, FAMILIES, SIDE, save_model_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("families")
    return {name: save_model_folder(name, base / name, base) for name in FAMILIES}


def _images(channels):
    generator = torch.Generator().manual_seed(0)
    shape = (3, channels, SIDE, SIDE)
    return ImageSet(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_encodes_trains_and_generates(folders, name):
    loaded = load_diffusion(folders[name])
    family = family_of(loaded)
    assert loaded.card.task == ("class-conditional" if name in CLASS_TOLD else "text-to-image")
    table = family.conditions([loaded.card.prompt_of(label) for label in CLASSES])
    assert (len(table), table.null, table.names[-1]) == (4, 3, "")
    examples = family.examples(_images(loaded.card.channels), torch.arange(3))
    assert tuple(examples.mean.shape[1:]) == family.shape
    assert (examples.std is None) == family.pixels == (name == "ddpm")
    batch = noised(examples, family.denoiser.process, torch.Generator().manual_seed(1))
    assert family.denoiser.predict(batch.noisy, batch.times, table.take(batch.condition)).shape == batch.target.shape
    sampler = family.sampler(DiffusionEvaluation(steps=2))
    clips = sampler.scheduler.config.get("clip_sample", False)  # flows have no such setting
    assert clips == (name == "ddpm")
    drawn = torch.cat(list(images(family.denoiser, table, sampler, [0, 2], [5, 6], family.decode)))
    assert (drawn.shape, drawn.dtype) == ((2, 3, SIDE, SIDE), torch.uint8)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_conditions_equal_those_of_the_pipeline(folders, name):
    """The pipeline that the folder was saved from, asked prompt by prompt."""
    import diffusers

    table = family_of(load_diffusion(folders[name])).conditions(["an image of a two", "an image of a one"])
    absent = {"sd1": ["safety_checker"], "sd3": ["text_encoder_3", "tokenizer_3"]}
    optional = dict.fromkeys(absent.get(name, []))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[name], local_files_only=True, **optional)
    wanted = {"num_images_per_prompt": 1, "device": "cpu", "do_classifier_free_guidance": True}
    prompts = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
    with torch.no_grad():
        every = pipeline.encode_prompt("an image of a one", **prompts, **wanted)
    torch.testing.assert_close(table.rows["encoder_hidden_states"][1:2], every[0])
    torch.testing.assert_close(table.rows["encoder_hidden_states"][2:3], every[1])
    if name != "sd1":
        pooled = table.rows["text_embeds" if name == "sdxl" else "pooled_projections"]
        torch.testing.assert_close(pooled[1:2], every[2])
        torch.testing.assert_close(pooled[2:3], every[3])


def test_rows_of_classes_have_their_ids(folders):
    family = family_of(load_diffusion(folders["ddpm"]))
    table = family.conditions(["two", "zero", "two"])
    assert table.rows["class_labels"].tolist() == [2, 0, 3]
    with pytest.raises(UsageError, match="did you mean 'two'"):
        family.conditions(["tow"])


def test_card_with_other_classes_is_refused(folders):
    loaded = load_diffusion(folders["ddpm"])
    wrong = replace(loaded, card=loaded.card.model_copy(update={"classes": ["zero"]}))
    with pytest.raises(ModelError, match="1 classes against 4 embeddings"):
        family_of(wrong).conditions(["zero"])


def test_card_of_another_size_is_refused(folders):
    loaded = load_diffusion(folders["sd1"])
    with pytest.raises(ModelError, match="does not fit the autoencoder"):
        family_of(replace(loaded, card=loaded.card.model_copy(update={"height": 7})))


def test_half_precision_is_computed_in_float32(folders):
    loaded = load_diffusion(folders["sd1"])
    loaded.network.half()
    assert family_of(loaded).denoiser.network.dtype == torch.float32
