"""Each method against explicit calls of the network and a few lines of numpy."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from salun_core.diffusion.examples import noised
from salun_core.errors import ConflictError, DataError, UsageError
from salun_core.methods.classification import FileCheckpoint
from salun_core.methods.diffusion import METHODS, DiffusionContext, diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.erased_stable_diffusion import ddim_step, partly_denoised, path
from salun_core.methods.diffusion.forget_me_not import attention_energy, attention_maps
from salun_core.methods.diffusion.saliency import denoising_scores
from salun_core.methods.diffusion.unified_concept_editing import correction, matched_tokens, projections
from salun_core.models.checkpoint import model_digest
from tests.support.tiny_diffusion import (
    LENGTH,
    NULL,
    WIDTH,
    batches,
    class_unet,
    denoiser_mask,
    digits_sets,
    flow_transformer,
    lab,
    pixart,
    selection_mask,
    text_table,
    text_unet,
)

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow

QUICK = {"steps": 2, "epochs": 2, "batch_size": 4, "device": "cpu"}
TRAINED = ("salun", "random_label", "finetune", "gradient_ascent", "retrain", "esd", "forget_me_not")


def context(denoiser, sets, method, original=None, **config):
    return DiffusionContext(
        denoiser, original, sets, diffusion_config(method, config), torch.Generator().manual_seed(0)
    )


def mask_of(denoiser, sets, density=0.5, **config):
    return denoiser_mask(denoiser, denoising_scores(denoiser, sets, diffusion_config("salun", config)), density)


def run(method, denoiser, sets, **more):
    config = {**QUICK, **more.pop("config", {})}
    mask = mask_of(denoiser, sets) if method == "salun" and "mask" not in more else more.pop("mask", None)
    return unlearn_denoiser(denoiser, sets, method, config=config, mask=mask, **more)


def changed(before, after):
    other = dict(after.network.named_parameters())
    return {name for name, value in before.network.named_parameters() if not torch.equal(value, other[name])}


def counted(denoiser):
    """Count the examples that go forward and backward in copies of a network, until it is dropped."""
    ran = {"forward": 0, "backward": 0}

    def backward(gradient):
        ran["backward"] += len(gradient)

    def forward(network, args, output):
        ran["forward"] += len(output[0])
        if output[0].requires_grad:
            output[0].register_hook(backward)

    denoiser.network.register_forward_hook(forward)
    return ran


def ask(denoiser, noisy, times, table, rows):
    with torch.no_grad():
        return denoiser.predict(noisy, times, table.take(torch.as_tensor(rows)))


# --- what all have in common


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("kind", ["text", "class", "flow"])
def test_every_method_runs_on_every_network_or_explains_why_not(method, kind):
    denoiser, sets = lab(kind)
    before = model_digest(denoiser.network)
    config = {"selection": "noxattn"} if method == "esd" and kind == "class" else {}
    if method == "forget_me_not" and kind != "text":
        with pytest.raises(UsageError, match=r"selection xattn is empty|has no cross-attention"):
            run(method, denoiser, sets)
        return
    mask = {"mask": mask_of(denoiser, sets)} if method == "salun" else {}
    ran = counted(denoiser)
    result = run(method, denoiser, sets, config=config, **mask)
    assert model_digest(denoiser.network) == before
    assert changed(denoiser, denoiser.of(result.model))
    assert len(result.history) == 2
    assert all(np.isfinite(list(record.losses.values())).all() for record in result.history)
    assert not result.model.training
    if method == "forget_me_not":  # its gradient starts inside the network
        assert result.passes == ran["forward"]
    elif method not in {"esd", "retrain"}:  # a sampling of random length; a network of its own
        assert ran["backward"] > 0
        assert result.passes == math.ceil(ran["forward"] / 3 + ran["backward"] * 2 / 3)


@pytest.mark.parametrize("method", TRAINED)
def test_a_resumed_run_ends_in_the_same_bits(method, tmp_path):
    denoiser, sets = lab("text")
    store = FileCheckpoint(tmp_path / "state")
    whole = run(method, denoiser, sets)

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(method, denoiser, sets, checkpoint=store, on_epoch=stop)
    resumed = run(method, denoiser, sets, checkpoint=store)
    assert [record.epoch for record in resumed.history] == [1, 2]
    assert model_digest(resumed.model) == model_digest(whole.model)
    with pytest.raises(ConflictError):
        run(method, denoiser, sets, checkpoint=store, config={"seed": 1})


@pytest.mark.parametrize("method", ["esd", "forget_me_not"])
def test_text_methods_change_cross_attention_only(method):
    denoiser, sets = lab("text")
    result = run(method, denoiser, sets, config={"learning_rate": 1e-3})
    names = changed(denoiser, denoiser.of(result.model))
    assert names
    assert all(".attn2." in name for name in names)


@pytest.mark.parametrize("method", ["esd", "uce", "finetune"])
def test_a_mask_that_would_be_ignored_is_refused(method):
    denoiser, sets = lab("text")
    with pytest.raises(UsageError, match="takes no mask"):
        run(method, denoiser, sets, mask=selection_mask(denoiser, "full"))


def test_bad_sets_are_refused():
    denoiser, sets = lab("class")
    with pytest.raises(UsageError, match="salun needs a mask"):
        unlearn_denoiser(denoiser, sets, "salun", config=QUICK)
    with pytest.raises(DataError, match="look like itself"):
        run("random_label", denoiser, replace(sets, forget=sets.forget.with_pseudo(sets.forget.condition)))
    with pytest.raises(DataError, match="retain set is empty"):
        run("finetune", denoiser, replace(sets, retain=sets.retain.select([])))
    with pytest.raises(UsageError, match="unknown method.*esd"):
        diffusion_config("esdd")


# --- SalUn, random labelling, fine-tuning, retraining, ascent


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("text", {"optimizer": "adam"}),
        ("text", {"optimizer": "sgd", "momentum": 0.9}),
        ("class", {"optimizer": "adamw"}),
        ("flow", {"optimizer": "adam"}),
    ],
)
def test_weights_outside_the_mask_keep_their_bits(kind, optimizer):
    denoiser, sets = lab(kind)
    mask = mask_of(denoiser, sets, 0.3)
    result = run("salun", denoiser, sets, mask=mask, config={**optimizer, "weight_decay": 0.1, "learning_rate": 1e-2})
    after = dict(result.model.named_parameters())
    moved = total = 0
    for name, before in denoiser.network.named_parameters():
        salient = mask.tensor(name)
        assert torch.equal(before[~salient].view(torch.int32), after[name][~salient].view(torch.int32)), name
        moved += int((before != after[name]).sum())
        total += int(salient.sum())
    assert moved > 0.9 * total


def test_a_full_mask_is_random_labelling():
    denoiser, sets = lab("class")
    full = selection_mask(denoiser, "full")
    masked, free = run("salun", denoiser, sets, mask=full), run("random_label", denoiser, sets)
    after = dict(free.model.named_parameters())
    for name, weight in masked.model.named_parameters():
        assert torch.allclose(weight, after[name], atol=1e-6), name


@pytest.mark.parametrize(("method", "sign"), [("gradient_ascent", -1), ("finetune", 1)])
def test_ascent_and_fine_tuning_follow_plain_gradients(method, sign):
    denoiser, sets = lab("class")
    rate = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.01, "gradient_clip": None, "null_share": 0.0}
    result = run(method, denoiser, sets, config={**rate, "steps": 1, "epochs": 1, "batch_size": 16})
    forget, twin = method == "gradient_ascent", copy.deepcopy(denoiser.network)
    generator = torch.Generator().manual_seed(0)  # of epoch 0 under seed 0
    examples = sets.forget if forget else sets.retain
    order = torch.randperm(len(examples), generator=generator)[:16]  # drawn where the batch is due
    batch = noised(examples.select(order), denoiser.process, generator)
    found = denoiser.of(twin).predict(batch.noisy, batch.times, sets.table.take(batch.condition))
    (sign * ((found - batch.target) ** 2).mean()).backward()
    after = dict(result.model.named_parameters())
    for name, weight in twin.named_parameters():
        wanted = weight.detach() if weight.grad is None else weight.detach() - 0.01 * weight.grad
        assert torch.allclose(after[name], wanted, atol=1e-6), name


def test_ascent_is_minus_the_denoising_loss():
    denoiser, sets = lab("flow")
    forget, retain = batches(denoiser, sets)
    error = ask(denoiser, forget.noisy, forget.times, sets.table, forget.condition) - forget.target
    loss = METHODS["gradient_ascent"].loss(context(denoiser, sets, "gradient_ascent"), forget, retain)
    assert loss.item() == pytest.approx(-float((error**2).mean()), rel=1e-5)


def test_retraining_depends_on_the_seed_and_not_on_the_old_weights():
    _, sets = lab("class")
    first, second = (run("retrain", class_unet(seed), sets).model for seed in (1, 2))
    assert model_digest(first) == model_digest(second)
    other = run("retrain", class_unet(1), sets, config={"seed": 5}).model
    assert model_digest(first) != model_digest(other)


def test_retraining_a_part_of_fresh_weights_is_refused():
    denoiser, sets = lab("class")
    with pytest.raises(UsageError, match="retrain cannot train selfattn alone"):
        run("retrain", denoiser, sets, config={"selection": "selfattn"})


def test_retraining_learns():
    denoiser, sets = lab("class")
    history = run("retrain", denoiser, sets, config={"steps": 40, "epochs": 2, "batch_size": 8}).history
    assert history[1].losses["denoising"] < 0.8 * history[0].losses["denoising"]


# --- ESD


@pytest.mark.parametrize("kind", ["text", "class", "flow", "v_prediction"])
def test_the_target_of_esd_is_the_negatively_guided_prediction_of_the_original(kind):
    denoiser, sets = lab("text" if kind == "v_prediction" else kind)
    if kind == "v_prediction":
        denoiser = text_unet(prediction="v_prediction")
    original = denoiser.of(copy.deepcopy(denoiser.network))
    for weight in denoiser.network.parameters():
        weight.data.mul_(1.05)  # the model in training has moved on
    forget, _ = batches(denoiser, sets)
    chosen = context(denoiser, sets, "esd", original, negative_guidance=1.5, start_steps=3)
    loss = METHODS["esd"].loss(chosen, forget, forget)
    chosen.generator.manual_seed(0)
    drawn = partly_denoised(chosen, forget)
    conditional, free = (ask(original, drawn.noisy, drawn.times, sets.table, [row] * 6) for row in (0, NULL))
    found = ask(denoiser, drawn.noisy, drawn.times, sets.table, [0] * 6)
    assert loss.item() == pytest.approx(float(((found - (free - 1.5 * (conditional - free))) ** 2).mean()), rel=1e-4)
    loss.backward()
    assert all(weight.grad is None for weight in original.network.parameters())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cost_of_esd_is_its_expectation(guidance):
    denoiser, sets = lab("text")
    forget, _ = batches(denoiser, sets)
    ran = counted(denoiser)
    original = denoiser.of(copy.deepcopy(denoiser.network))
    chosen = context(denoiser, sets, "esd", original, start_steps=4, start_guidance=guidance)
    METHODS["esd"].loss(chosen, forget, forget)
    end = int(torch.randint(1000, (1,), generator=torch.Generator().manual_seed(0)))

    def forwards(moves):
        return moves * (1 if guidance == 1 else 2) + 2 + 1

    assert ran["forward"] == 6 * forwards(len(path(1000, end, 4)) - 1)
    mean = np.mean([len(path(1000, end, 4)) - 1 for end in range(1000)])
    assert METHODS["esd"].cost(chosen.config) == pytest.approx(200 * 8 * (forwards(mean) + 2) / 3, rel=5e-3)


def test_retraining_counts_each_example_once():
    assert METHODS["retrain"].cost(diffusion_config("retrain", QUICK)) == 2 * 4


def test_gradient_checkpointing_costs_a_forward_pass_more():
    config = diffusion_config("finetune", {"steps": 6, "epochs": 2, "batch_size": 4, "gradient_checkpointing": True})
    assert METHODS["finetune"].cost(config) == 6 * 4 * 4 // 3


def test_esd_denoises_the_noise_of_the_batch_to_one_random_time():
    denoiser, sets = lab("text")
    forget, _ = batches(denoiser, sets)
    chosen = context(denoiser, sets, "esd", start_steps=4, start_guidance=2.0)
    drawn = partly_denoised(chosen, forget)
    end = int(torch.randint(1000, (1,), generator=torch.Generator().manual_seed(0)))
    assert drawn.times.tolist() == [end] * 6
    alphas, current = diffusers.DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod, forget.target
    times = path(1000, end, 4)
    for now, then in zip(times[:-1], times[1:], strict=True):
        free, told = (ask(denoiser, current, torch.full((6,), now), sets.table, [row] * 6) for row in (NULL, 0))
        noise = free + 2.0 * (told - free)
        clean = ((current - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()).clamp(-1, 1)
        current = alphas[then].sqrt() * clean + (1 - alphas[then]).sqrt() * noise
    assert torch.allclose(drawn.noisy, current, atol=1e-4)


def test_the_path_to_a_time_has_even_steps():
    assert path(1000, 999, 20) == [999]
    assert path(1000, 0, 4) == [999, 749, 500, 250, 0]
    for end in range(0, 1000, 37):
        times = path(1000, end, 20)
        assert (times[0], times[-1]) == (999, end)
        assert all(0 < a - b <= 51 for a, b in zip(times[:-1], times[1:], strict=True))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_equals_the_ddim_step_of_diffusers(prediction):
    denoiser, sets = text_unet(prediction=prediction), digits_sets(text_table())
    batch = replace(batches(denoiser, sets)[0], times=torch.full((6,), 750))
    predicted = torch.randn(batch.noisy.shape, generator=torch.Generator().manual_seed(1))
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(4)
    wanted = scheduler.step(predicted, 750, batch.noisy).prev_sample
    moved = ddim_step(denoiser, batch, predicted, 500, pixels=False)
    assert torch.allclose(moved.noisy, wanted, atol=1e-5)
    assert moved.times.tolist() == [500] * 6


def test_a_step_of_a_flow_is_an_euler_step():
    denoiser, sets = lab("flow")
    batch = replace(batches(denoiser, sets)[0], times=torch.full((6,), 750))
    predicted = torch.randn(batch.noisy.shape, generator=torch.Generator().manual_seed(1))
    sigma = denoiser.process.noise
    moved = ddim_step(denoiser, batch, predicted, 500, pixels=False)
    assert torch.allclose(moved.noisy, batch.noisy + (sigma[500] - sigma[750]) * predicted, atol=1e-5)


def test_esd_x_is_refused_for_classes_and_esd_needs_a_null_condition():
    denoiser, sets = lab("class")
    with pytest.raises(UsageError, match="selection xattn is empty.*choose full, noxattn"):
        run("esd", denoiser, sets)
    with pytest.raises(UsageError, match="null condition"):
        run("esd", denoiser, replace(sets, table=replace(sets.table, null=None)), config={"selection": "noxattn"})


def test_esd_moves_the_prediction_towards_its_target():
    denoiser, sets = lab("text")
    history = run("esd", denoiser, sets, config={"steps": 30, "learning_rate": 1e-2, "start_steps": 2}).history
    assert history[1].losses["denoising"] < 0.9 * history[0].losses["denoising"]


# --- Forget-Me-Not


def test_attention_equals_the_softmax_of_the_layer():
    denoiser, sets = lab("text")
    forget, _ = batches(denoiser, sets)
    layer = next(iter(denoiser.cross_attentions().values()))
    seen = {}
    watch = [
        getattr(layer, part).register_forward_hook(lambda m, a, out, part=part: seen.setdefault(part, out))
        for part in ("to_q", "to_k", "to_v")
    ]
    mixed = layer.to_out[0].register_forward_pre_hook(lambda m, args: seen.setdefault("mixed", args[0]))
    with attention_maps(denoiser) as maps:
        ask(denoiser, forget.noisy, forget.times, sets.table, forget.condition)
    for hook in [*watch, mixed]:
        hook.remove()
    query, key, value = (
        seen[part].detach().double().numpy().reshape(6, -1, layer.heads, 4).transpose(0, 2, 1, 3)
        for part in ("to_q", "to_k", "to_v")
    )
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(4)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert maps[0].shape == (6, layer.heads, 16, LENGTH)
    np.testing.assert_allclose(maps[0].detach().numpy(), weights, atol=1e-5)
    out = (weights @ value).transpose(0, 2, 1, 3).reshape(6, 16, -1)
    np.testing.assert_allclose(seen["mixed"].detach().numpy(), out, atol=1e-5)  # what the fused kernel made of it


def test_attention_energy_is_the_mean_square_of_the_marked_probabilities():
    probabilities = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]], [[[0.0, 1.0, 0.0], [0.6, 0.2, 0.2]]]])
    marks = torch.tensor([[False, True, False], [True, False, True]])
    wanted = (0.3**2 + 0.1**2 + 0.0 + 0.0 + 0.6**2 + 0.2**2) / 6
    assert float(attention_energy(probabilities, marks)) == pytest.approx(wanted)


def test_the_loss_uses_the_tokens_of_each_prompt():
    denoiser, sets = text_unet(), digits_sets(text_table(tokens=[[2], [1], [3], []]))
    forget, retain = batches(denoiser, sets)
    with attention_maps(denoiser) as maps:
        ask(denoiser, forget.noisy, forget.times, sets.table, forget.condition)
    wanted = np.mean([float((found[..., 2] ** 2).mean()) for found in maps])
    loss = METHODS["forget_me_not"].loss(context(denoiser, sets, "forget_me_not"), forget, retain)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert len(maps) == 4


def test_forget_me_not_lowers_the_attention_and_leaves_no_hook():
    denoiser, sets = text_unet(), digits_sets(text_table(tokens=[[2], [1], [3], []]))
    config = {"steps": 20, "learning_rate": 1e-2}
    result = run("forget_me_not", denoiser, sets, config=config)
    assert result.history[1].losses["denoising"] < 0.9 * result.history[0].losses["denoising"]
    assert not [m for m in result.model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_hooks_are_removed_when_the_network_fails():
    denoiser, sets = lab("text")
    with pytest.raises(KeyError), attention_maps(denoiser):
        denoiser.predict(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), {})
    assert not [m for m in denoiser.network.modules() if m._forward_pre_hooks]


def test_forget_me_not_cannot_read_checkpointed_attention():
    denoiser, sets = lab("text")
    with pytest.raises(UsageError, match="gradient checkpointing"):
        run("forget_me_not", denoiser, sets, config={"gradient_checkpointing": True})
    with pytest.raises(UsageError, match="has no cross-attention"):
        run("forget_me_not", *lab("flow"), config={"selection": "full"})


# --- UCE


def test_the_correction_solves_the_weighted_least_squares():
    old, new, kept = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    projection = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
    found = (projection + projection @ correction(old, new, kept, 0.3, 0.7)).numpy()
    # min_W Σ|W c_e - W_o c_a|² + p Σ|W c_k - W_o c_k|² + λ |W - W_o|², as one stacked system for lstsq
    sources = np.concatenate([old, np.sqrt(0.7) * kept, np.sqrt(0.3) * np.eye(5)])
    aims = np.concatenate([new, np.sqrt(0.7) * kept, np.sqrt(0.3) * np.eye(5)]) @ projection.numpy().T
    np.testing.assert_allclose(found, np.linalg.lstsq(sources, aims, rcond=None)[0].T, atol=1e-10)


def test_the_edit_is_the_published_quotient():
    denoiser, sets = lab("text")
    config = {"edit_strength": 0.2, "preserve_strength": 0.5}
    result = unlearn_denoiser(denoiser, sets, "uce", config=config)
    texts = sets.table.rows["encoder_hidden_states"].double().numpy()[:, 1:]
    forgotten, anchor = texts[0], texts[1]
    kept = texts[[1, 2, NULL]].reshape(-1, WIDTH)
    after = projections(denoiser.of(result.model))
    for name, layer in projections(denoiser).items():
        before = layer.weight.detach().double().numpy()
        gram = forgotten.T @ forgotten + 0.2 * np.eye(WIDTH) + 0.5 * kept.T @ kept
        aims = before @ anchor.T @ forgotten + 0.2 * before + 0.5 * before @ kept.T @ kept
        np.testing.assert_allclose(after[name].weight.detach().numpy(), aims @ np.linalg.inv(gram), atol=1e-6)


def test_the_edit_changes_keys_and_values_only():
    denoiser, sets = lab("text")
    result = unlearn_denoiser(denoiser, sets, "uce")
    assert changed(denoiser, denoiser.of(result.model)) == {f"{name}.weight" for name in projections(denoiser)}
    assert (result.history, result.passes) == ([], 0)
    assert not [m for m in result.model.modules() if m._forward_pre_hooks]
    again = unlearn_denoiser(denoiser, sets, "uce", config={"batch_size": 1})
    assert model_digest(again.model) == model_digest(result.model)


def test_a_forgotten_prompt_is_projected_like_its_anchor_and_others_stay():
    denoiser, sets = lab("text")
    config = {"edit_strength": 1e-6, "preserve_strength": 1.0}
    after = denoiser.of(unlearn_denoiser(denoiser, sets, "uce", config=config).model)
    noisy, times = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500)

    def keys(model, row):
        text = sets.table.rows["encoder_hidden_states"][row, 1:]
        return next(iter(projections(model).values()))(text).detach()

    before = float((keys(denoiser, 0) - keys(denoiser, 1)).norm())
    assert float((keys(after, 0) - keys(denoiser, 1)).norm()) < 0.75 * before
    assert float((keys(after, 2) - keys(denoiser, 2)).norm()) < 0.5 * before
    told = [ask(model, noisy, times, sets.table, [2] * 4) for model in (denoiser, after)]
    assert not torch.equal(*told)


def test_tokens_are_matched_from_the_last_token_of_the_concept():
    table = text_table(tokens=[[1, 2], [3], [1], []])
    sets = digits_sets(table)
    texts = table.rows["encoder_hidden_states"]
    old, new, kept = matched_tokens(texts, sets, [2, 3, 1, 1])
    assert torch.equal(old, texts[0, 2:4])
    assert torch.equal(new, texts[1, 3:5])
    assert torch.equal(kept, torch.cat([texts[1, 3:], texts[2, 1:], texts[NULL, 1:]]))
    denoiser = text_unet()
    result = unlearn_denoiser(denoiser, sets, "uce")
    name, layer = next(iter(projections(denoiser).items()))
    weight = layer.weight.detach().double()
    wanted = weight + weight @ correction(old, new, kept, 0.1, 0.1)
    assert torch.allclose(projections(denoiser.of(result.model))[name].weight.detach().double(), wanted, atol=1e-6)


def test_a_network_that_projects_its_text_is_edited_where_the_text_is_read():
    denoiser, sets = pixart(), digits_sets(text_table())
    result = unlearn_denoiser(denoiser, sets, "uce")
    with torch.no_grad():
        texts = denoiser.network.caption_projection(sets.table.rows["encoder_hidden_states"])
    change = correction(*matched_tokens(texts, sets, [1] * 4), 0.1, 0.1)
    for name, layer in projections(denoiser).items():
        weight = layer.weight.detach().double()
        found = projections(denoiser.of(result.model))[name].weight.detach().double()
        assert torch.allclose(found, weight + weight @ change, atol=1e-6)
    names = {f"{name}.weight" for name in projections(denoiser)}
    assert changed(denoiser, denoiser.of(result.model)) == names  # the biases stay


@pytest.mark.parametrize("method", ["uce", "rece"])
@pytest.mark.parametrize("make", [class_unet, flow_transformer])
def test_closed_forms_need_cross_attention(method, make):
    sets = lab("class" if make is class_unet else "flow")[1]
    with pytest.raises(UsageError, match="has no cross-attention"):
        unlearn_denoiser(make(), sets, method)


# --- RECE


def test_rece_alternates_least_squares_for_weights_and_for_embeddings():
    """The paper's two problems, each as one stacked system for lstsq over explicit weights of all layers."""
    denoiser, sets = lab("text")
    config = {"edit_strength": 0.2, "preserve_strength": 0.5, "adversarial_rounds": 2, "adversarial_strength": 0.3}
    found = projections(denoiser.of(unlearn_denoiser(denoiser, sets, "rece", config=config).model))
    texts = sets.table.rows["encoder_hidden_states"].double().numpy()[:, 1:]
    forgotten, anchor, kept = texts[0], texts[1], texts[[1, 2, NULL]].reshape(-1, WIDTH)
    original = {name: layer.weight.detach().double().numpy() for name, layer in projections(denoiser).items()}

    def edited(weight, tokens):
        sources = np.concatenate([tokens, np.sqrt(0.5) * kept, np.sqrt(0.2) * np.eye(WIDTH)])
        aims = np.concatenate([anchor, np.sqrt(0.5) * kept, np.sqrt(0.2) * np.eye(WIDTH)]) @ weight.T
        return np.linalg.lstsq(sources, aims, rcond=None)[0].T

    weights = {name: edited(weight, forgotten) for name, weight in original.items()}
    for _ in range(2):
        stacked = np.concatenate([*weights.values(), np.sqrt(0.3) * np.eye(WIDTH)])
        aims = np.concatenate([*(weight @ forgotten.T for weight in original.values()), np.zeros_like(forgotten.T)])
        adversarial = np.linalg.lstsq(stacked, aims, rcond=None)[0].T
        weights = {name: edited(weight, adversarial) for name, weight in weights.items()}
    for name, weight in weights.items():
        np.testing.assert_allclose(found[name].weight.detach().numpy(), weight, atol=1e-6)


def test_rece_erases_embeddings_that_bring_the_concept_back_after_uce():
    denoiser, sets = lab("text")
    texts = sets.table.rows["encoder_hidden_states"].double().numpy()[:, 1:]
    distance = {}
    for method in ("uce", "rece"):
        after = projections(denoiser.of(unlearn_denoiser(denoiser, sets, method).model))
        old, new = (
            np.concatenate([layer.weight.detach().double().numpy() for layer in layers.values()])
            for layers in (projections(denoiser), after)
        )
        wanted = old @ texts[0].T
        system = np.concatenate([new, np.sqrt(0.1) * np.eye(WIDTH)])
        attack = np.linalg.lstsq(system, np.concatenate([wanted, np.zeros((WIDTH, len(texts[0])))]), rcond=None)[0]
        distance[method] = np.linalg.norm(new @ attack - wanted)
    assert distance["rece"] > 1.5 * distance["uce"]


def test_rece_changes_keys_and_values_only_and_reads_its_own_settings():
    denoiser, sets = lab("text")
    result = unlearn_denoiser(denoiser, sets, "rece")
    assert changed(denoiser, denoiser.of(result.model)) == {f"{name}.weight" for name in projections(denoiser)}
    assert (result.history, result.passes) == ([], 0)
    with pytest.raises(UsageError, match="adversarial_rounds: unknown key"):
        diffusion_config("uce", {"adversarial_rounds": 2})
