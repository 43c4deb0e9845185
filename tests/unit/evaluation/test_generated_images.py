"""Generated images are real digits here: what a sampler returns is known, and so is every figure."""

import base64
import io
import json
import weakref
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from salun_core.data import load_data
from salun_core.errors import DataError, ModelError, UsageError
from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import CurvePoint, Forgotten, Measured, RunFacts
from salun_core.evaluation.generated_images import (
    COLUMNS,
    LIMIT,
    NONE,
    ROWS,
    SEED_STRIDE,
    SIDE,
    Comparison,
    Evaluators,
    SamplingPlan,
    checked_images,
    evaluate_generated_images,
    grid_image,
    rows_shown,
    thumbnails,
)
from salun_core.evaluation.image_classifier import FEWEST_REAL, Calibration, ImageClassifier
from salun_core.evaluation.image_features import classifier_extractor, frechet_distance, kernel_distance
from salun_core.evaluation.nudity import NudityDetector
from salun_core.evaluation.statistics import wilson_interval
from salun_core.gate import decide, load_policy
from salun_core.models import load_model
from salun_core.saliency import SaliencyMask

MEASURED = Measured(before="a", after="b", dataset="c", split="d", forget_set="e")
FORGOTTEN = Forgotten(count=10, train_count=100, kinds=["class"], classes=[3])
NAMES = [f"digit {index}" for index in range(10)]
PLAN = SamplingPlan(
    rows=NAMES,
    forgotten=[3],
    labels=list(range(10)),
    neighbours=[5, 8],
    per_row=12,
    seed=7,
    sampler="DDIMScheduler",
    steps=20,
    guidance_scale=2.0,
)


@pytest.fixture(scope="module")
def classifier(digits_model):
    return ImageClassifier.of(load_model(digits_model))


@pytest.fixture(scope="module")
def digits(classifier):
    """Digits by class, uint8 [N, 3, 8, 8]."""
    found = load_data(classifier.card.data).images("train")
    return [found.images[found.labels == label].expand(-1, 3, -1, -1).contiguous() for label in range(10)]


@dataclass
class Digits:
    """A sampler whose row r is the digit `shown.get(r, r)`; the seed says which of them."""

    digits: list
    shown: dict
    size: int = 13
    asked: list = None

    def image(self, row, seed):
        of = self.digits[self.shown.get(row, row)]
        return of[seed % len(of)]

    def __call__(self, rows, seeds):
        self.asked = [*zip(rows, seeds, strict=True)]
        for at in range(0, len(rows), self.size):
            yield torch.stack([self.image(*pair) for pair in self.asked[at : at + self.size]])


@pytest.fixture(scope="module")
def samples(digits):
    return Digits(digits, {}), Digits(digits, {3: 1, 8: 9}, size=50)


@pytest.fixture(scope="module")
def networks():
    before, after = nn.Linear(4, 3), nn.Linear(4, 3)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        after.weight[0] += 1
    return before, after


@pytest.fixture(scope="module")
def evaluators(classifier, digits):
    kept = torch.cat([digits[label][-20:, :1] for label in range(10) if label != 3])
    return Evaluators(classifier=classifier, extractor=classifier_extractor(classifier), real=kept)


@pytest.fixture(scope="module")
def held_out(classifier):
    """Real digits that the image classifier was not trained on."""
    return load_data(classifier.card.data).images("test")


@pytest.fixture(scope="module")
def calibrated(evaluators, classifier, held_out):
    return replace(evaluators, calibration=Calibration.of(classifier, held_out.images, held_out.labels))


@pytest.fixture(scope="module")
def evidence(samples, networks, evaluators):
    reference = Digits(samples[0].digits, {3: 2})
    seen = Comparison(
        {"before": samples[0], "after": samples[1], "reference": reference},
        networks,
        PLAN,
        evaluators,
        measured={"UA_relearned": Metric(before=0.0, after=0.9, n=10)},
        resurgence=[CurvePoint(step=10, ua=0.95)],
    )
    return evaluate_generated_images(seen, MEASURED, FORGOTTEN, RunFacts(method="salun"))


def predictions(classifier, sample):
    """The predicted class of each image, one at a time: {row: [class]}."""
    found = {}
    for row in range(10):
        seeds = range(7 + row * 12, 7 + (row + 1) * 12)
        found[row] = [int(classifier.predict(sample.image(row, seed)[None])) for seed in seeds]
    return found


def share(found, rows, right):
    return np.mean([(predicted == row) == right for row in rows for predicted in found[row]])


def test_every_model_gets_the_same_rows_and_seeds(evidence, samples):
    assert samples[0].asked == samples[1].asked
    assert samples[0].asked == [(index // 12, 7 + index) for index in range(120)]
    assert evidence.generation.seed == 7
    assert evidence.generation.images == 120


def test_recognition_equals_a_count_over_images(evidence, classifier, samples):
    others = [row for row in range(10) if row != 3]
    for state, sample in zip(("before", "after"), samples, strict=True):
        found = predictions(classifier, sample)
        expected = {
            "UA": share(found, [3], False),
            "RA": share(found, others, True),
            "neighbours": share(found, [5, 8], True),
        }
        for name, value in expected.items():
            assert getattr(evidence.metrics[name], state) == pytest.approx(value), (name, state)
    assert evidence.metrics["UA"].before < 0.2 < 0.9 < evidence.metrics["UA"].after
    assert evidence.metrics["neighbours"].after < 0.6 < 0.8 < evidence.metrics["neighbours"].before
    assert {name: evidence.metrics[name].n for name in ("UA", "RA", "neighbours")} == {
        "UA": 12,
        "RA": 108,
        "neighbours": 24,
    }
    assert evidence.metrics["UA"].reference > 0.9
    ua = evidence.metrics["UA"]
    assert (ua.low, ua.high) == wilson_interval(ua.after, 12)


def test_rows_and_the_matrix_agree_with_the_shares(evidence, classifier, samples):
    after = predictions(classifier, samples[1])
    matrix = np.array(evidence.confusion)
    assert matrix.shape == (10, 10)
    assert [np.bincount(after[row], minlength=10).tolist() for row in range(10)] == matrix.tolist()
    for row in evidence.per_class:
        assert row.after == pytest.approx(matrix[row.class_id, row.class_id] / 12)
        assert (row.name, row.n) == (NAMES[row.class_id], 12)
    assert matrix[8, 9] > 6
    assert evidence.classes == classifier.classes


def test_distances_use_the_retained_rows(evidence, evaluators, samples):
    for state, sample in zip(("before", "after"), samples, strict=True):
        made = torch.stack([sample.image(row, seed) for row, seed in sample.asked if row != 3])
        for name, distance in (("FID", frechet_distance), ("KID", kernel_distance)):
            expected = distance(*(evaluators.extractor.features(images) for images in (evaluators.real, made)))
            assert getattr(evidence.metrics[name], state) == pytest.approx(expected, rel=1e-6)
    assert evidence.metrics["FID"].n == 108
    assert evidence.metrics["FID"].after > evidence.metrics["FID"].before > 0
    assert evidence.generation.extractor == evaluators.extractor.name
    assert evidence.generation.real_images == 180


def test_the_evidence_holds_how_the_images_were_made(evidence, classifier):
    made = evidence.generation
    assert (made.sampler, made.steps, made.guidance_scale) == ("DDIMScheduler", 20, 2.0)
    assert (made.judge, made.clip, made.detector, made.parts) == (classifier.digest, None, None, {})
    assert made.resurgence == [CurvePoint(step=10, ua=0.95)]
    assert evidence.metrics["UA_relearned"].after == 0.9
    assert not {"CLIP", "nudity"} & {*evidence.metrics}
    assert evidence.run.method == "salun"
    assert (evidence.integrity.weights, evidence.integrity.weights_changed) == (15, 4)
    text = json.dumps(evidence.model_dump(mode="json"), allow_nan=False)
    assert Evidence.model_validate_json(text) == evidence


def decoded(uri):
    head, data = uri.split(",", 1)
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def pixels_of(uri):
    return np.array(decoded(uri))


def test_the_grids_show_the_same_seeds(evidence, samples):
    (grid,) = evidence.generation.grids
    assert (grid.rows, grid.forgotten, grid.blurred) == (NAMES, [3], False)
    before, after = pixels_of(grid.before), pixels_of(grid.after)
    assert before.shape == after.shape == (10 * 10 - 2, 8 * 10 - 2, 3)
    for state, sample in ((before, samples[0]), (after, samples[1])):
        for row, column in ((0, 0), (3, 7), (9, 4)):
            tile = state[row * 10 : row * 10 + 8, column * 10 : column * 10 + 8]
            assert np.array_equal(tile, sample.image(row, 7 + row * 12 + column).permute(1, 2, 0).numpy())
    changed = [(before[row * 10 : row * 10 + 8] != after[row * 10 : row * 10 + 8]).any() for row in range(10)]
    assert [row for row in range(10) if changed[row]] == [3, 8]


def run(samples, networks, plan=PLAN, evaluators=None, **options):
    models = dict(zip(("before", "after"), samples, strict=True))
    seen = Comparison(models, networks, plan, evaluators or Evaluators(), **options)
    return evaluate_generated_images(seen, MEASURED, FORGOTTEN)


def uniform(image):
    return torch.randint_like(image, 256)


def normal(image):
    return (torch.randn(image.shape) * 60 + 128).clamp(0, 255).to(torch.uint8)


def grey(image):
    return torch.full_like(image, 127)


@dataclass
class Spoiled(Digits):
    """Digits, but what row 3 shows is made by a function."""

    spoil: object = None

    def image(self, row, seed):
        image = super().image(row, seed)
        torch.manual_seed(seed)
        return self.spoil(image) if row == 3 else image


MANY = replace(PLAN, per_row=48)


@pytest.mark.parametrize("spoil", [uniform, normal, grey])
def test_noise_does_not_count_as_forgotten(samples, digits, networks, calibrated, spoil):
    """UA and all rules on the other classes hold; only the images themselves show what happened."""
    after = Spoiled(digits, {}, spoil=spoil)
    found = run((samples[0], after), networks, MANY, calibrated, hybrid=after)
    assert found.metrics["UA"].after > 0.95
    for policy in ("ddpm", "stable-diffusion"):
        decision = decide(found, load_policy(policy))
        assert [verdict.metric for verdict in decision.verdicts if not verdict.passed] == ["none_of_these"]
    none = found.metrics["none_of_these"]
    # Nine tenths of any noise are rejected. Fewer than 31 of 48, the least whose interval begins above a half, would
    # then be rejected once in two million runs.
    assert found.generation.recognition.noise_rejected >= 0.9
    assert none.before < 0.2 < 0.5 < none.low <= none.after
    assert none.n == 48
    assert found.generation.recognition.became[0].name == NONE


class Brightness(nn.Module):
    """Its last features are the brightness of four quarters, by which noise cannot be told; its first stage can."""

    def __init__(self):
        super().__init__()
        self.stage, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, images):
        return self.fc(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)) + 0 * self.stage(images).sum()


def test_all_stages_tell_noise_where_the_last_features_do_not(classifier, digits, held_out):
    torch.manual_seed(0)
    blind = replace(classifier, model=Brightness().eval())
    noise = torch.stack([spoil(digits[0][0]) for spoil in (uniform, normal, grey) for _ in range(48)])
    found = Calibration.of(blind, held_out.images, held_out.labels)
    assert found.noise >= 0.9
    assert found.shows_none(noise).float().mean() >= 0.9
    assert 0.04 < found.rejected.value <= 0.06
    assert found.shows_none(torch.cat([images[:20] for images in digits])).float().mean() < 0.2

    blind.model.stage = nn.Identity()  # without a stage of its own it has the last features alone, and evidence says so
    assert Calibration.of(blind, held_out.images, held_out.labels).noise < 0.5


def test_another_digit_instead_counts_as_forgotten(samples, digits, networks, calibrated):
    after = Digits(digits, {3: 1})
    found = run((samples[0], after), networks, MANY, calibrated, hybrid=after)
    for policy in ("ddpm", "stable-diffusion"):
        decision = decide(found, load_policy(policy))
        assert decision.passed, decision.summary


def test_what_the_image_classifier_rests_on_is_in_the_evidence(
    samples, digits, networks, calibrated, classifier, held_out
):
    after = Digits(digits, {3: 1})
    found = run((samples[0], after), networks, MANY, calibrated)
    facts = found.generation.recognition
    right = (classifier.predict(held_out.images) == held_out.labels).float().mean()
    assert (facts.real.value, facts.real.n) == (pytest.approx(float(right)), len(held_out))
    assert (facts.real.low, facts.real.high) == wilson_interval(facts.real.value, facts.real.n)
    assert 0.04 < facts.real_rejected.value <= 0.06
    assert (facts.original.n, facts.original_forgotten.n) == (480, 48)
    assert facts.original_forgotten.value == pytest.approx(1 - found.metrics["UA"].before)
    became = {item.name: (item.before, item.after) for item in facts.became}
    names = [*classifier.classes]
    assert sum(after for _, after in became.values()) == sum(before for before, _ in became.values()) == 48
    assert became[names[1]][1] > 40 > 5 > became[names[1]][0]
    assert became[names[3]][0] > 40 > 5 > became[names[3]][1]
    assert became.get(NONE, (0, 0))[1] == round(48 * found.metrics["none_of_these"].after)


def test_three_batches_of_seeds_are_drawn_where_there_are_enough_images(samples, digits, networks, calibrated):
    after = Digits(digits, {3: 1, 8: 9})
    found = run((samples[0], after), networks, MANY, calibrated)
    seeds = np.array([seed for _, seed in after.asked]).reshape(10, 3, 16)
    assert len(np.unique(seeds)) == 480
    first = [7, 7 + SEED_STRIDE, 7 + 2 * SEED_STRIDE]
    assert (seeds - np.array(first)[:, None] < 480).all()
    batches = found.generation.recognition.seeds
    assert [(item.seed, item.n) for item in batches] == [(seed, 16) for seed in first]
    assert np.mean([item.after for item in batches]) == pytest.approx(found.metrics["UA"].after)
    few = run(samples, networks, PLAN, calibrated).generation.recognition.seeds
    assert [(item.seed, item.n) for item in few] == [(7, 12)]


def test_a_class_that_comes_back_with_its_old_embedding_is_not_forgotten(samples, digits, networks, calibrated):
    after, hybrid = Digits(digits, {3: 1}), Digits(digits, {})
    found = run((samples[0], after), networks, MANY, calibrated, hybrid=hybrid)
    decision = decide(found, load_policy("ddpm"))
    assert [verdict.metric for verdict in decision.verdicts if not verdict.passed] == ["restored"]
    restored = found.metrics["restored"]
    assert restored.before == restored.after > 0.85  # the hybrid draws what the original drew
    assert restored.before <= 1 - found.metrics["UA"].before  # real digits beyond the bound do not count
    assert restored.n == 48
    assert [row for row, _ in hybrid.asked] == [3] * 48
    noise = run((samples[0], after), networks, MANY, calibrated, hybrid=Spoiled(digits, {}, spoil=uniform))
    assert noise.metrics["restored"].after < 0.2
    assert "restored" not in run((samples[0], after), networks, MANY, calibrated).metrics


def test_images_of_one_batch_of_seeds_count_for_what_they_are_worth(samples, digits, networks, calibrated):
    """A model that forgot under two batches of seeds of three: 32 of 48, as three images and not as 48."""

    @dataclass
    class BySeed(Digits):
        def image(self, row, seed):
            return self.digits[1 if row == 3 and seed < 2 * SEED_STRIDE else row][seed % 100]

    found = run((samples[0], BySeed(digits, {})), networks, MANY, calibrated)
    ua, facts = found.metrics["UA"], found.generation.recognition
    assert ua.after == pytest.approx(2 / 3, abs=0.05)
    assert facts.independent < 5 < ua.n == 48
    assert (ua.low, ua.high) == pytest.approx(wilson_interval(ua.after, facts.independent))
    alike = run((samples[0], Digits(digits, {3: 1})), networks, MANY, calibrated)
    assert alike.generation.recognition.independent > 24
    ra = run((samples[0], BySeed(digits, {3: 1})), networks, MANY, calibrated).metrics["RA"]
    assert ra.n == 432


def test_a_calibration_needs_real_images_and_evidence_without_one_has_no_rate(
    samples, networks, evaluators, classifier, held_out
):
    few = FEWEST_REAL - 1
    assert Calibration.of(classifier, held_out.images[:few], held_out.labels[:few]) is None
    found = run(samples, networks, evaluators=evaluators)
    assert "none_of_these" not in found.metrics
    assert found.generation.recognition.real is None
    assert found.generation.recognition.original.n == 120


def test_metrics_without_an_evaluator_are_absent(samples, networks, evaluators):
    plain = run(samples, networks)
    assert plain.metrics == {}
    assert (plain.per_class, plain.confusion, plain.classes) == ([], [], NAMES)
    assert (plain.generation.judge, plain.generation.extractor, plain.generation.real_images) == (None, None, 0)
    unreal = run(samples, networks, evaluators=replace(evaluators, real=None))
    assert {*unreal.metrics} == {"UA", "RA", "neighbours"}
    assert unreal.generation.extractor is None
    few = run(samples, networks, evaluators=replace(evaluators, real=evaluators.real[:1]))
    assert "FID" not in few.metrics
    everything = run(samples, networks, replace(PLAN, forgotten=range(10), neighbours=()), evaluators)
    assert {*everything.metrics} == {"UA"}


def test_without_real_images_the_original_is_compared_with_its_own(samples, digits, networks, evaluators):
    plan = replace(PLAN, distance_rows=[0, 8], clip_rows=[1])
    prompts = []
    without = replace(evaluators, real=None, clip=Loudness(prompts))
    found = run((Digits(digits, {}), Digits(digits, {3: 1, 8: 9})), networks, plan, without)
    fid, made = found.metrics["FID"], found.generation
    assert (fid.n, made.real_images, made.original_images) == (24, 0, 24)
    assert 0 < fid.before < fid.after  # the original differs from itself by its seeds only
    features = evaluators.extractor.features
    rows = [(row, 7 + row * 12 + index) for row in (0, 8) for index in range(12)]
    other = torch.stack([samples[0].image(row, seed + 3 * SEED_STRIDE) for row, seed in rows])
    own = torch.stack([samples[0].image(row, seed) for row, seed in rows])
    assert fid.before == pytest.approx(frechet_distance(features(other), features(own)), rel=1e-6)
    assert {*prompts} == {NAMES[1]}
    assert found.metrics["CLIP"].n == 12


def test_rows_without_a_label_have_no_accuracy(samples, networks, evaluators):
    labels = [None if row in (3, 4) else row for row in range(10)]
    found = run(samples, networks, replace(PLAN, labels=labels), evaluators)
    assert "UA" not in found.metrics
    assert found.metrics["RA"].n == 96
    assert [row.class_id for row in found.per_class] == [0, 1, 2, 5, 6, 7, 8, 9]
    assert sum(map(sum, found.confusion)) == 96


def test_weights_outside_the_mask_are_counted(samples, networks):
    mask = SaliencyMask.from_scores({"weight": torch.zeros(3, 4), "bias": torch.ones(3)}, 0.2)
    assert run(samples, networks, mask=mask).integrity.frozen_changed == 4


def test_faces_stand_in_for_nudity(networks, samples):
    pytest.importorskip("nudenet", reason="the extra `diffusion` is not installed")
    path = f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"
    face = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)

    def before(rows, seeds):
        for row in rows:
            yield (face if row == 0 else torch.zeros_like(face))[None]

    def after(rows, seeds):
        yield torch.zeros(len(rows), *face.shape, dtype=torch.uint8)

    plan = SamplingPlan(
        ["a portrait", "a sheet"], forgotten=[0], labels=[None, None], per_row=3, blur=True, title="prompts"
    )
    detector = NudityDetector.load(("FACE_FEMALE", "FACE_MALE"))
    found = run((before, after), networks, plan, Evaluators(detector=detector))
    nudity = found.metrics["nudity"]
    assert (nudity.before, nudity.after, nudity.n) == (1.0, 0.0, 3)  # the kept rows are not looked at
    parts = {part: (count.before, count.after) for part, count in found.generation.parts.items()}
    assert parts == {"FACE_FEMALE": (3, 0)}
    assert found.generation.detector == detector.digest
    (grid,) = found.generation.grids
    assert (grid.title, grid.blurred) == ("prompts", True)
    assert pixels_of(grid.before).shape == (96 * 2 + 2, 82 * 3 + 4, 3)


@dataclass(frozen=True)
class Loudness:
    """Stands where a CLIP model does: scores an image by its mean, if the prompt is its row's."""

    prompts: list
    digest: str = "clip"

    def scores(self, images, prompts):
        self.prompts.extend(prompts)
        return images.double().mean(dim=(1, 2, 3)) / 2.55


def test_clip_scores_the_retained_rows_with_their_names(samples, networks):
    prompts = []
    found = run(samples, networks, evaluators=Evaluators(clip=Loudness(prompts)))
    kept = [NAMES[row] for row, _ in samples[0].asked if row != 3]
    assert prompts == kept * 2
    images = torch.stack([samples[0].image(row, seed) for row, seed in samples[0].asked if row != 3])
    assert found.metrics["CLIP"].before == pytest.approx(float(images.double().mean()) / 2.55)
    assert found.metrics["CLIP"].n == 108
    assert found.generation.clip == "clip"


@pytest.mark.slow
def test_images_are_freed_batch_after_batch(digits, networks, evaluators):
    alive, most = weakref.WeakSet(), []

    def stream(rows, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            image = digits[row][seed % len(digits[row])][None].clone()
            alive.add(image)
            most.append(len(alive))
            yield image

    run((stream, stream), networks, replace(PLAN, per_row=30), evaluators)
    assert len(most) == 600
    assert max(most) <= 3


def test_a_grid_of_many_rows_is_cut_but_shows_the_forgotten_ones(digits, networks):
    def stream(rows, seeds):
        yield torch.stack([digits[row % 10][0] for row in rows])

    names = [f"prompt {row}" for row in range(100)]
    plan = SamplingPlan(names, forgotten=[99], labels=[None] * 100, neighbours=[98], per_row=2)
    (grid,) = run((stream, stream), networks, plan).generation.grids
    assert len(grid.rows) == ROWS
    assert [grid.rows[position] for position in grid.forgotten] == ["prompt 99"]
    assert "prompt 98" in grid.rows
    pixels = pixels_of(grid.after)
    assert np.array_equal(pixels[-8:, :8], digits[9][0].permute(1, 2, 0).numpy())


def test_batches_of_images_that_are_not_shown_are_skipped(networks):
    """The images after the eighth of a row lie in batches of their own."""

    def stream(rows, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            yield torch.full((1, 3, 128, 128), 10 * row + seed, dtype=torch.uint8)

    plan = SamplingPlan(["a", "b"], forgotten=[1], labels=[None, None], per_row=10)
    (grid,) = run((stream, stream), networks, plan).generation.grids
    pixels = pixels_of(grid.before)
    assert pixels.shape == (96 * 2 + 2, 98 * 8 - 2, 3)
    assert [pixels[at, 98 * 7, 0] for at in (0, 98)] == [7, 10 + 17]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [], "labels": []}, "no rows"),
        ({"per_row": 0}, "no rows or no images"),
        ({"labels": [1]}, "1 labels for 10 rows"),
        ({"forgotten": []}, "no row to forget"),
        ({"forgotten": [10]}, "does not exist"),
        ({"neighbours": [-1]}, "does not exist"),
        ({"neighbours": [3]}, "both forgotten and a neighbour"),
        ({"labels": [*range(9), 10]}, "not a class of the image classifier"),
    ],
)
def test_invalid_plans_are_refused(samples, networks, evaluators, changes, message):
    with pytest.raises(UsageError, match=message):
        run(samples, networks, replace(PLAN, **changes), evaluators)


class Changing:
    """Features of as many numbers as there are images in the batch."""

    name = "changing"

    def features(self, images):
        return torch.zeros(len(images), len(images))


def test_other_faults_are_refused(samples, networks, evaluators):
    def short(rows, seeds):
        yield torch.zeros(5, 3, 8, 8, dtype=torch.uint8)

    with pytest.raises(ModelError, match="model after generated other images: 5 instead of 120"):
        run((samples[0], short), networks)
    with pytest.raises(ModelError, match="the two models differ"):
        run(samples, (networks[0], nn.Linear(2, 2)))
    for name in ("UA", "FID"):
        with pytest.raises(UsageError, match=f"metric {name} cannot be given"):
            run(samples, networks, measured={name: Metric(before=0, after=1, n=1)})
    with pytest.raises(ModelError, match="two sizes"):
        run(samples, networks, evaluators=replace(evaluators, extractor=Changing()))
    with pytest.raises(DataError, match="not a batch of images"):
        run(samples, networks, evaluators=replace(evaluators, real=evaluators.real.float()))


def batch(count=2, **changes):
    return torch.zeros(count, changes.get("channels", 3), changes.get("side", 4), 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([batch()], "2 instead of 4"),
        ([], "0 instead of 4"),
        ([batch(), batch(), batch(1)], "at least 5"),
        ([batch().float() / 0], "not numbers"),
        ([batch().float()], "float32"),
        ([batch(channels=1), batch(channels=1)], "not uint8"),
        ([batch(), batch(side=5)], "one size"),
    ],
)
def test_other_images_than_requested_are_refused(batches, message):
    with pytest.raises(ModelError, match=message) as caught:
        list(checked_images(iter(batches), 4, "after"))
    assert "model after" in str(caught.value)


def test_an_endless_sampler_is_stopped():
    def endless():
        while True:
            yield batch()

    with pytest.raises(ModelError, match="at least"):
        list(checked_images(endless(), 4, "before"))


def noise(count, height=10, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_a_small_grid_is_lossless_and_row_after_row():
    images = noise(6, 10, 12)
    image = decoded(grid_image(images, 3))
    assert (image.format, image.size) == ("PNG", (3 * 12 + 2 * 2, 2 * 10 + 2))
    pixels = np.array(image)
    for index in range(6):
        row, column = divmod(index, 3)
        tile = pixels[row * 12 : row * 12 + 10, column * 14 : column * 14 + 12]
        assert np.array_equal(tile, images[index].permute(1, 2, 0).numpy())


def test_large_images_become_thumbnails():
    images = noise(2, 300, 200)
    assert thumbnails(images).shape == (2, 3, SIDE, 64)
    assert decoded(grid_image(images, 2)).size == (64 * 2 + 2, SIDE)
    assert thumbnails(images[:0]).shape == (0, 3, SIDE, 64)
    small = noise(2)
    assert torch.equal(thumbnails(small), small)
    flat = torch.full((1, 3, 200, 200), 77, dtype=torch.uint8)
    assert thumbnails(flat).eq(77).all()


def test_a_grid_that_would_be_too_long_as_png_is_a_jpeg():
    smooth = torch.linspace(0, 255, 96).view(1, 1, 1, 96).expand(24, 3, 96, 96)
    some = (smooth + noise(24, 96, 96) * 0.05).clamp(0, 255).to(torch.uint8)
    uri = grid_image(some, 8)
    image = decoded(uri)
    assert image.format == "JPEG"
    assert image.size == (8 * 96 + 14, 3 * 96 + 4)
    assert len(uri) <= LIMIT


@pytest.mark.slow
def test_the_largest_grid_of_noise_stays_below_the_limit():
    uri = grid_image(noise(ROWS * COLUMNS, 96, 96), COLUMNS)
    assert len(uri) <= LIMIT
    assert len(uri) > LIMIT / 4
    assert min(decoded(uri).size) > 100
    with pytest.raises(DataError, match="too large for a report"):
        grid_image(noise(8000, 8, 8), 8)


def test_blurred_images_lose_their_detail_and_do_not_mix():
    black_white = torch.cat([torch.zeros(1, 3, 48, 48), torch.full((1, 3, 48, 48), 255)]).to(torch.uint8)
    pixels = np.array(decoded(grid_image(black_white, 2, blur=True)))
    assert pixels[:, :48].max() == 0
    assert pixels[:, 50:].min() == 255
    checks = ((torch.arange(48) // 6) % 2 * 255).to(torch.uint8).view(1, 1, 1, 48).expand(1, 3, 48, 48)
    sharp, blurred = (np.array(decoded(grid_image(checks, 1, blur=blur)))[:, 12:-12].std() for blur in (False, True))
    assert blurred < sharp / 10


@pytest.mark.parametrize(
    ("images", "columns"),
    [(noise(6), 4), (noise(0), 1), (noise(2), 0), (noise(2).float(), 1), (noise(2)[:, :1], 1), (noise(2)[0], 1)],
)
def test_images_that_do_not_fill_a_grid_are_refused(images, columns):
    with pytest.raises(DataError, match="images"):
        grid_image(images, columns)


def test_the_forgotten_rows_are_always_shown():
    assert rows_shown([3], [5], 10) == list(range(10))
    many = rows_shown([190, 7], [150], 200)
    assert len(many) == ROWS
    assert {7, 150, 190} <= set(many)
    assert many == sorted(many)
