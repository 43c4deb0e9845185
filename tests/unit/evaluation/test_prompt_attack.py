"""The search for words that bring a concept back, on a model whose best word is known."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.diffusion.examples import Examples
from salun_core.errors import UsageError
from salun_core.evaluation.prompt_attack import nearest, search
from tests.support.tiny_diffusion_models import tiny_stable_diffusion

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")


class Line:
    """Words are points on a line; a prompt is told as the sum of its extra tokens, whatever its own words."""

    words = torch.tensor([[float("nan")], [-2.0], [-1.0], [0.5], [3.0]])

    def encode(self, prompt, extra):
        return {"encoder_hidden_states": extra.sum(dim=0).view(1, 1, 1)}

    def spell(self, tokens):
        return " ".join(f"w{token}" for token in tokens.tolist())


class Scaled(nn.Module):
    """Predicts noise as though each image were what it is told: right only where that is so."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))


class Told:
    """A denoiser that is right about images whose every pixel is what the condition says."""

    def __init__(self, process):
        self.network, self.process = Scaled(), process

    def predict(self, noisy, times, told):
        clean = told["encoder_hidden_states"].view(-1, 1, 1, 1).expand_as(noisy)
        signal, noise = (factor[times].view(-1, 1, 1, 1) for factor in (self.process.signal, self.process.noise))
        return (noisy - signal * clean) / noise + 0 * self.network.bias


@pytest.fixture
def process():
    from diffusers import DDPMScheduler

    from salun_core.diffusion.process import Process

    return Process.of_scheduler(DDPMScheduler())


@pytest.mark.parametrize(("shown", "word"), [(3.0, "w4"), (-2.0, "w1"), (0.5, "w3")])
def test_the_best_single_word_is_found(process, shown, word):
    denoiser = Told(process)
    pictures = Examples(torch.full((8, 1, 2, 2), shown), torch.zeros(8, dtype=torch.int64))
    found = search(denoiser, Line(), "anything", pictures, steps=30, tokens=1, seed=1)
    assert found.words == word
    assert found.conditions["encoder_hidden_states"].item() == shown
    assert min(found.loss) < 1e-6
    assert found.loss[found.tried.index(word)] == min(found.loss)
    assert denoiser.network.bias.requires_grad


class Scaling(Told):
    """A denoiser that predicts the noisy image times what the condition says."""

    def predict(self, noisy, times, told):
        return noisy * told["encoder_hidden_states"].view(-1, 1, 1, 1) + 0 * self.network.bias


class Ruler(Line):
    """The line with so many words that a search passes many of them."""

    words = torch.cat([torch.tensor([[float("nan")]]), torch.linspace(-3, 3, 61)[:, None]])


def test_candidates_are_compared_on_the_same_images_noise_and_times(process):
    """On one batch the loss is a parabola of the told number; with a batch for each candidate it would scatter."""
    images = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    pictures = Examples(images, torch.zeros(16, dtype=torch.int64))
    found = search(Scaling(process), Ruler(), "anything", pictures, steps=30, tokens=3, batch_size=2, seed=3)
    told = [sum(float(Ruler.words[int(word[1:])]) for word in words.split()) for words in found.tried]
    assert len({*told}) > 3
    assert np.polyval(np.polyfit(told, found.loss, 2), told) == pytest.approx(found.loss, rel=1e-4, abs=1e-4)
    assert found.words == found.tried[int(np.argmin(found.loss))]


def test_special_tokens_are_never_chosen():
    words = torch.tensor([[float("nan"), float("nan")], [1.0, 0.0], [0.0, 4.0]])
    known = torch.tensor([False, True, True])
    assert nearest(torch.tensor([[0.0, 0.0], [0.1, 3.0]]), words, known).tolist() == [1, 2]


def test_a_clip_encoder_reads_embeddings_as_it_reads_their_words(tmp_path, digits_model):
    from salun_core.evaluation.prompt_attack import ClipWords
    from salun_core.models.diffusers_folder import load_diffusion

    components = load_diffusion(tiny_stable_diffusion(tmp_path / "sd", digits_model)).components
    encoder = ClipWords.of(components)
    tokens = torch.tensor(components.parts["tokenizer"]("image of", add_special_tokens=False).input_ids)
    with torch.no_grad():
        found = encoder.encode("a 3", encoder.words[tokens])["encoder_hidden_states"]
        ids = components.parts["tokenizer"]("image of a 3", padding="max_length", return_tensors="pt").input_ids
        assert torch.allclose(found, components.parts["text_encoder"](ids)[0], atol=1e-5)
    assert encoder.spell(tokens) == "image of"
    assert not torch.isfinite(encoder.words[components.parts["tokenizer"].eos_token_id]).any()
    with pytest.raises(UsageError, match="too long"):
        encoder.encode("an image of a 3", torch.zeros(15, encoder.words.shape[1]))
