"""CLIP scores of a tiny model of the real architecture, one pair at a time in numpy."""

import shlex
import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from salun_core.errors import DataError, ModelError, UsageError
from salun_core.evaluation.clip_score import ClipScorer

transformers = pytest.importorskip("transformers", reason="the extra `diffusion` is not installed")

PROMPTS = ["a cat", "a dog on a red mat", "a cat", "x" * 60, "ship"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokens = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in string.ascii_lowercase for end in ("", "</w>"))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**small, **text},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    side = {"height": 16, "width": 16}
    transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side),
        transformers.CLIPTokenizer(vocab=vocabulary, merges=[]),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def one_pair(folder, image, prompt):
    """100 * max(cos, 0) of one image and one prompt."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    ids = processor.tokenizer([prompt], return_tensors="pt", truncation=True, max_length=12)["input_ids"]
    with torch.no_grad():
        a = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double().numpy()
        b = model.text_projection(model.text_model(ids).pooler_output)[0].double().numpy()
    return 100 * max(0.0, float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))


def test_scores_are_cosines_of_pairs(folder, images):
    scorer = ClipScorer.load(folder)
    expected = [one_pair(folder, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    found = scorer.scores(images, PROMPTS)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert len(set(np.round(expected, 3))) > 1


def test_a_negative_cosine_counts_as_zero(folder, images):
    scorer = ClipScorer.load(folder)
    plain = scorer.scores(images, PROMPTS)
    with torch.no_grad():
        scorer.model.visual_projection.weight.neg_()
    turned = scorer.scores(images, PROMPTS)
    assert ((plain > 0) != (turned > 0)).all()
    assert torch.minimum(plain, turned).eq(0).all()


def test_the_digest_covers_the_folder(folder, tmp_path):
    scorer = ClipScorer.load(folder)
    assert len(scorer.digest) == 64
    assert ClipScorer.load(copied(folder, tmp_path / "same")).digest == scorer.digest
    other = copied(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, other / "model.safetensors", {"format": "pt"})
    assert ClipScorer.load(other).digest != scorer.digest


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_images_and_prompts_must_pair_up(folder, images):
    scorer = ClipScorer.load(folder)
    with pytest.raises(DataError, match="5 against 4"):
        scorer.scores(images, PROMPTS[:4])
    assert scorer.scores(images[:0], []).shape == (0,)
    with torch.no_grad():
        scorer.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not a number"):
        scorer.scores(images, PROMPTS)


def test_invalid_folders_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        ClipScorer.load(tmp_path)
    bare = copied(folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        ClipScorer.load(bare)
    damaged = copied(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="cannot be read"):
        ClipScorer.load(damaged)
    wordless = copied(folder, tmp_path / "wordless")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (wordless / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="cannot be read"):
        ClipScorer.load(wordless)


def test_weights_that_are_missing_are_not_drawn_at_random(folder, tmp_path):
    other = copied(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*text_projection"):
        ClipScorer.load(other)


def test_a_pickle_is_refused_with_a_command_that_works(folder, tmp_path, images):
    old = copied(folder, tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"pytorch_model\.bin is a pickle") as caught:
        ClipScorer.load(old)
    code = shlex.split(caught.value.remedy)[2]
    exec(code)
    assert torch.equal(ClipScorer.load(old).scores(images, PROMPTS), ClipScorer.load(folder).scores(images, PROMPTS))
