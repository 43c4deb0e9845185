"""Metrics that are off by default, each against sums written out or values counted by hand."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from salun_core.data import ImageSet
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import ClassAccuracy, OptionalMetricFacts, TuningFacts
from salun_core.evaluation.optional_metrics import (
    MeasuredModels,
    decile_metric,
    familiar_share,
    halves,
    kl_divergences,
    kl_metrics,
    mean_interval,
    measure_optional_metrics,
    parse_optional_metrics,
    probe_metric,
    probe_scores,
    relearn,
    require_reference,
    run_figures,
    seed_metrics,
    tow_metric,
    tug_of_war,
    worst_drop_metric,
)
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import rank_area
from salun_core.models.checkpoint import model_digest


def test_names_and_counts():
    assert parse_optional_metrics("") == {}
    assert parse_optional_metrics("lira=16, relearn,probe") == {"lira": 16, "relearn": 20, "probe": 1}
    assert parse_optional_metrics("seeds") == {"seeds": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lyra", "did you mean 'lira'"),
        ("lira=3", "even number of at least 4"),
        ("lira=2", "even number of at least 4"),
        ("seeds=1", "at least 2"),
        ("relearn=x", "at least 1"),
        ("tow=2", "takes no count"),
    ],
)
def test_wrong_names_and_counts_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_optional_metrics(text)


def test_a_distance_needs_a_reference():
    require_reference({"kl": 1}, True)
    with pytest.raises(UsageError, match="kl and tow cannot be measured"):
        require_reference({"kl": 1, "tow": 1, "probe": 1}, False)


def never(*_):
    raise AssertionError("nobody asked for it")


def test_only_requested_metrics_are_measured(lab, forgotten_class):
    model, _, evidence = forgotten_class
    forget, retain = lab.parts("class")
    kept = lab.test.select([i for i, label in enumerate(lab.test.labels.tolist()) if label != 3])
    subject = MeasuredModels({"before": lab.model, "after": model}, forget, retain, kept)
    asked = parse_optional_metrics("decile,probe,relearn=5")
    found = measure_optional_metrics(evidence, asked, subject, never, never)
    new = set(found.metrics) - set(evidence.metrics)
    assert new == {"worst_decile", "worst_class_drop", "probe_auc", "relearn"}
    assert found.further.asked == ["relearn", "probe", "decile"]
    assert set(found.further.relearning) == {"before", "after"}
    assert found.metrics["relearn"].n == -(-len(forget) // 2)
    assert {name: found.metrics[name] for name in evidence.metrics} == evidence.metrics


def test_several_seeds_repeat_the_run(lab, forgotten_class):
    model, _, evidence = forgotten_class
    forget, retain = lab.parts("class")
    subject = MeasuredModels({"before": lab.model, "after": model}, forget, retain, lab.test)
    asked_for = []

    def rerun(seed):
        asked_for.append(seed)
        return lab.model

    found = measure_optional_metrics(evidence, {"seeds": 3}, subject, never, rerun, 5)
    assert asked_for == [6, 7]
    assert found.further.seeds == [5, 6, 7]
    runs = [1 - float((model_correct(m, forget)).mean()) for m in (model, lab.model, lab.model)]
    assert found.metrics["UA_seeds"].after == pytest.approx(sum(runs) / 3)


def model_correct(model, images):
    inputs, labels = next(images.batches(len(images)))
    return (model(inputs).argmax(1) == labels).numpy()


def test_the_digest_leaves_out_what_is_absent_and_covers_what_is_there(forgotten_class):
    evidence = forgotten_class[2]
    document = json.loads(evidence.model_dump_json())
    assert not {"generation", "further", "plugins"} & document.keys()
    assert not {"tuning", "plugins", "ended", "moved"} & document["run"].keys()
    assert evidence.digest == sha256_bytes(canonical_json(document))
    further = evidence.model_copy(update={"further": OptionalMetricFacts(asked=["probe"], seconds=1.0)})
    facts = TuningFacts(trials=1, budget="20e", passes=1, seconds=1.0, policy_digest="p")
    tuned = evidence.model_copy(update={"run": evidence.run.model_copy(update={"tuning": facts})})
    tuning = json.loads(facts.model_dump_json())
    assert "method" not in tuning
    assert tuned.digest == sha256_bytes(canonical_json({**document, "run": {**document["run"], "tuning": tuning}}))
    assert len({evidence.digest, further.digest, tuned.digest}) == 3


def test_halves_are_disjoint_and_whole(lab):
    forget, _ = lab.parts("class")
    taught, asked = halves(forget, 3)
    assert set(taught.ids) | set(asked.ids) == set(forget.ids)
    assert not set(taught.ids) & set(asked.ids)
    assert 0 <= len(asked) - len(taught) <= 1
    assert halves(forget, 3)[0].ids == taught.ids != halves(forget, 4)[0].ids


def test_the_curve_begins_at_the_model_and_repeats(lab):
    model = lab.unlearn("class")
    taught, asked = halves(lab.parts("class")[0], 0)
    before = model_digest(model)
    points = relearn(model, taught, asked, 12, 0)
    assert model_digest(model) == before
    assert points[0].step == 0
    assert points[0].accuracy == outputs_of(model, asked).correct.mean()
    assert [point.step for point in points] == [0, 2, 4, 6, 8, 10, 12]
    assert relearn(model, taught, asked, 12, 0) == points
    assert points[-1].accuracy > 0.9 > 0.2 > points[0].accuracy  # it came back


def test_the_first_step_is_one_of_sgd(lab):
    model = lab.unlearn("class")
    taught, asked = halves(lab.parts("class")[0], 0)
    by_hand = lab.unlearn("class").requires_grad_(True).eval()
    images, labels = next(taught.batches(64, torch.Generator().manual_seed(0)))
    torch.nn.functional.cross_entropy(by_hand(images), labels).backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 0.003 * parameter.grad
    point = relearn(model, taught, asked, 1, 0)[-1]
    assert point.accuracy == pytest.approx(outputs_of(by_hand, asked).correct.mean(), abs=0.02)


def test_without_two_samples_relearning_is_not_measured(lab, forgotten_class):
    model, _, evidence = forgotten_class
    one = lab.parts("class")[0].select([0])
    subject = MeasuredModels({"before": lab.model, "after": model}, one, one, lab.test)
    metric = measure_optional_metrics(evidence, {"relearn": 5}, subject, never, never).metrics["relearn"]
    assert (metric.before, metric.after, metric.n) == (None, None, 0)


def random_images(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(torch.randn(count, 1, 4, 4, generator=generator) + shift, torch.zeros(count, dtype=torch.int64))


def test_scores_come_from_folds_that_did_not_see_the_row():
    rng = np.random.default_rng(0)
    same = probe_scores(rng.normal(0, 1, (30, 40)), rng.normal(0, 1, (30, 40)), 0)
    assert rank_area(same[:30], same[30:]) < 0.75  # 40 features part 60 points fully where they were fitted on
    apart = probe_scores(rng.normal(2, 1, (30, 4)), rng.normal(0, 1, (30, 4)), 0)
    assert rank_area(apart[:30], apart[30:]) > 0.95


def test_the_metric_separates_models():
    torch.manual_seed(3)  # weights whose six features carry the shift of the images
    sees, blind = (nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 3)) for _ in range(2))
    nn.init.zeros_(blind[1].weight)
    metric = probe_metric({"before": sees, "after": blind}, random_images(40, 1, 0.8), random_images(40, 2), 0)
    assert metric.before > 0.9
    assert metric.after == 0.5
    assert (metric.low < 0.5 < metric.high, metric.n) == (True, 40)
    assert probe_metric({"before": sees, "after": blind}, random_images(4, 1), random_images(40, 2), 0).after is None


def with_losses(losses):
    """Outputs whose margin is minus the loss."""
    losses = np.array(losses, dtype=np.float64)
    logits = np.stack([-losses, np.zeros(len(losses))], axis=1)
    return Outputs(np.full((len(losses), 2), 0.5), losses, np.zeros(len(losses), dtype=np.int64), logits)


def test_share_below_the_first_decile_of_unseen_losses():
    test = with_losses(range(101))  # first decile: 10
    assert familiar_share(with_losses([9, 9.9, 10, 11, 50]), test) == pytest.approx(2 / 5)


def test_the_same_distribution_gives_a_tenth():
    rng = np.random.default_rng(0)
    share = familiar_share(with_losses(rng.exponential(1, 20_000)), with_losses(rng.exponential(1, 20_000)))
    assert share == pytest.approx(0.1, abs=0.01)


def test_the_metric_has_all_models_and_an_interval():
    test = with_losses(range(101))
    models = {"before": [1] * 10, "after": [1] * 3 + [50] * 7, "reference": [1] + [50] * 9}
    metric = decile_metric({name: {"forget": with_losses(v), "test": test} for name, v in models.items()})
    assert (metric.before, metric.after, metric.reference, metric.n) == (1, 0.3, 0.1, 10)
    assert 0.1 < metric.low < 0.3 < metric.high < 0.65


def test_the_retained_class_that_lost_most():
    rows = [
        ClassAccuracy(class_id=0, name="a", before=0.9, after=0.85, n=20),
        ClassAccuracy(class_id=1, name="b", before=0.9, after=0.7, n=30),
        ClassAccuracy(class_id=2, name="gone", before=1.0, after=0.0, n=40),
        ClassAccuracy(class_id=3, name="empty", before=None, after=None, n=0),
    ]
    metric = worst_drop_metric(rows, [2])
    assert (metric.before, metric.n) == (0, 30)
    assert metric.after == pytest.approx(0.2)
    assert worst_drop_metric(rows[2:], [2]).after is None


def outputs(rows, labels):
    probabilities = np.array(rows, dtype=np.float64)
    losses = -np.log(probabilities[np.arange(len(labels)), labels])
    return Outputs(probabilities, losses, np.array(labels))


def drawn(seed, n=30, classes=4):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes))
    rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return outputs(rows, np.random.default_rng(99).integers(0, classes, n))


def test_kl_is_the_sum_over_classes():
    reference = outputs([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [0, 0])
    model = outputs([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]], [0, 0])
    by_hand = [0.5 * math.log(2) + 0.25 * math.log(0.5), math.log(2)]
    assert kl_divergences(reference, model) == pytest.approx(by_hand, abs=1e-12)
    assert kl_divergences(reference, reference) == pytest.approx([0, 0], abs=1e-12)


def test_kl_metric_has_mean_and_normal_interval():
    models = {name: {"forget": drawn(seed), "test": drawn(seed + 10)} for seed, name in enumerate(("before", "after"))}
    models["reference"] = {"forget": drawn(7), "test": drawn(8)}
    metric = kl_metrics(models)["KL_forget"]
    r, p = models["reference"]["forget"].probabilities, models["after"]["forget"].probabilities
    each = (r * np.log(r / p)).sum(axis=1)
    assert metric.after == pytest.approx(each.mean())
    assert metric.high - metric.after == pytest.approx(1.96 * each.std(ddof=1) / math.sqrt(30), rel=1e-4)
    assert (metric.reference, metric.n) == (0, 30)
    assert metric.before != metric.after


def test_tug_of_war_is_the_product_of_three_agreements():
    right, wrong = [0.9, 0.1], [0.1, 0.9]

    def with_hits(hits):
        return {
            name: outputs([right] * count + [wrong] * (10 - count), [0] * 10)
            for name, count in zip(("forget", "retain", "test"), hits, strict=True)
        }

    reference, model = with_hits((6, 10, 9)), with_hits((8, 9, 9))
    assert tug_of_war(reference, model) == pytest.approx((1 - 0.2) * (1 - 0.1) * 1)
    assert tug_of_war(reference, reference) == 1
    metric = tow_metric({"before": with_hits((10, 10, 10)), "after": model, "reference": reference})
    assert metric.before == pytest.approx(0.6 * 1 * 0.9)
    assert metric.reference == 1


def test_without_a_reference_no_distance_is_measured():
    models = {name: {"forget": drawn(1), "retain": drawn(2), "test": drawn(3)} for name in ("before", "after")}
    assert tow_metric(models).after is None
    assert kl_metrics(models)["KL_test"].after is None


def test_interval_equals_scipy():
    values = [0.10, 0.14, 0.11, 0.2]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean_interval(values) == pytest.approx((low, high))


def test_metrics_count_runs():
    runs = [{"UA": 0.1, "RA": 1.0, "TA": 0.9, "attack_auc": 0.5}, {"UA": 0.3, "RA": 1.0, "TA": 0.8, "attack_auc": 0.6}]
    found = seed_metrics({"UA": 0.0, "RA": 1.0, "TA": 0.9, "attack_auc": 0.7}, runs)
    assert (found["UA_seeds"].after, found["UA_seeds"].n, found["UA_seeds"].before) == (pytest.approx(0.2), 2, 0.0)
    assert found["RA_seeds"].low == found["RA_seeds"].high == 1
    assert found["TA_seeds"].low < 0.8 < 0.9 < found["TA_seeds"].high


def test_figures_of_a_run_are_those_of_the_evaluation(lab, forgotten_class):
    model, _, evidence = forgotten_class
    forget, retain = lab.parts("class")
    kept = lab.test.select([i for i, label in enumerate(lab.test.labels.tolist()) if label != 3])
    splits = {"forget": forget, "retain": retain, "test": kept}
    found = run_figures({name: outputs_of(model, images) for name, images in splits.items()})
    assert set(found) == {"UA", "RA", "TA"}  # no unseen image of the class is among these
    for name, value in found.items():
        assert value == pytest.approx(evidence.metrics[name].after, abs=1e-9)
