"""Saliency scores of a denoiser against torch's own gradient of the whole loss, and the masks made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from salun_core.diffusion.examples import Examples, noised
from salun_core.errors import DataError, UsageError
from salun_core.methods.diffusion import diffusion_config
from salun_core.methods.diffusion.saliency import denoising_scores
from salun_core.saliency import SaliencyMask
from tests.support.tiny_diffusion import denoiser_mask, lab, selection_mask, shapes_of

pytest.importorskip("diffusers")


def config(**changes):
    return diffusion_config("salun", {"batch_size": 16, **changes})


@pytest.mark.parametrize("kind", ["text", "class", "flow"])
def test_scores_are_the_gradient_of_the_mean_over_the_forget_set(kind):
    denoiser, sets = lab(kind)
    scores = denoising_scores(denoiser, sets, config())
    generator = torch.Generator().manual_seed(0)
    times = torch.randint(1000, (16,), generator=generator)
    batch = noised(sets.forget, denoiser.process, generator, times)
    found = denoiser.predict(batch.noisy, batch.times, sets.table.take(batch.condition))
    ((found - batch.target) ** 2).mean().backward()
    for name, parameter in denoiser.network.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
        assert torch.allclose(scores[name], wanted, atol=1e-6), name


def test_a_short_last_batch_has_no_larger_weight():
    denoiser, sets = lab("class")
    times = config(saliency_passes=1)
    whole = denoising_scores(denoiser, replace(sets, forget=sets.forget.select(range(15))), times)
    twice = Examples(sets.forget.mean[:15], sets.forget.condition[:15])
    parts = denoising_scores(denoiser, replace(sets, forget=twice), config(batch_size=4))
    ratio = sum(float(score.sum()) for score in parts.values()) / sum(float(score.sum()) for score in whole.values())
    assert 0.5 < ratio < 2  # other noise, the same scale: a mean over samples, not a sum over batches


def test_scoring_does_not_change_the_network():
    denoiser, sets = lab("text")
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    denoising_scores(denoiser, sets, config(saliency_passes=2, saliency_times="stratified"))
    assert all(torch.equal(before[name], value) for name, value in denoiser.network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in denoiser.network.parameters())
    assert not denoiser.network.training


def test_scores_are_the_same_each_time_and_depend_on_the_seed():
    denoiser, sets = lab("class")
    first, again, other = (denoising_scores(denoiser, sets, config(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_stratified_times_fall_one_into_each_interval():
    from salun_core.methods.diffusion.saliency import _times

    times = _times(1000, 40, config(saliency_times="stratified"), torch.Generator().manual_seed(0))
    assert sorted((times // 25).tolist()) == list(range(40))
    assert times.tolist() != sorted(times.tolist())


def test_a_mask_covers_the_selected_part_and_freezes_the_rest():
    denoiser, sets = lab("text")
    chosen = config(selection="xattn")
    scores = denoising_scores(denoiser, sets, chosen)
    assert list(scores) == denoiser.selected("xattn")
    mask = denoiser_mask(denoiser, scores, 0.5)
    selected = sum(score.numel() for score in scores.values())
    assert mask.k == round(0.5 * selected)
    ranked = np.sort(np.concatenate([score.flatten().numpy() for score in scores.values()]))[::-1]
    for name in mask.shapes:
        if name not in scores:
            assert not mask.tensor(name).any()
        else:
            assert bool((scores[name][mask.tensor(name)] >= ranked[mask.k - 1]).all())


def test_controls_have_the_size_of_the_mask():
    denoiser, _ = lab("text")
    chosen = config(selection="xattn")
    shapes = shapes_of(denoiser)
    every = selection_mask(denoiser, chosen.selection)
    drawn = SaliencyMask.random({name: shapes[name] for name in denoiser.selected("xattn")}, 0.5, seed=1).within(shapes)
    assert drawn.k == round(0.5 * every.k)
    assert sum(int(drawn.tensor(name).sum()) for name in drawn.shapes) == drawn.k
    assert {name for name in every.shapes if every.tensor(name).any()} == set(denoiser.selected("xattn"))


def test_nothing_to_forget_and_an_empty_selection_are_refused():
    denoiser, sets = lab("class")
    with pytest.raises(DataError, match="forget set is empty"):
        denoising_scores(denoiser, replace(sets, forget=sets.forget.select([])), config())
    with pytest.raises(UsageError, match="selection xattn is empty"):
        denoising_scores(denoiser, sets, config(selection="xattn"))
