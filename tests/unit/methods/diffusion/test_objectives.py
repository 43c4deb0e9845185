"""The losses against explicit calls of the network."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.examples import Examples
from salun_core.errors import UsageError
from salun_core.methods.diffusion import DiffusionContext, ExampleSets, diffusion_config
from salun_core.methods.diffusion.objectives import (
    denoising_loss,
    denoising_loss_with_drop,
    guided,
    relabel_loss,
    retain_weight,
)
from tests.support.tiny_diffusion import NULL, batches, lab

pytest.importorskip("diffusers")


def context(denoiser, sets, method="salun", **config):
    return DiffusionContext(denoiser, None, sets, diffusion_config(method, config), torch.Generator().manual_seed(0))


def value(loss):
    return float(loss.detach())


def ask(denoiser, batch, table, condition):
    with torch.no_grad():
        return denoiser.predict(batch.noisy, batch.times, table.take(condition)).double().numpy()


@pytest.mark.parametrize("kind", ["text", "class", "flow"])
def test_denoising_is_the_mean_squared_error_over_every_element(kind):
    denoiser, sets = lab(kind)
    batch, _ = batches(denoiser, sets)
    by_hand = np.mean((ask(denoiser, batch, sets.table, batch.condition) - batch.target.double().numpy()) ** 2)
    assert value(denoising_loss(denoiser, batch, sets.table)) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("kind", ["text", "class", "flow"])
def test_the_target_of_random_labelling_is_the_prediction_under_the_other_condition(kind):
    denoiser, sets = lab(kind)
    forget, retain = batches(denoiser, sets)
    wanted = ask(denoiser, forget, sets.table, torch.ones(6, dtype=torch.int64))
    found = ask(denoiser, forget, sets.table, torch.zeros(6, dtype=torch.int64))
    kept = np.mean((ask(denoiser, retain, sets.table, retain.condition) - retain.target.double().numpy()) ** 2)
    by_hand = np.mean((wanted - found) ** 2) + 2.5 * kept
    assert value(relabel_loss(context(denoiser, sets, alpha=2.5), forget, retain)) == pytest.approx(by_hand, rel=1e-4)


def test_no_gradient_flows_into_the_target():
    denoiser, sets = lab("text")
    forget, retain = batches(denoiser, sets)
    relabel_loss(context(denoiser, sets, alpha=2.5), forget, retain).backward()
    twin = denoiser.of(copy.deepcopy(denoiser.network))
    twin.network.zero_grad()
    wanted = torch.from_numpy(ask(twin, forget, sets.table, forget.pseudo)).float()
    towards = denoising_loss(twin, replace(forget, target=wanted), sets.table)
    (towards + 2.5 * denoising_loss(twin, retain, sets.table)).backward()
    for mine, other in zip(denoiser.network.parameters(), twin.network.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-6)


def test_alpha_of_the_reference_is_scaled_by_the_pixels():
    images = Examples(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    sets = ExampleSets(images, images, ConditionTable(["a"], {"class_labels": torch.arange(1)}), pixels=True)
    denoiser, _ = lab("class")
    reference = {"alpha": 1e-3, "alpha_convention": "reference"}
    assert retain_weight(context(denoiser, sets, **reference)) == pytest.approx(3.072)
    assert retain_weight(context(denoiser, sets, alpha=1e-3)) == pytest.approx(1e-3)
    assert retain_weight(context(denoiser, replace(sets, pixels=False), **reference)) == pytest.approx(1e-3)


def test_mixed_reductions_of_the_reference_equal_alpha_times_the_pixels():
    denoiser, sets = lab("class")
    forget, retain = batches(denoiser, sets)
    error = ask(denoiser, retain, sets.table, retain.condition) - retain.target.double().numpy()
    summed = np.mean(np.sum(error**2, axis=(1, 2, 3)))  # as the published code has it: a sum over pixels
    wanted, found = (ask(denoiser, forget, sets.table, rows) for rows in (forget.pseudo, forget.condition))
    by_hand = np.mean((wanted - found) ** 2) + 1e-3 * summed
    chosen = context(denoiser, sets, alpha=1e-3, alpha_convention="reference")
    assert value(relabel_loss(chosen, forget, retain)) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("method", ["salun", "random_label"])
def test_alpha_zero_is_refused_unless_forced(method):
    with pytest.raises(UsageError, match="alpha 0 is refused.*every class is destroyed"):
        diffusion_config(method, {"alpha": 0})
    assert diffusion_config(method, {"alpha": 0, "allow_zero_alpha": True}).alpha == 0
    assert diffusion_config("gradient_ascent", {"alpha": 0}).alpha == 0  # it has no retain loss to begin with


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -1.0])
def test_guidance_extrapolates_from_the_null_condition(scale):
    denoiser, sets = lab("text")
    batch, _ = batches(denoiser, sets)
    free = ask(denoiser, batch, sets.table, torch.full((6,), NULL))
    conditional = ask(denoiser, batch, sets.table, batch.condition)
    with torch.no_grad():
        found = guided(denoiser, batch, sets.table, scale).numpy()
    np.testing.assert_allclose(found, free + scale * (conditional - free), atol=1e-5)


def test_guidance_without_a_null_condition_is_refused():
    denoiser, sets = lab("class")
    batch, _ = batches(denoiser, sets)
    with pytest.raises(UsageError, match="null condition"):
        guided(denoiser, batch, replace(sets.table, null=None), 3.0)


def test_a_tenth_of_the_conditions_is_dropped():
    denoiser, sets = lab("class")
    batch, _ = batches(denoiser, sets)

    def loss(share, seed=0, table=sets.table):
        return value(denoising_loss_with_drop(denoiser, batch, table, torch.Generator().manual_seed(seed), share))

    plain = value(denoising_loss(denoiser, batch, sets.table))
    dropped = value(denoising_loss(denoiser, replace(batch, condition=torch.full((6,), NULL)), sets.table))
    assert (loss(0.0), loss(1.0)) == (plain, dropped)
    assert loss(1.0, table=replace(sets.table, null=None)) == plain
    chosen = torch.rand(6, generator=torch.Generator().manual_seed(4)) < 0.5
    mixed = replace(batch, condition=torch.where(chosen, NULL, batch.condition))
    assert 0 < int(chosen.sum()) < 6
    assert loss(0.5, seed=4) == value(denoising_loss(denoiser, mixed, sets.table))
