"""STEREO against explicit calls of the network and plain arithmetic."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from salun_core.diffusion.examples import noised
from salun_core.errors import ConflictError, UsageError
from salun_core.methods.checkpoint import StageCheckpoint, opened
from salun_core.methods.classification import FileCheckpoint
from salun_core.methods.diffusion import METHODS, DiffusionContext, diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.erased_stable_diffusion import partly_denoised, path
from salun_core.methods.diffusion.stereo import Attacks, erasing_loss, invert, robust_loss
from salun_core.models.checkpoint import model_digest
from tests.support.tiny_diffusion import LENGTH, NULL, WIDTH, batches, digits_sets, lab, text_table, text_unet

pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow

QUICK = {"steps": 2, "epochs": 2, "batch_size": 2, "start_steps": 2, "attack_rounds": 1, "attack_steps": 2}
RATE = {"learning_rate": 1e-3, "device": "cpu"}


def found_by(attacks, rows=1, seed=3):
    return torch.randn(attacks, rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def shifted(denoiser):
    """The same network after some training, as in the middle of a run."""
    other = denoiser.of(copy.deepcopy(denoiser.network))
    for weight in other.network.parameters():
        weight.data.mul_(1.05)
    return other


def context(denoiser, sets, original, **config):
    settings = diffusion_config("stereo", config)
    return DiffusionContext(denoiser, original, sets, settings, torch.Generator().manual_seed(0))


def ask(denoiser, batch, texts):
    """The prediction for texts [B, L, W], or one text for all."""
    with torch.no_grad():
        told = {"encoder_hidden_states": texts.expand(len(batch), LENGTH, WIDTH)}
        return denoiser.predict(batch.noisy, batch.times, told).numpy()


def test_the_last_erasing_aims_at_the_anchor_and_away_from_all_attacks():
    original, sets = lab("text")
    denoiser, found = shifted(original), found_by(2)
    forget, _ = batches(original, sets)
    attacks = Attacks(sets.table, torch.tensor([0]), found)
    given = replace(sets, table=attacks.extended())
    chosen = context(denoiser, given, original, start_steps=2, negative_guidance=1.5, anchor_guidance=0.7)
    ran = []
    hooks = [
        each.network.register_forward_hook(lambda _, args, output: ran.append(len(output[0])))
        for each in (original, denoiser)
    ]
    loss = robust_loss(attacks, chosen, forget, forget)
    for hook in hooks:
        hook.remove()
    chosen.generator.manual_seed(0)
    drawn = torch.randint(3, (6,), generator=chosen.generator)
    rows = torch.tensor([0, 4, 5])[drawn]  # the prompt, and the two embeddings behind the four rows of the table
    batch = partly_denoised(chosen, replace(forget, condition=rows))
    texts = sets.table.rows["encoder_hidden_states"]
    free, anchor = ask(original, batch, texts[NULL]), ask(original, batch, texts[1])
    concept = sum(ask(original, batch, text) - free for text in (texts[0], found[0, 0], found[1, 0])) / 3
    target = free + 0.7 * (anchor - free) - 1.5 * concept
    predicted = ask(denoiser, batch, torch.stack([texts[0], found[0, 0], found[1, 0]])[drawn])
    assert loss.item() == pytest.approx(float(((predicted - target) ** 2).mean()), rel=1e-4)
    assert len(set(drawn.tolist())) > 1
    moves = len(path(1000, int(batch.times[0]), 2)) - 1
    assert sum(ran) == 6 * (2 * moves + 5 + 1)  # the sampling; null, anchor and three conditions; the prediction


def test_an_erasing_of_the_first_stage_is_esd_of_the_last_embedding():
    original, sets = lab("text")
    denoiser, found = shifted(original), found_by(2)
    forget, _ = batches(original, sets)
    attacks = Attacks(sets.table, torch.tensor([0]), found)
    given = replace(sets, table=attacks.extended())
    chosen = context(denoiser, given, original, start_steps=2, negative_guidance=1.5)
    loss = erasing_loss(attacks, 2, chosen, forget, forget)
    chosen.generator.manual_seed(0)
    batch = partly_denoised(chosen, replace(forget, condition=torch.full((6,), 5)))
    free = ask(original, batch, sets.table.rows["encoder_hidden_states"][NULL])
    target = free - 1.5 * (ask(original, batch, found[1, 0]) - free)
    assert loss.item() == pytest.approx(float(((ask(denoiser, batch, found[1, 0]) - target) ** 2).mean()), rel=1e-4)


def test_found_conditions_follow_the_table_by_attack_and_prompt():
    table, found = text_table(pooled=True), found_by(2, rows=2)
    attacks = Attacks(table, torch.tensor([0, 2]), found)
    extended = attacks.extended()
    assert torch.equal(extended.rows["encoder_hidden_states"][4:], found.reshape(4, LENGTH, WIDTH))
    pooled = table.rows["pooled_projections"]
    assert torch.equal(extended.rows["pooled_projections"][4:], pooled[[0, 2, 0, 2]])
    assert (len(extended), extended.null) == (8, NULL)
    assert attacks.row(torch.tensor([0, 2, 2, 0]), torch.tensor([0, 0, 1, 2])).tolist() == [0, 2, 5, 6]


def test_an_attack_descends_the_denoising_loss_from_the_null_condition():
    """Adam's first step has the length of its rate along the sign of each gradient."""
    denoiser, sets = text_unet(), digits_sets(text_table(tokens=[[2, 3], [1], [3], []]))
    settings = diffusion_config("stereo", {"attack_steps": 1, "attack_rate": 0.05, "batch_size": 16})
    found = invert(denoiser, sets, settings, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    batch = noised(sets.forget.select(torch.randperm(16, generator=generator)), denoiser.process, generator)
    texts = sets.table.rows["encoder_hidden_states"]
    start = texts[0].clone()
    start[2:4] = texts[NULL, 2:4]
    asked = start.clone().requires_grad_(True)
    error = denoiser.predict(batch.noisy, batch.times, {"encoder_hidden_states": asked.expand(16, LENGTH, WIDTH)})
    (gradient,) = torch.autograd.grad(((error - batch.target) ** 2).mean(), asked)
    wanted = start.clone()
    wanted[2:4] -= 0.05 * gradient[2:4].sign()
    clear = gradient[2:4].abs() > 1e-5
    assert clear.float().mean() > 0.5
    assert torch.allclose(found[0, 2:4][clear], wanted[2:4][clear], atol=1e-3)
    assert torch.equal(found[0, [0, 1, 4]], texts[0, [0, 1, 4]])
    assert all(weight.requires_grad and weight.grad is None for weight in denoiser.network.parameters())


def test_each_forgotten_prompt_has_an_embedding_of_its_own():
    """Two prompts that are searched together move as each alone moves on its images."""
    denoiser, sets = lab("text")
    forget = replace(sets.forget, condition=torch.tensor([2] * 8 + [0] * 8))
    settings = diffusion_config("stereo", {"attack_steps": 1, "attack_rate": 0.05, "batch_size": 16})
    found = invert(denoiser, replace(sets, forget=forget), settings, torch.Generator().manual_seed(0))
    assert found.shape == (2, LENGTH, WIDTH)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=generator)
    batch = noised(forget.select(order), denoiser.process, generator)
    texts = sets.table.rows["encoder_hidden_states"]
    for place, row in enumerate((0, 2)):
        start = torch.cat([texts[row, :1], texts[NULL, 1:]]).requires_grad_(True)
        own = batch.condition == row
        told = {"encoder_hidden_states": start.expand(8, LENGTH, WIDTH)}
        error = denoiser.predict(batch.noisy[own], batch.times[own], told) - batch.target[own]
        (gradient,) = torch.autograd.grad((error**2).mean(), start)
        clear = gradient[1:].abs() > 1e-4
        moved = (found[place] - start.detach())[1:]
        assert clear.any()
        assert torch.equal(moved[clear].sign(), -gradient[1:][clear].sign())
        assert torch.equal(found[place, :1], texts[row, :1])


def test_an_attack_finds_what_denoises_the_concept_better():
    denoiser, sets = lab("text")
    settings = diffusion_config("stereo", {"attack_steps": 15, "attack_rate": 0.1, "batch_size": 16})
    found = invert(denoiser, sets, settings, torch.Generator().manual_seed(0))
    batch = noised(sets.forget, denoiser.process, torch.Generator().manual_seed(9))
    texts = sets.table.rows["encoder_hidden_states"]
    losses = [
        float(((ask(denoiser, batch, text) - batch.target.numpy()) ** 2).mean()) for text in (texts[NULL], found[0])
    ]
    assert losses[1] < losses[0]


def test_it_erases_once_from_the_original_after_all_attacks(tmp_path):
    denoiser, sets = lab("text")
    before, store = model_digest(denoiser.network), FileCheckpoint(tmp_path / "state")
    seen, kept = [], []

    def look(record):
        header, tensors = opened(store.load())
        kept.append((header["stage"], StageCheckpoint.start_of(tensors)))
        seen.append(record.epoch)

    result = unlearn_denoiser(denoiser, sets, "stereo", config=QUICK | RATE, checkpoint=store, on_epoch=look)
    assert seen == [record.epoch for record in result.history] == [1, 2, 3, 4]
    assert [stage for stage, _ in kept] == [0, 0, 1, 1]
    for _, start in kept:
        found = start.pop("found")
        assert all(torch.equal(start[name], weight) for name, weight in denoiser.network.state_dict().items())
    assert found.shape == (1, 1, LENGTH, WIDTH)
    after = dict(result.model.named_parameters())
    changed = {name for name, weight in denoiser.network.named_parameters() if not torch.equal(weight, after[name])}
    assert changed
    assert all(".attn2." in name for name in changed)
    assert model_digest(denoiser.network) == before


@pytest.mark.parametrize("killed", [2, 3])  # before the attack is kept; in the last erasing
def test_a_killed_run_ends_in_the_same_bits(killed, tmp_path, whole_run):
    denoiser, sets = lab("text")
    store = FileCheckpoint(tmp_path / "state")

    def stop(record):
        if record.epoch == killed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn_denoiser(denoiser, sets, "stereo", config=QUICK | RATE, checkpoint=store, on_epoch=stop)
    seen = []
    resumed = unlearn_denoiser(
        denoiser,
        sets,
        "stereo",
        config=QUICK | RATE,
        checkpoint=store,
        on_epoch=lambda record: seen.append(record.epoch),
    )
    assert seen == list(range(killed + 1, 5))
    assert [record.epoch for record in resumed.history] == [1, 2, 3, 4]
    assert model_digest(resumed.model) == whole_run
    with pytest.raises(ConflictError):
        unlearn_denoiser(denoiser, sets, "stereo", config=QUICK | RATE | {"seed": 1}, checkpoint=store)


@pytest.fixture(scope="module")
def whole_run():
    denoiser, sets = lab("text")
    return model_digest(unlearn_denoiser(denoiser, sets, "stereo", config=QUICK | RATE).model)


def test_erasings_and_attacks_count():
    """K = 2: three erasings and two attacks; a guided sampling of 1.5 steps and the targets only go forward."""
    config = diffusion_config("stereo", {**QUICK, "steps": 6, "attack_rounds": 2, "attack_steps": 5})
    erasing = 6 * 2 * np.array([1 + (3 + 2) / 3, 1 + (3 + 2) / 3, 1 + (3 + 2 + 3) / 3])
    assert METHODS["stereo"].cost(config) == round(erasing.sum() + 2 * 5 * 2)


def test_classes_are_refused():
    denoiser, sets = lab("class")
    with pytest.raises(UsageError, match="conditions have no tokens"):
        unlearn_denoiser(denoiser, sets, "stereo", config={**QUICK, "selection": "full", "device": "cpu"})
