"""Examples, their noise, and the order they come in."""

from itertools import islice

import pytest
import torch

from salun_core.diffusion.examples import Examples, endless, noised
from salun_core.errors import DataError, ModelError
from tests.support.tiny_diffusion import text_unet

SHAPE = (2, 4, 4)


def examples(count=5, std=None, pseudo=None, ids=()):
    return Examples(torch.randn(count, *SHAPE), torch.arange(count), std, pseudo, ids)


def test_a_batch_is_the_scaled_sum_of_latent_and_noise():
    process, found = text_unet().process, examples(std=torch.full((5, *SHAPE), 0.5))
    batch = noised(found, process, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    clean = found.mean + 0.5 * torch.randn(5, *SHAPE, generator=generator)
    noise = torch.randn(5, *SHAPE, generator=generator)
    times = torch.randint(1000, (5,), generator=generator)
    assert torch.equal(batch.times, times)
    assert torch.equal(batch.target, noise)
    signal, sigma = (part[times].view(-1, 1, 1, 1) for part in (process.signal, process.noise))
    assert torch.allclose(batch.noisy, signal * clean + sigma * noise)


def test_given_times_are_used_and_exact_latents_are_not_sampled():
    found, process = examples(), text_unet().process
    times = torch.tensor([0, 10, 20, 30, 40])
    batch = noised(found, process, torch.Generator().manual_seed(3), times)
    assert torch.equal(batch.times, times)
    assert torch.equal(batch.target, torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3)))


def test_each_example_occurs_once_before_any_repeats():
    order = torch.cat(list(islice(endless(5, 3, torch.Generator().manual_seed(0)), 10)))
    passes = order.view(6, 5)
    assert all(sorted(part.tolist()) == list(range(5)) for part in passes)
    assert len({tuple(part.tolist()) for part in passes}) > 1
    large = next(endless(2, 7, torch.Generator().manual_seed(0)))
    assert torch.bincount(large).tolist() in ([4, 3], [3, 4])


def test_selecting_and_joining_keep_what_belongs_together():
    first = examples(3, torch.ones(3, *SHAPE), torch.tensor([1, 2, 0]), ["a", "b", "c"])
    second = examples(2, None, torch.tensor([1, 0]), ["d", "e"])
    both = first.joined(second)
    assert (len(both), list(both.ids)) == (5, ["a", "b", "c", "d", "e"])
    assert both.std[3:].abs().sum() == 0
    assert both.pseudo.tolist() == [1, 2, 0, 1, 0]
    some = both.select([4, 1])
    assert list(some.ids) == ["e", "b"]
    assert torch.equal(some.mean, torch.stack([second.mean[1], first.mean[1]]))
    assert first.joined(examples(2)).pseudo is None


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="differ in number"):
        Examples(torch.zeros(2, *SHAPE), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ModelError, match="latents are not finite"):
        Examples(torch.full((1, *SHAPE), float("nan")), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(DataError, match="cannot be joined"):
        examples().joined(Examples(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)))
