"""Evaluation of samples: they stand for the whole, keep small classes and are stated; the gate judges intervals."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence, Metric, Splits, evaluate_classifier
from salun_core.evaluation.classifier import with_populations
from salun_core.evaluation.evidence import Forgotten, Measured, SampleCount, Sampling, most_evaluated
from salun_core.evaluation.outputs import Outputs, correct_of, outputs_of
from salun_core.evaluation.statistics import effective_size, mean_interval, stratified, wilson_interval
from salun_core.gate import Policy, Rule, decide
from salun_core.models.checkpoint import model_digest

CLASSES = 4


def images(count, seed, noise=1.0):
    """Images of four classes of very different sizes, whose mean shows the class."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.6, 0.3, 0.09, 0.01])
    labels = torch.multinomial(shares, count, replacement=True, generator=generator)
    pixels = noise * torch.randn(count, 1, 2, 2, generator=generator)
    pixels[torch.arange(count), 0, labels // 2, labels % 2] += 2.0
    return ImageSet(pixels, labels)


def model(scale=1.0, bias=0.0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    with torch.no_grad():
        net[1].weight.copy_(scale * torch.eye(CLASSES))
        net[1].bias.copy_(torch.tensor([0.0, bias, 0.0, 0.0]))
    return net.eval()


SPLITS = Splits(images(60, 1), images(2400, 2), images(1600, 3))


def evidence(after, most, splits=SPLITS, forgotten=None):
    before = model()
    measured = Measured(before=model_digest(before), after=model_digest(after), dataset="d", split="s", forget_set="f")
    about = forgotten or Forgotten(count=60, train_count=2460, kinds=["samples"])
    return evaluate_classifier(before, after, splits.sampled(most, measured), measured, about)


@pytest.mark.parametrize("sizes", [[500, 300, 40, 3], [10, 10, 10], [1, 1, 900], [7, 5000, 2, 2, 2]])
@pytest.mark.parametrize("share", [0.11, 0.5, 0.97])
def test_a_sample_has_its_size_and_no_class_is_missing(sizes, share):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    size = max(len(sizes), int(share * len(labels)))
    places, weights = stratified(labels, size, 5)
    assert len(set(places.tolist())) == len(places) == size
    assert places.tolist() == sorted(places.tolist())
    drawn = np.bincount(labels[places], minlength=len(sizes))
    assert all(
        number >= min(whole, max(1, size // (2 * len(sizes)))) for number, whole in zip(drawn, sizes, strict=True)
    )
    assert (drawn <= sizes).all()
    # Weighted, each class has the share that it has among all images.
    found = np.bincount(labels[places], weights=weights, minlength=len(sizes)) / size
    assert found == pytest.approx(np.array(sizes) / len(labels))
    assert stratified(labels, size, 5)[0].tolist() == places.tolist()


def test_figures_of_a_sample_agree_with_those_of_all_images_within_their_intervals():
    whole, sampled = evidence(model(0.6, 0.3), None), evidence(model(0.6, 0.3), 400)
    assert sampled.sampling.splits == {"retain": SampleCount(n=400, of=2400), "test": SampleCount(n=400, of=1600)}
    for name in ("RA", "TA", "RA_loss", "TA_loss"):
        old, new = whole.metrics[name], sampled.metrics[name]
        assert new.low < old.after < new.high
        assert new.low < new.after < new.high
        assert new.before == pytest.approx(old.before, abs=0.1)
        assert old.population is None
    assert (sampled.metrics["RA"].n, sampled.metrics["RA"].population) == (400, 2400)
    assert sampled.metrics["UA"] == whole.metrics["UA"]  # D_f is whole
    assert sampled.metrics["UA"].population is sampled.metrics["attack_auc"].population is None
    assert sampled.metrics["attack_auc"].after == pytest.approx(whole.metrics["attack_auc"].after, abs=0.05)
    assert [row.n for row in sampled.per_class][3] == [row.n for row in whole.per_class][3]  # the small class is whole


def test_intervals_hold_the_whole_in_most_draws():
    found = outputs_of(model(0.5, 0.3), SPLITS.test)
    correct, losses, held = found.correct, found.losses, np.zeros(2)
    for seed in range(200):
        places, weights = stratified(found.labels, 400, seed)
        share = float(np.average(correct[places], weights=weights))
        ends = wilson_interval(share, effective_size(weights)), mean_interval(losses[places], weights)
        held += [low < value.mean() < high for (low, high), value in zip(ends, (correct, losses), strict=True)]
    assert (held >= 190).all()


def test_nobody_chooses_the_sample_and_whoever_has_the_digests_draws_it_again():
    one, again = (evidence(model(0.5), 400) for _ in range(2))
    assert one.sampling == again.sampling
    other = evidence(model(0.5001), 400)
    assert other.sampling.seed != one.sampling.seed
    assert 0 <= one.sampling.seed < 2**53


def test_evidence_without_a_sample_has_the_bytes_that_it_had():
    found = evidence(model(0.5), 2400)
    document = json.loads(json.dumps(found.model_dump(mode="json")))
    assert "sampling" not in document
    assert all("population" not in metric for metric in document["metrics"].values())
    assert Evidence.model_validate(document).digest == found.digest
    sampled = evidence(model(0.5), 400)
    assert Evidence.model_validate(json.loads(sampled.model_dump_json())).digest == sampled.digest
    changed = sampled.sampling.model_copy(update={"seed": 1})
    assert sampled.model_copy(update={"sampling": changed}).digest != sampled.digest


def test_more_classes_than_images_are_refused():
    with pytest.raises(UsageError, match=r"3 images cannot stand for the retain split: it has 4 classes"):
        evidence(model(0.5), 3)


@pytest.mark.parametrize(("text", "most"), [("20000", 20_000), ("all", None), ("0", None), (" 100 ", 100)])
def test_the_number_is_read(text, most):
    assert most_evaluated(text) == most


@pytest.mark.parametrize("text", ["99", "-5", "many", "1e5", ""])
def test_a_number_that_shows_nothing_is_refused(text):
    with pytest.raises(UsageError, match="evaluation_samples"):
        most_evaluated(text)


KEEPS = {"metric": "RA", "op": ">=", "relative_to": {"metric": "RA", "offset": -0.02}, "reason": "it must keep D_r"}


@cache
def whole_evidence():
    return evidence(model(0.5), None)


def judged(metric, **rule):
    """The verdict about one metric, by one rule."""
    found = whole_evidence()
    changed = found.model_copy(update={"metrics": {**found.metrics, "RA": metric}})
    policy = Policy(name="one", rules=[Rule.model_validate({**KEEPS, **rule})])
    return decide(changed, policy).verdicts[-1]


def metric(after, low, high, population=100_000):
    return Metric(before=0.9, after=after, n=1000, low=low, high=high, population=population)


def test_the_gate_judges_the_end_against_the_model():
    whole, sample = judged(metric(0.89, 0.87, 0.91, None)), judged(metric(0.89, 0.87, 0.91))
    assert whole.passed
    assert not sample.passed
    assert (sample.rule, sample.actual) == ("RA >= (low end)", 0.87)
    assert sample.refusal.cause == "too_few_samples"
    assert sample.refusal.next.startswith("measure more images, or all: --evaluation-samples N, or all")
    assert "n 1000 of 100000" in sample.refusal.figures
    assert judged(metric(0.89, 0.885, 0.895)).passed
    # A rule that gives the benefit of the doubt to a small test split does not give it to a sample.
    assert judged(metric(0.87, 0.85, 0.89, None), judge="high").passed
    assert not judged(metric(0.87, 0.85, 0.89), judge="high").passed
    # What no interval bounds is not known.
    unknown = judged(metric(0.89, None, None))
    assert not unknown.passed
    assert "measured on a sample and has no interval" in unknown.reason
    assert unknown.refusal.next.startswith("measure more images, or all")
    # An upper bound is judged by the upper end, and a distance by both.
    above = {"op": "<=", "relative_to": {"metric": "RA", "offset": 0.005}}
    assert judged(metric(0.9, 0.89, 0.904), **above).passed
    assert not judged(metric(0.9, 0.89, 0.91), **above).passed
    within = {"op": "within", "tolerance": 0.03, "relative_to": {"metric": "RA"}}
    assert judged(metric(0.88, 0.875, 0.885), **within).passed
    assert not judged(metric(0.88, 0.865, 0.895), **within).passed


def test_a_sample_gives_no_level_that_the_rule_does_not_ask_to_show():
    assert judged(metric(0.89, 0.885, 0.895)).shown is None


def test_a_threshold_from_a_sample_is_the_end_that_is_harder_to_meet():
    found = whole_evidence()
    seen = Metric(before=0.1, after=0.1, n=1000, low=0.08, high=0.12, population=5000)
    wrong = Metric(before=0.1, after=0.39, n=60, low=0.3, high=0.5)
    changed = found.model_copy(update={"metrics": {**found.metrics, "UA": wrong, "UA_unseen": seen}})
    rule = {"metric": "UA", "op": "<=", "relative_to": {"metric": "UA_unseen", "state": "after", "offset": 0.3}}
    policy = Policy(name="one", rules=[Rule.model_validate({**rule, "reason": "it must not reveal them"})])
    assert not decide(changed, policy).verdicts[-1].passed
    whole = changed.model_copy(
        update={"metrics": {**changed.metrics, "UA_unseen": seen.model_copy(update={"population": None})}}
    )
    assert decide(whole, policy).verdicts[-1].passed


def test_metrics_of_two_splits_and_of_plug_ins_count_as_sampled():
    sampling = Sampling(seed=1, splits={"test": SampleCount(n=50, of=500)})
    given = {"ToW": Metric.of({"after": 0.9}, 7), "pkg:own": Metric.of({"after": 1.0}, 7), "RA": Metric.of({}, 9)}
    found = with_populations(given, sampling)
    assert (found["ToW"].n, found["ToW"].population) == (50, 500)
    assert (found["pkg:own"].n, found["pkg:own"].population) == (7, 500)
    assert found["RA"].population is None
    assert with_populations(given, None) == given


def test_a_weighted_interval_counts_the_effective_number_of_values():
    values = np.random.default_rng(0).normal(size=400)
    assert mean_interval(values, np.ones(400)) == pytest.approx(mean_interval(values))
    weights = np.where(np.arange(400) < 200, 0.2, 1.8)
    low, high = mean_interval(values, weights)
    assert low < np.average(values, weights=weights) < high
    assert high - low > 1.2 * np.subtract(*mean_interval(values)[::-1])


def test_weights_follow_their_images():
    found = Outputs(np.eye(3), np.zeros(3), np.array([0, 1, 0]), weights=np.array([2.0, 0.5, 0.5]))
    assert found.accuracy == pytest.approx(2.5 / 3)
    assert found.where(np.array([1, 2])).accuracy == 0.5


def test_predictions_in_parts_are_those_of_one_pass(monkeypatch):
    monkeypatch.setattr("salun_core.evaluation.outputs._AT_ONCE", 1024)
    assert correct_of(model(), SPLITS.test).tolist() == outputs_of(model(), SPLITS.test).correct.tolist()
