"""STEREO: attack an erased model until its attacks are known, then erase them all from the original at once.

Stage 1, for k = 0, 1, ..., K - 1, with c_0 = c and θ_-1 = θ_o:
    θ_k: ε_θ(x_t, c_k) -> ε_s(x_t, ∅) - η (ε_s(x_t, c_k) - ε_s(x_t, ∅)),    s = θ_{k-1} (ESD)
    c_{k+1} = argmin_v E||ε - ε_{θ_k}(x_t | v)||² over D_f (inversion of the concept)
Stage 2, from θ_o, with n drawn from 0, ..., K for each sample:
    ε_θ(x_t, c_n) -> ε_o(x_t, ∅) + a (ε_o(x_t, c_a) - ε_o(x_t, ∅)) - η mean_k (ε_o(x_t, c_k) - ε_o(x_t, ∅))

K is `attack_rounds`, η `negative_guidance`, a `anchor_guidance`, c_a the anchor. x_t is drawn as in ESD, under the
condition that is trained. v is the embedded prompt at the positions of the concept's tokens, begins as the null
condition, and takes `attack_steps` steps of Adam at `attack_rate`. Each erasing takes `steps` steps in `epochs` epochs.

Source: Srivatsan et al., "STEREO: A Two-Stage Framework for Adversarially Robust Concept Erasing from Text-to-Image
Diffusion Models", CVPR 2025. Deviations: docs/research/deviations.md, row `stereo`.

A killed run resumes in its erasing, because the checkpoint keeps the weights that it began with and the embeddings that
were found. It may end

- before the first epoch of an erasing is kept: the checkpoint is that of the erasing before, with all its epochs. That
  one has nothing left to do, and the attack on it is repeated, with the same result;
- within an erasing: its finished epochs are kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Noised, endless, noised
from salun_core.digest import sha256_bytes
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import CheckpointStore, StageCheckpoint, opened, require_run
from salun_core.methods.diffusion import erased_stable_diffusion
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod, ExampleSets, Training
from salun_core.methods.loop import epoch_generator

_TEXT, _FOUND = "encoder_hidden_states", "found"


class StereoConfig(erased_stable_diffusion.EsdConfig):
    """ESD, and the attacks on it."""

    attack_rounds: int = Field(
        default=2, ge=1, le=100, description="erasings of the first stage, each with an attack on it"
    )
    attack_steps: int = Field(default=200, ge=1, description="steps of each attack")
    attack_rate: float = Field(default=0.02, gt=0, le=1e6, description="learning rate of an attack, of Adam")
    anchor_guidance: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="weight of the direction of the anchor"
    )


@dataclass(frozen=True)
class Attacks:
    """The conditions of a run and those that attacks found.

    Args:
        rows: int64 [R], the forgotten conditions, on the CPU.
        found: [k, R, L, W], their embeddings from each attack.
    """

    table: ConditionTable
    rows: Tensor
    found: Tensor

    def extended(self) -> ConditionTable:
        """Return the table followed by the found conditions; what is not text is that of the prompt."""
        count = len(self.found)
        again = {name: tensor[self.rows.to(tensor.device)] for name, tensor in self.table.rows.items()}
        rows = {name: torch.cat([self.table.rows[name], *[own] * count]) for name, own in again.items()}
        rows[_TEXT] = torch.cat([self.table.rows[_TEXT], self.found.flatten(0, 1)])
        names = [f"{self.table.names[row]} ({number + 1})" for number in range(count) for row in self.rows.tolist()]
        return ConditionTable([*self.table.names, *names], rows, self.table.null)

    def row(self, conditions: Tensor, attack: Tensor) -> Tensor:
        """Return the rows of c_k in the extended table for forgotten conditions and attacks k, int64 [B].

        k = 0 is the condition itself.
        """
        place = torch.searchsorted(self.rows.to(conditions.device), conditions)
        return torch.where(attack == 0, conditions, len(self.table) + (attack - 1) * len(self.rows) + place)


def erasing_loss(
    attacks: Attacks, number: int, context: DiffusionContext[StereoConfig], forget: Noised, retain: Noised
) -> Tensor:
    """Return the loss of ESD for c_k, with k = `number`."""
    condition = attacks.row(forget.condition, torch.full_like(forget.condition, number))
    return erased_stable_diffusion.loss(context, replace(forget, condition=condition), retain)


def robust_loss(attacks: Attacks, context: DiffusionContext[StereoConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the mean squared distance of the prediction from the composition of stage 2."""
    assert context.original is not None
    assert forget.pseudo is not None
    original, config, table = context.original, context.config, context.sets.table
    count, device = len(attacks.found) + 1, forget.condition.device
    drawn = torch.randint(count, (len(forget),), generator=context.generator).to(device)
    batch = replace(forget, condition=attacks.row(forget.condition, drawn))
    batch = erased_stable_diffusion.partly_denoised(context, batch)

    def seen(rows: Tensor) -> Tensor:
        return original.predict(batch.noisy, batch.times, table.take(rows))

    with torch.no_grad():
        free = original.predict(batch.noisy, batch.times, table.nulls(len(batch)))
        known = [seen(attacks.row(forget.condition, torch.full_like(drawn, number))) for number in range(count)]
        concept = torch.stack(known).mean(dim=0) - free
        target = free + config.anchor_guidance * (seen(forget.pseudo) - free) - config.negative_guidance * concept
    predicted = context.denoiser.predict(batch.noisy, batch.times, table.take(batch.condition))
    return mse_loss(predicted, target)


def invert(denoiser: Denoiser, sets: ExampleSets, config: StereoConfig, generator: torch.Generator) -> Tensor:
    """Find embeddings [R, L, W] under which a model denoises the forgotten images best, by ascending condition.

    The denoiser θ_k is unchanged by the call, and the generator is on the CPU. `UsageError` if the conditions are not
    texts, or there is no null condition.
    """
    table, rows = sets.table, forgotten(sets).to(sets.forget.condition.device)
    text = table.rows[_TEXT]
    marks = table.own_tokens()[rows.cpu()].to(text.device)[..., None]
    start = torch.where(marks, table.nulls(len(rows))[_TEXT], text[rows])
    found = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([found], lr=config.attack_rate)
    parameters = [(item, item.requires_grad) for item in denoiser.network.parameters()]
    denoiser.network.requires_grad_(False).eval()
    try:
        batches = endless(len(sets.forget), config.batch_size, generator)
        for _ in range(config.attack_steps):
            batch = noised(sets.forget.select(next(batches)), denoiser.process, generator)
            own = torch.where(marks, found, start)[torch.searchsorted(rows, batch.condition)]
            told = {**table.take(batch.condition), _TEXT: own}
            optimizer.zero_grad()
            mse_loss(denoiser.predict(batch.noisy, batch.times, told), batch.target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    finally:
        for item, flag in parameters:
            item.requires_grad_(flag)
    return torch.where(marks, found, start).detach()


def forgotten(sets: ExampleSets) -> Tensor:
    """Return the forgotten conditions in ascending order, int64, on the CPU."""
    return torch.tensor(sorted(set(sets.forget.condition.tolist())))


@dataclass
class _Run:
    """The state of a run.

    Args:
        reached: erasing to begin or to resume with.
        resumed: state of its loop in an earlier process, or None.
        history: records of the epochs of all erasings before it.
    """

    context: DiffusionContext[StereoConfig]
    training: Training
    found: Tensor
    reached: int = 0
    resumed: bytes | None = None
    history: list[EpochRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        data = self.training.checkpoint.load() if self.training.checkpoint else None
        if data is None:
            return
        header, tensors = opened(data)
        require_run(header, self.training.fingerprint)
        start = StageCheckpoint.start_of(tensors)
        self.found = start.pop(_FOUND).to(self.found)
        self.context.denoiser.network.load_state_dict(start)
        self.reached, self.resumed = header["stage"], StageCheckpoint.loop_of(tensors)
        self.history = [EpochRecord(**record) for record in header["history"]]

    def erase(self, number: int) -> None:
        """Run erasing `number`, the last one from θ_o."""
        context, network = self.context, self.context.denoiser.network
        assert context.original is not None
        teacher, last = context.original, number == context.config.attack_rounds
        if last:
            network.load_state_dict(teacher.network.state_dict())
        else:
            teacher = teacher.of(copy.deepcopy(network).requires_grad_(False).eval())
        attacks = Attacks(context.sets.table, forgotten(context.sets), self.found)
        loss = partial(robust_loss, attacks) if last else partial(erasing_loss, attacks, number)
        own = replace(context, original=teacher, sets=replace(context.sets, table=attacks.extended()))
        before = len(self.history)

        def counted(record: EpochRecord) -> EpochRecord:
            return record.model_copy(update={"epoch": before + record.epoch})

        def told(record: EpochRecord) -> None:
            if self.training.on_epoch:
                self.training.on_epoch(counted(record))

        of = f"{self.training.fingerprint} stage {number}"
        records = self.training.loop(own, loss, self._checkpoint(number), of, told)
        self.history += map(counted, records)

    def attack(self, number: int) -> None:
        """Attack the model of erasing `number`."""
        generator = epoch_generator(self.context.config.seed, -number - 1)
        new = invert(self.context.denoiser, self.context.sets, self.context.config, generator)
        self.training.group.require_same(
            "embedding of an attack", sha256_bytes(new.cpu().contiguous().numpy().tobytes())
        )
        self.found = torch.cat([self.found, new[None]])

    def _checkpoint(self, number: int) -> CheckpointStore | None:
        if self.training.checkpoint is None:
            return None
        kept = [record.model_dump() for record in self.history]
        header = {"fingerprint": self.training.fingerprint, "stage": number, "history": kept}
        state = self.context.denoiser.network.state_dict()
        begun = {name: value.detach().clone() for name, value in state.items()}
        resumed = self.resumed if number == self.reached else None
        return StageCheckpoint(self.training.checkpoint, header, {**begun, _FOUND: self.found}, resumed)


def stages(context: DiffusionContext[StereoConfig], training: Training) -> list[EpochRecord]:
    """Run both stages on the context's network in place, and return one record per epoch of all erasings.

    `UsageError` if the conditions are not texts, or there is no null condition; `ConflictError` if the checkpoint
    belongs to another run.
    """
    table, rounds = context.sets.table, context.config.attack_rounds
    table.own_tokens()  # refuses classes before any work
    text = table.rows[_TEXT]
    run = _Run(context, training, text.new_empty((0, len(forgotten(context.sets)), *text.shape[1:])))
    for number in range(run.reached, rounds + 1):
        run.erase(number)
        if number < rounds:
            run.attack(number)
    return run.history


def passes(config: StereoConfig) -> float:
    """Return the expected cost in passes: K runs of ESD, K attacks, and an erasing with K + 1 predictions more."""
    rounds, examples = config.attack_rounds, config.steps * config.batch_size
    attacks = rounds * config.attack_steps * config.batch_size
    repeated = (rounds * examples + attacks) / 3 if config.gradient_checkpointing else 0
    erasings = (rounds + 1) * erased_stable_diffusion.passes(config)
    return erasings + examples * (rounds + 1) / 3 + attacks + repeated


METHOD = DiffusionMethod(
    stages=stages,
    config_type=StereoConfig,
    about="attacks an `esd` until its attacks are known, then erases them all from θ_o at once",
    source='Srivatsan et al., "STEREO", CVPR 2025',
    passes=passes,
    needs_original=True,
    needs="texts, a null condition",
    needs_retain=False,
    defaults={"selection": "xattn", "steps": 200, "batch_size": 8, "learning_rate": 1e-5},
)
