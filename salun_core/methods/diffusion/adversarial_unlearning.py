"""AdvUnlearn: ESD against the prompts that undo it best, while the retain set keeps the original's predictions.

    min_θ  E||ε_θ(x_t, c*) - [ε_o(x_t, ∅) - η (ε_o(x_t, c) - ε_o(x_t, ∅))]||² + α E||ε_θ(x_r, c_r) - ε_o(x_r, c_r)||²
    c* = argmin_v E||ε_θ(x_t, v) - ε_o(x_t, c)||²

η is `negative_guidance`. x_t is drawn under c as in ESD, and serves the attack of its step, too. v is the embedded
prompt at the positions of the concept's tokens. It begins as c and takes `attack_steps` steps of length `attack_rate`
along the sign of the gradient; all samples of a prompt share it.

This trains the denoiser, or with `selection: text`, which the paper prefers, the layers of the text encoder. Then ε_θ
is the original denoiser under the conditions of the encoder in training. The attack is on the encoder's input: v is the
embeddings of the prompt's words, and a step has the length `attack_rate` times the standard deviation of the embeddings
in the vocabulary.

Source: Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models",
NeurIPS 2024: the bi-level problem with its utility-retaining regularisation, and its fast attack. Deviations:
docs/research/deviations.md, row `adv_unlearn`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from salun_core.diffusion.conditions import Conditions
from salun_core.diffusion.examples import Noised
from salun_core.methods.diffusion import erased_stable_diffusion
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod
from salun_core.methods.diffusion.objectives import retain_weight

_TEXT = "encoder_hidden_states"


class AdvUnlearnConfig(erased_stable_diffusion.EsdConfig):
    """ESD, and the attack in each step."""

    attack_steps: int = Field(default=5, ge=1, description="steps of the attack in each step")
    attack_rate: float = Field(
        default=0.1,
        gt=0,
        le=1e6,
        description="length of these steps; with `selection: text` as a share of the embeddings' spread",
    )


def loss(context: DiffusionContext[AdvUnlearnConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return ESD's loss under attacked prompts plus the weighted distance from θ_o on the retain batch.

    `UsageError` if the conditions are not texts, or there is no null condition.
    """
    assert context.original is not None
    denoiser, original, table = context.denoiser, context.original, context.sets.table  # the table of the original
    batch = erased_stable_diffusion.partly_denoised(context, forget)
    with torch.no_grad():
        free = original.predict(batch.noisy, batch.times, table.nulls(len(batch)))
        concept = original.predict(batch.noisy, batch.times, table.take(batch.condition))
        kept = original.predict(retain.noisy, retain.times, table.take(retain.condition))
    attacked = attack(context, batch, concept)
    erased = denoiser.predict(batch.noisy, batch.times, attacked)
    predicted = denoiser.predict(retain.noisy, retain.times, context.table.take(retain.condition))
    loss_f = mse_loss(erased, free - context.config.negative_guidance * (concept - free))
    return loss_f + retain_weight(context) * mse_loss(predicted, kept)


def attack(context: DiffusionContext[AdvUnlearnConfig], batch: Noised, concept: Tensor) -> Conditions:
    """Find conditions under which the model in training predicts as the original does for the concept, ε_o(x_t, c).

    The result has c* as text, with gradients for a text encoder in training. `UsageError` if the conditions are not
    texts.
    """
    table, config, text = context.sets.table, context.config, context.text
    rows, place = torch.unique(batch.condition, return_inverse=True)
    marks = table.own_tokens()[rows.cpu()].to(batch.noisy.device)
    told, found, length = table.take(batch.condition), table.rows[_TEXT][rows], config.attack_rate
    if text is not None:  # an attack on its output would not depend on it
        marks, found, length = marks & text.words[rows], text.embeddings(rows), length * text.spread

    def conditions(v: Tensor) -> Conditions:
        return {**told, _TEXT: (v if text is None else text.encode(rows, v))[place]}

    for _ in range(config.attack_steps):
        tried = found.clone().requires_grad_(True)
        predicted = context.denoiser.predict(batch.noisy, batch.times, conditions(tried))
        (gradient,) = torch.autograd.grad(mse_loss(predicted, concept), tried)
        found = found - length * marks[..., None] * gradient.sign()
    return conditions(found)


def passes(config: AdvUnlearnConfig) -> float:
    """Return the expected cost in passes: ESD, the steps of the attack, and a retain example with its target."""
    pairs = config.steps * config.batch_size
    repeated = pairs * config.attack_steps / 3 if config.gradient_checkpointing else 0
    return erased_stable_diffusion.passes(config) + pairs * (config.attack_steps + 1 + 1 / 3) + repeated


METHOD = DiffusionMethod(
    loss,
    config_type=AdvUnlearnConfig,
    about="`esd` against the prompts that undo it best, with a retain loss",
    source='Zhang et al., "Defensive Unlearning with Adversarial Training", NeurIPS 2024',
    passes=passes,
    needs_original=True,
    needs="texts, a null condition",
    trains_text=True,
    defaults={"selection": "xattn", "steps": 200, "batch_size": 8, "learning_rate": 1e-5, "alpha": 1.0},
)
