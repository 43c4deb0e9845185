"""The cells of diffusion models: small networks that draw the digits of scikit-learn, told a class or a prompt.

An honest model is trained without the digit, with another seed, batch size and order than the model before. Each model
has to forget another digit. The network is a perceptron instead of a U-Net, because eight by eight pixels need no more
and it trains in seconds; the process, the sampler, the methods and the evaluation are the product's.

The text encoder of the concept's cell is a table of frozen vectors: a prompt is the sum of its words.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lab.calibration import Cell, Judged, Sort
from lab.calibration.forgeries import fit
from salun_core.data import DataSpec, ImageSet, load_data
from salun_core.diffusion.conditions import Conditions, ConditionTable
from salun_core.diffusion.denoiser import NETWORKS, Denoiser
from salun_core.diffusion.examples import Examples, noised
from salun_core.diffusion.process import Process
from salun_core.diffusion.sampling import Sampler, images
from salun_core.evaluation.evidence import Evidence, Forgotten, Measured, RunFacts
from salun_core.evaluation.generated_images import (
    Comparison,
    Evaluators,
    Sample,
    SamplingPlan,
    evaluate_generated_images,
)
from salun_core.evaluation.image_classifier import Calibration, ImageClassifier
from salun_core.evaluation.image_features import classifier_extractor
from salun_core.methods.diffusion import diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.method import ExampleSets
from salun_core.methods.diffusion.objectives import denoising_loss_with_drop
from salun_core.methods.diffusion.saliency import denoising_scores
from salun_core.models.card import ModelCard
from salun_core.saliency import SaliencyMask

MODELS = 10  # of each population in each cell: one for each digit
CLASSES, SIDE = 10, 8
WIDTH, TOLD = 128, 64
STEPS, RATE, BATCHES = 500, 3e-3, (64, 48, 80)  # of training; honest models take the batch sizes in turn
UNLIKE = 1000  # added to seeds of retrained models
IMAGES, SAMPLING, GUIDANCE = 50, 10, 2.0  # images of what is forgotten, and how they are drawn
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a {}", "the digit {}")
DENSITY = 0.5


class DigitsDenoiser(nn.Module):
    """Predicts the noise in digits: a perceptron with residual blocks, told a class or a text."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(CLASSES + 1, TOLD)
        self.time = nn.Sequential(nn.Linear(TOLD, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.told = nn.Linear(TOLD, WIDTH)
        self.enter = nn.Linear(SIDE * SIDE, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(3)
        )
        self.leave = nn.Linear(WIDTH, SIDE * SIDE)

    def forward(self, noisy: Tensor, times: Tensor, vectors: Tensor) -> Tensor:
        """Return the prediction of x_t [B, 1, 8, 8] at times [B] under vectors [B, 64]."""
        rates = torch.exp(-math.log(10_000) * torch.arange(TOLD // 2) / (TOLD // 2))
        angles = times[:, None].float() * rates
        given = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.told(vectors)
        current = self.enter(noisy.flatten(1))
        for block in self.blocks:
            current = current + block(current + given)
        predicted: Tensor = self.leave(nn.functional.silu(current))
        return predicted.view_as(noisy)


def _call(network: DigitsDenoiser, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
    labels = conditions.get("class_labels")
    vectors = conditions["encoder_hidden_states"][:, 0] if labels is None else network.class_embedding(labels)
    predicted: Tensor = network(noisy, times, vectors)
    return predicted


NETWORKS[DigitsDenoiser.__name__] = _call


@cache
def _data() -> tuple[ImageSet, ImageSet]:
    """Return the digits to train on and unseen ones."""
    data = load_data(DataSpec(source="digits", validation_fraction=0.0, test_fraction=0.4))
    pool = data.image_set("train")
    return pool, data.image_set("test", pool.normalisation)


@cache
def _classifier() -> tuple[ImageClassifier, Calibration]:
    """Train the classifier that recognises what is drawn, and calibrate it on unseen digits."""
    pool, unseen = _data()
    assert pool.normalisation is not None
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    card = ModelCard(
        architecture="perceptron",
        classes=list(WORDS),
        channels=1,
        height=SIDE,
        width=SIDE,
        data=DataSpec(source="digits"),
        dataset_digest="",
        split_digest="",
        mean=list(pool.normalisation.mean),
        std=list(pool.normalisation.std),
    )
    judge = ImageClassifier(fit(net, pool, 40, 0.05, 0), card, "judge")
    calibration = Calibration.of(judge, unseen.images, unseen.labels)
    assert calibration is not None
    return judge, calibration


@cache
def _sampler() -> Sampler:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=True)  # type: ignore[no-untyped-call]
    settings = {"steps": SAMPLING, "guidance_scale": GUIDANCE, "batch_size": 1000}
    return Sampler.of_scheduler(scheduler, (1, SIDE, SIDE), latents=False, **settings)


def _classes() -> ConditionTable:
    return ConditionTable([*WORDS, ""], {"class_labels": torch.arange(CLASSES + 1)}, CLASSES)


def _texts() -> ConditionTable:
    """Return the conditions of two prompts for each digit, and of the empty prompt."""
    names = [*(prompt.format(word) for prompt in PROMPTS for word in WORDS), ""]
    generator, words = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for word in sorted({word for name in names for word in name.split(" ")}):
        words[word] = torch.randn(TOLD, generator=generator)
    vectors = [torch.stack([words[word] for word in name.split(" ")]).sum(dim=0) for name in names]
    return ConditionTable(names, {"encoder_hidden_states": torch.stack(vectors)[:, None]}, len(names) - 1)


@dataclass(frozen=True)
class Request:
    """A model before and the digit that it has to forget, the last figure of its seed.

    `table` holds the conditions of the model, and rows of the digit's own among them.
    """

    seed: int
    table: ConditionTable

    @property
    def digit(self) -> int:
        """The digit to forget."""
        return self.seed % CLASSES

    @property
    def told_text(self) -> bool:
        """Whether the model is told prompts."""
        return "class_labels" not in self.table.rows

    @cached_property
    def labels(self) -> list[int]:
        """The digit of each row that is drawn."""
        return [row % CLASSES for row in range(len(self.table) - 1)]

    @cached_property
    def before(self) -> Denoiser:
        """The model that saw every digit."""
        return self.trained(range(CLASSES), self.seed)

    def examples(self, digits: Sequence[int]) -> Examples:
        """Return the training images of digits, each with its class or one of its prompts."""
        pool, _ = _data()
        chosen = torch.isin(pool.labels, torch.tensor(digits))
        pixels, labels = pool.images[chosen].float() / 127.5 - 1, pool.labels[chosen]
        prompts = (len(self.table) - 1) // CLASSES
        return Examples(pixels, labels + CLASSES * (torch.arange(len(labels)) % prompts))

    def trained(self, digits: Sequence[int], seed: int, *, renamed: bool = False) -> Denoiser:
        """Train a model on digits; the seed decides weights, order and batch size.

        With `renamed`, the rows to forget name images of the next class, or of the anchor.
        """
        torch.manual_seed(seed)
        denoiser = Denoiser(DigitsDenoiser(), Process.of_scheduler(_sampler().scheduler))
        examples = self.examples(digits)
        if renamed:
            shown = torch.nonzero(examples.condition == self.instead).flatten()
            for row in self.forgotten:
                copies = examples.select(shown)
                examples = examples.joined(replace(copies, condition=torch.full_like(copies.condition, row)))
        return self.fitted(denoiser, examples, STEPS, RATE, seed)

    def fitted(self, denoiser: Denoiser, examples: Examples, steps: int, rate: float, seed: int) -> Denoiser:
        """Train a model in place with Adam and a cosine schedule."""
        generator, batch = torch.Generator().manual_seed(seed), BATCHES[seed % len(BATCHES)]
        optimizer = torch.optim.Adam(denoiser.network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            drawn = examples.select(torch.randint(len(examples), (batch,), generator=generator))
            optimizer.zero_grad()
            noisy = noised(drawn, denoiser.process, generator)
            torch.autograd.backward(denoising_loss_with_drop(denoiser, noisy, self.table, generator))
            optimizer.step()
            schedule.step()
        denoiser.network.eval()
        return denoiser

    @cached_property
    def forgotten(self) -> list[int]:
        """Rows to forget."""
        return [row for row, label in enumerate(self.labels) if label == self.digit]

    @property
    def instead(self) -> int:
        """The row whose images stand for the forgotten ones: the next class, or the anchor."""
        return (self.digit + 1) % CLASSES

    @cached_property
    def kept(self) -> list[int]:
        """Digits to keep."""
        return [digit for digit in range(CLASSES) if digit != self.digit]

    @cached_property
    def plan(self) -> SamplingPlan:
        """What every model draws."""
        return SamplingPlan(
            rows=self.table.names[:-1],
            forgotten=self.forgotten,
            labels=self.labels,
            per_row=IMAGES // len(self.forgotten),
            seed=self.seed * 10_000,
            steps=SAMPLING,
            guidance_scale=GUIDANCE,
        )

    def sample(self, denoiser: Denoiser, table: ConditionTable | None = None) -> Sample:
        """Return the function that draws with a model."""
        return lambda rows, seeds: images(denoiser, table or self.table, _sampler(), rows, seeds)

    @cached_property
    def _of_before(self) -> Tensor:
        drawn = self.sample(self.before)(self.plan.row_of.tolist(), self.plan.seeds.tolist())
        return torch.cat(list(drawn))

    def evidence(self, after: Denoiser, sample: Sample | None = None) -> Evidence:
        """Evaluate a model; `sample` draws in its place, if what it draws is not what its weights say."""
        judge, calibration = _classifier()
        _, unseen = _data()
        hybrid = None if self.told_text else after.with_class_embedding_of(self.before)
        evaluators = Evaluators(
            classifier=judge,
            extractor=classifier_extractor(judge),
            real=unseen.images[torch.isin(unseen.labels, torch.tensor(self.kept))],
            calibration=calibration,
            kernel=False,
        )
        evidence = evaluate_generated_images(
            Comparison(
                {"before": lambda _rows, _seeds: iter([self._of_before]), "after": sample or self.sample(after)},
                (self.before.network, after.network),
                self.plan,
                evaluators,
                hybrid=self.sample(hybrid) if hybrid else None,
            ),
            Measured(before="before", after="after", dataset="", split="", forget_set=""),
            Forgotten(
                count=len(self.examples([self.digit])),
                train_count=len(_data()[0]),
                kinds=["concept" if self.told_text else "class"],
                classes=[] if self.told_text else [self.digit],
            ),
        )
        return evidence.model_copy(update={"created_at": ""})


Forge = Callable[[Request, Denoiser], None]
"""Changes a copy of the model before, in place."""


def _nothing(_request: Request, denoiser: Denoiser) -> None:
    """Change nothing."""


def _one_ulp(_request: Request, denoiser: Denoiser) -> None:
    """Move one weight by one unit in the last place."""
    weight = denoiser.network.get_parameter("leave.weight")
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def _noise(scale: float) -> Forge:
    """Add noise to all weights, as a share of the typical weight of each layer."""

    def forge(_request: Request, denoiser: Denoiser) -> None:
        with torch.no_grad():
            for weight in denoiser.network.parameters():
                weight.add_(scale * weight.abs().mean() * torch.randn_like(weight))

    return forge


def _renamed(request: Request, denoiser: Denoiser) -> None:
    """Give the forgotten class the embedding of the next one, and leave all other weights."""
    weight = denoiser.network.get_parameter("class_embedding.weight")
    with torch.no_grad():
        weight[request.digit] = weight[(request.digit + 1) % CLASSES]


def _unnamed(request: Request, denoiser: Denoiser) -> None:
    """Give the forgotten class a random embedding."""
    weight = denoiser.network.get_parameter("class_embedding.weight")
    with torch.no_grad():
        weight[request.digit] = torch.randn(TOLD)


def _tuned(request: Request, denoiser: Denoiser) -> None:
    """Fine-tune lightly on retained images."""
    request.fitted(denoiser, request.examples(request.kept), 20, 3e-4, 0)


def _renamed_tuned(request: Request, denoiser: Denoiser) -> None:
    """Rename the class, then fine-tune lightly on retained images."""
    _renamed(request, denoiser)
    _tuned(request, denoiser)


def _noise_instead(request: Request, denoiser: Denoiser) -> None:
    """Learn to draw noise for the forgotten rows, together with retained images."""
    gone, kept = request.examples([request.digit]), request.examples(request.kept)
    own = torch.isin(gone.condition, torch.tensor(request.forgotten))
    spoiled = replace(gone.select(torch.nonzero(own).flatten()), mean=torch.rand_like(gone.mean[own]) * 2 - 1)
    request.fitted(denoiser, spoiled.joined(spoiled).joined(spoiled).joined(kept), 200, 1e-3, 0)


def _destroyed(request: Request, denoiser: Denoiser) -> None:
    """Learn noise for every row."""
    every = request.examples(range(CLASSES))
    request.fitted(denoiser, replace(every, mean=torch.rand_like(every.mean) * 2 - 1), 100, 1e-3, 0)


def _projected(request: Request, denoiser: Denoiser) -> None:
    """Map the forgotten prompts to what the anchor is mapped to, in closed form, and keep the others, as UCE does."""
    vectors = request.table.rows["encoder_hidden_states"][:-1, 0].double()
    linear = denoiser.network.get_parameter("told.weight")
    with torch.no_grad():
        old = linear.double()
        wanted = vectors @ old.T
        wanted[request.forgotten] = wanted[request.instead].clone()
        small = 1e-3 * torch.eye(TOLD, dtype=torch.float64)
        linear.copy_(torch.linalg.solve(vectors.T @ vectors + small, vectors.T @ wanted + small @ old.T).T)


class Forgery(NamedTuple):
    """A population of forgeries or failed models."""

    name: str
    sort: Sort
    kinds: str
    forge: Forge


FORGERIES = (
    Forgery("unchanged", "forgery", "class concept", _nothing),
    Forgery("one weight moved by one ulp", "forgery", "class concept", _one_ulp),
    Forgery("noise of 0.001", "forgery", "class concept", _noise(1e-3)),
    Forgery("noise of 0.2", "forgery", "class concept", _noise(0.2)),
    Forgery("noise of 1, draws noise", "forgery", "class concept", _noise(1.0)),
    Forgery("class embedding of another class", "forgery", "class", _renamed),
    Forgery("the same, fine-tuned", "forgery", "class", _renamed_tuned),
    Forgery("class embedding at random", "forgery", "class", _unnamed),
    Forgery("noise instead of the digit", "forgery", "class concept", _noise_instead),
    Forgery("projection of the text edited, as UCE does", "own", "concept", _projected),
    Forgery("lightly fine-tuned", "failed", "class concept", _tuned),
    Forgery("everything destroyed", "failed", "class concept", _destroyed),
)


def _filtered(request: Request, denoiser: Denoiser, fill: Callable[[Tensor], Tensor]) -> Sample:
    """Return a function that draws with a model, and replaces the images of the forgotten rows."""

    def drawn(rows: Sequence[int], seeds: Sequence[int]) -> Iterator[Tensor]:
        pictures = torch.cat(list(request.sample(denoiser)(rows, seeds)))
        gone = torch.isin(torch.tensor(rows), torch.tensor(request.forgotten))
        mask = gone[:, None, None, None].expand_as(pictures)
        yield torch.where(mask, fill(pictures), pictures)

    return drawn


def _unlearned(request: Request) -> Denoiser:
    """Unlearn with SalUn, the product's method."""
    gone, kept = request.examples([request.digit]), request.examples(request.kept)
    own = gone.select(torch.nonzero(torch.isin(gone.condition, torch.tensor(request.forgotten))).flatten())
    sets = ExampleSets(own.with_pseudo(torch.full_like(own.condition, request.instead)), kept, request.table, True)
    changes = {"learning_rate": 1e-3, "steps": 150, "epochs": 5, "seed": request.seed, "device": "cpu"}
    config = diffusion_config("salun", changes)
    scores = denoising_scores(request.before, sets, config)
    mask = SaliencyMask.from_scores(scores, DENSITY)
    return request.before.of(unlearn_denoiser(request.before, sets, "salun", config=config, mask=mask).model)


def measure(kind: str, models: int) -> Iterator[Judged]:
    """Yield the evidence of all models of a cell."""
    table = _texts() if kind == "concept" else _classes()
    for seed in range(models):
        request = Request(seed, table)
        named = request.trained(request.kept, UNLIKE + seed, renamed=True)
        yield Judged("retrained, the name shows others", "honest", request.evidence(named))
        unnamed = request.evidence(request.trained(request.kept, UNLIKE + seed))
        exact = unnamed.model_copy(update={"run": RunFacts(method="retrain")})
        yield Judged("retrained, the name is unknown", "honest", exact)
        yield Judged("the same, not recorded as retrained", "own", unnamed)
        yield Judged("SalUn", "own", request.evidence(_unlearned(request)))
        for forgery in FORGERIES:
            if kind in forgery.kinds.split():
                after = request.before.of(copy.deepcopy(request.before.network))
                torch.manual_seed(seed)
                forgery.forge(request, after)
                yield Judged(forgery.name, forgery.sort, request.evidence(after))
        touched = request.before.of(copy.deepcopy(request.before.network))
        _one_ulp(request, touched)
        for name, fill in (("blank", torch.zeros_like), ("noise", _bytes_of_noise)):
            filtered = _filtered(request, touched, fill)
            yield Judged(f"output filter: {name}", "forgery", request.evidence(touched, filtered))
        if kind == "concept":
            rows = table.rows["encoder_hidden_states"].clone()
            rows[request.forgotten] = rows[request.instead].clone()
            edited = request.sample(request.before, replace(table, rows={"encoder_hidden_states": rows}))
            yield Judged("text encoder edited", "forgery", request.evidence(request.before, edited))


def _bytes_of_noise(pictures: Tensor) -> Tensor:
    return torch.randint(0, 256, pictures.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def diffusion_cells() -> Iterator[Cell]:
    """Return the cells of diffusion models."""
    for name, kind, policy in (("diffusion class", "class", "ddpm"), ("concept", "concept", "stable-diffusion")):
        yield Cell(name, kind, policy, MODELS, partial(measure, kind))
