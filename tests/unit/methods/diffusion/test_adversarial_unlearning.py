"""AdvUnlearn against explicit calls of the network and plain arithmetic."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from salun_core.diffusion.conditions import ConditionTable, TextEncoder
from salun_core.errors import ConflictError, UsageError
from salun_core.methods.classification import FileCheckpoint
from salun_core.methods.diffusion import METHODS, DiffusionContext, diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.adversarial_unlearning import attack, loss
from salun_core.methods.diffusion.erased_stable_diffusion import partly_denoised, path
from salun_core.models.checkpoint import model_digest
from tests.support.tiny_diffusion import (
    LENGTH,
    NULL,
    PROMPTS,
    TEXT_WIDTH,
    WIDTH,
    batches,
    digits_sets,
    lab,
    text_components,
    text_table,
    text_unet,
)

pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow

QUICK = {"steps": 2, "epochs": 2, "batch_size": 2, "start_steps": 2, "attack_steps": 2, "device": "cpu"}


def middle_of_a_run(tokens=(), **config):
    """θ_o, θ after some training, and the context."""
    original, sets = text_unet(), digits_sets(text_table(tokens=tokens))
    denoiser = original.of(copy.deepcopy(original.network))
    for weight in denoiser.network.parameters():
        weight.data.mul_(1.05)
    settings = diffusion_config("adv_unlearn", {"start_steps": 2, **config})
    return original, DiffusionContext(denoiser, original, sets, settings, torch.Generator().manual_seed(0))


def predict(denoiser, batch, text):
    told = {"encoder_hidden_states": text.expand(len(batch), LENGTH, WIDTH)}
    return denoiser.predict(batch.noisy, batch.times, told)


def numbers(tensor):
    return tensor.detach().double().numpy()


def test_the_loss_is_that_of_the_paper_under_the_attacked_prompt():
    original, chosen = middle_of_a_run(
        [[2, 3], [1], [3], []], negative_guidance=1.5, alpha=0.7, attack_steps=2, attack_rate=0.1
    )
    forget, retain = batches(original, chosen.sets)
    texts, ran = chosen.sets.table.rows["encoder_hidden_states"], []
    hooks = [
        each.network.register_forward_hook(lambda _, args, output: ran.append(len(output[0])))
        for each in (original, chosen.denoiser)
    ]
    found = loss(chosen, forget, retain)
    for hook in hooks:
        hook.remove()
    chosen.generator.manual_seed(0)
    batch = partly_denoised(chosen, forget)
    free, concept = (numbers(predict(original, batch, texts[row])) for row in (NULL, 0))
    adversarial = texts[0].clone()
    for _ in range(2):  # each step has the length 0.1 at the tokens of the concept, and 0 elsewhere
        tried = adversarial.clone().requires_grad_(True)
        ((predict(chosen.denoiser, batch, tried) - torch.from_numpy(concept)) ** 2).mean().backward()
        adversarial[2:4] -= 0.1 * torch.sign(tried.grad[2:4])
    erased = numbers(predict(chosen.denoiser, batch, adversarial)) - (free - 1.5 * (concept - free))
    told = {"encoder_hidden_states": texts[retain.condition]}
    moved = [numbers(each.predict(retain.noisy, retain.times, told)) for each in (chosen.denoiser, original)]
    wanted = np.mean(erased**2) + 0.7 * np.mean((moved[0] - moved[1]) ** 2)
    assert found.item() == pytest.approx(wanted, rel=1e-3)
    moves = len(path(1000, int(batch.times[0]), 2)) - 1
    assert sum(ran) == 6 * (2 * moves + 3 + 2 + 2)  # sampling; targets; attack; both predictions


def test_an_attack_brings_the_prediction_of_the_original_nearer():
    original, chosen = middle_of_a_run(attack_steps=8, attack_rate=0.02)
    batch, _ = batches(original, chosen.sets)
    text = chosen.sets.table.rows["encoder_hidden_states"][0]
    with torch.no_grad():
        concept = predict(original, batch, text)
        plain = predict(chosen.denoiser, batch, text)
    told = attack(chosen, batch, concept)["encoder_hidden_states"]
    with torch.no_grad():
        attacked = chosen.denoiser.predict(batch.noisy, batch.times, {"encoder_hidden_states": told})
    assert (attacked - concept).square().mean() < (plain - concept).square().mean()
    assert torch.equal(told[:, 0], text[:1].expand(6, WIDTH))  # the first position is not of the concept
    assert (told - text).abs().max() <= 8 * 0.02 + 1e-6
    assert all(weight.grad is None for weight in chosen.denoiser.network.parameters())


def test_its_cost_counts_the_attack_and_what_only_goes_forward():
    config = diffusion_config("adv_unlearn", {**QUICK, "steps": 6})
    forward, trained = 2 * 1.5 + 3, 2 + 2  # a guided sampling and three targets; two steps of attack and a pair
    assert METHODS["adv_unlearn"].cost(config) == 6 * 2 * (forward / 3 + trained)


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    denoiser, sets = lab("text")
    whole = unlearn_denoiser(denoiser, sets, "adv_unlearn", config=QUICK | {"learning_rate": 1e-3})
    names = [name for name, weight in whole.model.named_parameters()]
    after = dict(whole.model.named_parameters())
    changed = [name for name in names if not torch.equal(after[name], denoiser.network.get_parameter(name))]
    assert changed
    assert all(".attn2." in name for name in changed)
    store = FileCheckpoint(tmp_path / "state")

    def stop(record):
        raise KeyboardInterrupt

    given = {"config": QUICK | {"learning_rate": 1e-3}, "checkpoint": store}
    with pytest.raises(KeyboardInterrupt):
        unlearn_denoiser(denoiser, sets, "adv_unlearn", **given, on_epoch=stop)
    resumed = unlearn_denoiser(denoiser, sets, "adv_unlearn", **given)
    assert model_digest(resumed.model) == model_digest(whole.model)


def test_classes_are_refused():
    denoiser, sets = lab("class")
    with pytest.raises(UsageError, match="conditions have no tokens"):
        unlearn_denoiser(denoiser, sets, "adv_unlearn", config={**QUICK, "selection": "full"})


def text_lab():
    """A denoiser, and sets whose table is that of a CLIP text encoder."""
    encoder = TextEncoder.of(text_components(), [*PROMPTS, ""])
    with torch.no_grad():
        rows = {"encoder_hidden_states": encoder.encode(torch.arange(4))}
    sets = digits_sets(ConditionTable([*PROMPTS, ""], rows, NULL))
    return text_unet(cross_attention_dim=TEXT_WIDTH), replace(sets, encoder=encoder)


def read(network, embeddings):
    """Encode embeddings of tokens by an encoder that has no other words than them."""
    own = copy.deepcopy(network)
    own.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(len(embeddings), TEXT_WIDTH))
    own.get_input_embeddings().register_forward_hook(lambda *_: embeddings[None])
    return own(torch.arange(len(embeddings))[None])[0][0]


def test_a_text_encoder_in_training_is_attacked_at_its_input():
    original, sets = text_lab()
    text = replace(sets.encoder, network=copy.deepcopy(sets.encoder.network))
    for weight in text.network.parameters():
        weight.data.mul_(1.05)
    settings = {"selection": "text", "start_steps": 2, "attack_steps": 2, "attack_rate": 0.1, "alpha": 0.7}
    config = diffusion_config("adv_unlearn", settings)
    chosen = DiffusionContext(original, original, sets, config, torch.Generator().manual_seed(0), text)
    forget, retain = batches(original, sets)
    found = loss(chosen, forget, retain)
    found.backward()
    trained = set(text.trained_parameters())
    gradients = {name for name, weight in text.network.named_parameters() if weight.grad is not None}
    assert trained <= gradients
    chosen.generator.manual_seed(0)
    batch = partly_denoised(chosen, forget)  # under the encoder in training

    def told(text):
        return {"encoder_hidden_states": text.expand(6, *text.shape[-2:])}

    before, words = sets.table.rows["encoder_hidden_states"], text.network.get_input_embeddings().weight.detach()
    free, concept = (numbers(original.predict(batch.noisy, batch.times, told(before[row]))) for row in (NULL, 0))
    adversarial, own = words[text.tokens[0]].clone(), slice(1, 6)  # "an image of a zero", after the first token
    for _ in range(2):
        tried = adversarial.clone().requires_grad_(True)
        predicted = original.predict(batch.noisy, batch.times, told(read(text.network, tried)))
        ((predicted - torch.from_numpy(concept)) ** 2).mean().backward()
        adversarial[own] -= 0.1 * words.std() * torch.sign(tried.grad[own])
    erased = numbers(original.predict(batch.noisy, batch.times, told(read(text.network, adversarial))))
    texts = text.network(text.tokens)[0]
    moved = [
        numbers(original.predict(retain.noisy, retain.times, {"encoder_hidden_states": rows[retain.condition]}))
        for rows in (texts, before)
    ]
    wanted = np.mean((erased - (free - (concept - free))) ** 2) + 0.7 * np.mean((moved[0] - moved[1]) ** 2)
    assert found.item() == pytest.approx(wanted, rel=1e-3)


def test_a_killed_training_of_the_text_encoder_ends_in_the_same_bits(tmp_path):
    denoiser, sets = text_lab()
    config = QUICK | {"learning_rate": 1e-3, "selection": "text"}
    whole = unlearn_denoiser(denoiser, sets, "adv_unlearn", config=config)
    assert model_digest(whole.model) == model_digest(denoiser.network)
    old, new = (dict(network.named_parameters()) for network in (sets.encoder.network, whole.text_encoder))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert changed <= set(sets.encoder.trained_parameters())
    assert not any("embedding" in name for name in changed)

    def stop(record):
        raise KeyboardInterrupt

    given = {"config": config, "checkpoint": FileCheckpoint(tmp_path / "state")}
    with pytest.raises(KeyboardInterrupt):
        unlearn_denoiser(denoiser, sets, "adv_unlearn", **given, on_epoch=stop)
    other = replace(sets, encoder=replace(sets.encoder, network=whole.text_encoder))
    with pytest.raises(ConflictError, match="another run"):
        unlearn_denoiser(denoiser, other, "adv_unlearn", **given)
    resumed = unlearn_denoiser(denoiser, sets, "adv_unlearn", **given)
    assert model_digest(resumed.text_encoder) == model_digest(whole.text_encoder)


def test_other_methods_do_not_train_the_text_encoder():
    for method in ("salun", "esd", "stereo"):
        with pytest.raises(UsageError, match=f"{method} does not train the text encoder"):
            diffusion_config(method, {"selection": "text"})
    with pytest.raises(UsageError, match="no text encoder to train"):
        unlearn_denoiser(*lab("text"), "adv_unlearn", config={**QUICK, "selection": "text"})
