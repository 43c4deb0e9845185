"""The default policy on nets that memorise: honest models pass at their level, and forgeries are refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.config import parse
from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Integrity, Measured, Metric, RunFacts
from salun_core.evaluation.statistics import area_metric
from salun_core.gate import Cause, Policy, decide, load_policy

POLICY = load_policy("classifier")
SIZES = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 75, 100, 150, 250)


def drawn(count, seed):
    """Four classes of 4 x 4 images, so noisy that a net has to memorise them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    means = 128 + 25 * torch.randn((4, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    pixels = means[labels] + 50 * torch.randn((count, 1, 4, 4), generator=generator)
    return ImageSet(pixels.clamp(0, 255).to(torch.uint8), labels, Normalisation((0.5,), (0.25,)))


def fit(model, images, epochs=60, rate=0.1, seed=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    inputs, labels = next(iter(images.batches(len(images))))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def trained(images, seed):
    torch.manual_seed(seed)
    return fit(nn.Sequential(nn.Flatten(), nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)), images, seed=seed)


TRAIN, UNSEEN = drawn(600, 1), drawn(600, 2)


@pytest.fixture(scope="module")
def before():
    return trained(TRAIN, 0)


@pytest.fixture
def forged(before):
    return copy.deepcopy(before)


def parts(gone):
    gone = np.asarray(gone)
    return TRAIN.select(gone.tolist()), TRAIN.select(np.setdiff1d(np.arange(len(TRAIN)), gone).tolist())


def class_zero():
    return np.flatnonzero(TRAIN.labels.numpy() == 0)


def judged(before, after, gone, kind="samples", method="salun"):
    forget, retain = parts(gone)
    emptied = sorted(set(forget.labels.tolist()) - set(retain.labels.tolist()))
    inside = int(np.isin(forget.labels.numpy(), emptied).sum())
    counts = {"count": len(forget), "train_count": len(TRAIN), "in_classes": inside}
    forgotten = Forgotten(**counts, kinds=[kind], classes=emptied)
    measured = Measured(before="a", after="b", dataset="c", split="d", forget_set="e")
    run = RunFacts(method=method)
    return decide(
        evaluate_classifier(before, after, Splits(forget, retain, UNSEEN), measured, forgotten, run=run), POLICY
    )


def failed(decision):
    return {verdict.metric for verdict in decision.verdicts if not verdict.passed}


def causes(decision, metric):
    return {verdict.refusal.cause for verdict in decision.verdicts if verdict.metric == metric and verdict.refusal}


def nudged(model):
    """Move one weight by one unit in the last place."""
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nextafter(model[3].weight[0, 0], torch.tensor(9.0))
    return model


@pytest.mark.parametrize("count", SIZES)
def test_one_weight_moved_by_one_ulp_is_refused_at_any_size(before, forged, count):
    decision = judged(before, nudged(forged), range(count))
    assert not decision.passed
    assert decision.level is None
    assert "change" in failed(decision)
    assert causes(decision, "change") == {Cause.NOT_FORGOTTEN}


@pytest.mark.parametrize("count", [1, 5, 250])
def test_a_learning_rate_near_zero_is_refused(before, forged, count):
    forget, retain = parts(range(count))
    fit(forged, forget.relabelled((forget.labels + 1) % 4).joined(retain), 1, 1e-7)
    assert "change" in failed(judged(before, forged, range(count)))


@pytest.mark.parametrize("count", [10, 250])
@pytest.mark.parametrize("factor", [1000.0, 0.1])
def test_rescaled_logits_are_refused_and_change_no_attack(before, forged, factor, count):
    with torch.no_grad():
        forged[3].weight.mul_(factor)
        forged[3].bias.mul_(factor)
    decision = judged(before, forged, range(count))
    assert {"change", "effect"} <= failed(decision)
    assert failed(decision) & {"TA_loss", "RA_loss"}
    unscaled = judged(before, before, range(count))
    auc = [next(v.actual for v in d.verdicts if v.metric == "attack_auc") for d in (decision, unscaled)]
    assert auc[0] == pytest.approx(auc[1], abs=1e-3)


def test_a_class_hidden_by_one_bias_is_refused(before, forged):
    with torch.no_grad():
        forged[3].bias[0] -= 100
    decision = judged(before, forged, class_zero(), "class")
    assert failed(decision) == {"restored"}
    assert causes(decision, "restored") == {Cause.NOT_FORGOTTEN}


def test_a_hidden_class_is_refused_although_features_have_another_order_and_scale(before, forged):
    """The outputs of the other classes keep their values: only the features of the layer before are renamed."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(96, generator=generator)
    scale = torch.exp(torch.randn(96, generator=generator))
    with torch.no_grad():
        forged[1].weight.copy_(before[1].weight[order] * scale[:, None])
        forged[1].bias.copy_(before[1].bias[order] * scale)
        forged[3].weight.copy_(before[3].weight[:, order] / scale)
        forged[3].bias[0] -= 100
    decision = judged(before, forged, class_zero(), "class")
    assert failed(decision) == {"restored"}


@pytest.mark.parametrize("count", [5, 40])
def test_samples_with_wrong_labels_are_refused_as_over_forgotten(before, forged, count):
    forget, retain = parts(range(count))
    fit(forged, forget.relabelled((forget.labels + 1) % 4).joined(retain), 60, 0.05)
    decision = judged(before, forged, range(count))
    assert "attack_auc" in failed(decision)
    assert causes(decision, "attack_auc") == {Cause.OVER_FORGOTTEN}


@pytest.mark.parametrize(
    ("gone", "kind", "level"),
    [
        (np.arange(250), "samples", "measured"),
        (np.arange(5), "samples", "procedure"),
        (np.arange(1), "samples", "procedure"),
        (class_zero(), "class", "measured"),
        (class_zero(), "subject", "measured"),
    ],
)
def test_a_model_that_never_saw_the_samples_passes_at_the_level_that_so_many_show(before, gone, kind, level):
    decision = judged(before, trained(parts(gone)[1], 7), gone, kind)
    assert decision.passed, decision.summary
    assert decision.level == level
    assert decision.n == len(gone)
    if len(decision.verdicts) and level != "measured":
        assert decision.margin == 0.1
        assert decision.power < 0.2
        assert any(verdict.shown is False for verdict in decision.verdicts)
    elif kind == "samples":
        assert decision.power > 0.9


@pytest.mark.parametrize(
    ("gone", "kind"), [(np.arange(5), "samples"), (np.arange(150), "subject"), (class_zero(), "class")]
)
def test_an_exactly_retrained_model_has_its_level(before, gone, kind):
    decision = judged(before, trained(parts(gone)[1], 7), gone, kind, method="retrain")
    assert decision.passed, decision.summary
    assert decision.level == "retrained"
    assert next(verdict for verdict in decision.verdicts if verdict.rule == "fresh weights").passed


def scaled(model):
    for layer, factor in ((model[1], 1.5), (model[3], 1 / 1.5)):
        for weights in layer.parameters():
            weights.mul_(factor)
    model[3].bias.mul_(1.5)


def noisy(model, size=0.3):
    generator = torch.Generator().manual_seed(5)
    for weights in model.parameters():
        noise = torch.randn(weights.shape, generator=generator)
        weights.add_(size * weights.norm() * noise / noise.norm())


def unrecognisable(model):
    """The same outputs from weights that look fresh: the features in another order, each with a scale of its own."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    for weights in (model[1].weight, model[1].bias):
        weights.copy_(weights[order].clone())
    model[3].weight.copy_(model[3].weight[:, order].clone())


@pytest.mark.parametrize("count", [1, 150])
@pytest.mark.parametrize("forge", [scaled, noisy])
def test_a_claim_to_be_retrained_is_refused_if_the_weights_continue_those_before(before, forged, forge, count):
    """The plain distance of both from the weights before is above 0.1."""
    with torch.no_grad():
        forge(forged)
    own, old = (nn.utils.parameters_to_vector(model.parameters()).detach() for model in (forged, before))
    assert (own - old).norm() > 0.1 * old.norm()
    decision = judged(before, forged, range(count), method="retrain")
    refused = {verdict.rule: verdict.refusal for verdict in decision.verdicts if not verdict.passed}
    assert refused["fresh weights"].cause is Cause.INTEGRITY
    assert "--retrain-reference" in refused["fresh weights"].next
    assert decision.level is None


def test_a_claim_to_be_retrained_is_refused_if_the_model_knows_its_members(before, forged):
    """The weights look fresh, and only the outputs tell: a model that never saw the samples cannot know them."""
    with torch.no_grad():
        unrecognisable(forged)
        inputs, labels = next(iter(TRAIN.batches(len(TRAIN))))
        sure = before(inputs)[torch.arange(len(labels)), labels].argsort(descending=True)[:150]
    decision = judged(before, forged, sure, method="retrain")
    refused = {verdict.rule: verdict.refusal.cause for verdict in decision.verdicts if not verdict.passed}
    assert refused["attack_auc <= (low end)"] is Cause.NOT_FORGOTTEN
    assert refused["change >="] is Cause.NOT_FORGOTTEN  # it answers as before, which shows with a single sample
    assert "fresh weights" not in refused
    assert "change" in failed(judged(before, forged, range(1), method="retrain"))
    assert {"restored", "UA_class"} <= failed(judged(before, forged, class_zero(), "class", method="retrain"))


def claim(kinds=("samples",), method="retrain", **changed):
    facts = {"distance": 0.99, "repeated": None, "attack_auc": metric(0.5, 0.4, 0.6), **changed}
    evidence = Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e"),
        forgotten=Forgotten(count=40, train_count=400, kinds=list(kinds)),
        integrity=Integrity(
            weights=9,
            weights_changed=9,
            non_finite=0,
            buffers_changed=0,
            distance=facts["distance"],
            repeated=facts["repeated"],
        ),
        metrics={"RA": metric(0.9, 0.8, 0.95), "change": metric(0.4, 0.3, 0.5)}
        | ({"attack_auc": facts["attack_auc"]} if facts["attack_auc"] else {}),
        run=RunFacts(method=method),
    )
    return decide(evidence, policy_of({"metric": "RA", "op": ">=", "value": 0.5, "reason": "kept"}))


@pytest.mark.parametrize(
    ("changed", "passes"),
    [
        ({}, True),
        ({"attack_auc": None}, False),
        ({"distance": None}, False),
        ({"distance": float("nan")}, False),
        ({"distance": 0.69}, False),
        ({"attack_auc": None, "distance": None, "repeated": True}, True),  # the same bits are a proof
        ({"distance": 0.69, "repeated": False}, False),  # another device gives other bits, and shows nothing
    ],
)
def test_a_claim_to_be_retrained_needs_what_shows_it(changed, passes):
    decision = claim(**changed)
    assert (decision.passed, decision.level) == (passes, "retrained" if passes else None)


@pytest.mark.parametrize(
    ("value", "low", "reference", "passes"),
    [(0.2, 0.1, None, True), (0.66, 0.59, None, True), (0.7, 0.61, None, False), (0.7, 0.61, 0.65, False)],
)
def test_a_retrained_model_may_find_the_samples_harder_and_never_easier(value, low, reference, passes):
    found = metric(value, low, value + 0.1, reference=reference)
    assert claim(attack_auc=found).passed is passes


def test_the_reference_of_an_easy_person_is_what_a_retrained_model_is_compared_with():
    found = Metric(before=0.9, after=0.7, reference=0.7, low=0.65, high=0.75, n=300)
    assert claim(("subject",), attack_auc=found).passed
    assert not claim(("subject",), attack_auc=found.model_copy(update={"reference": None})).passed
    seen = found.model_copy(update={"reference": 0.88})  # a reference as familiar as the model before shows nothing
    assert not claim(("subject",), attack_auc=seen).passed


def test_a_broken_attack_refuses_the_claim():
    for broken in (metric(float("nan"), 0.4, 0.6), metric(0.5, None, None), metric(0.5, 0.4, 0.6, n=0)):
        assert "attack_auc" in failed(claim(attack_auc=broken))
    assert claim(attack_auc=None, method="salun").passed  # other methods claim nothing


def metric(value, low, high, n=40, **more):
    return Metric(before=0.6, after=value, low=low, high=high, n=n, **more)


def decided(policy, kinds=("samples",), **metrics):
    evidence = Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e"),
        forgotten=Forgotten(count=40, train_count=400, kinds=list(kinds)),
        integrity=Integrity(weights=9, weights_changed=9, non_finite=0, buffers_changed=0),
        metrics=metrics,
    )
    return decide(evidence, policy)


INSIDE = {"metric": "attack_auc", "op": "inside", "value": 0.5, "tolerance": 0.1, "reason": "alike"}
SHOWN = {"metric": "effect", "op": ">=", "value": 0.01, "judge": "low", "reason": "an effect"}


def policy_of(*rules, **more):
    return parse(Policy, {"name": "mine", "rules": list(rules), **more}, "policy")


@pytest.mark.parametrize(
    ("value", "low", "high", "shown", "contradicted"),
    [
        (0.5, 0.45, 0.55, True, None),
        (0.5, 0.4, 0.6, True, None),
        (0.5, 0.3, 0.55, False, None),
        (0.5, 0.0, 1.0, False, None),
        (0.7, 0.59, 0.8, False, None),
        (0.7, 0.61, 0.8, False, Cause.NOT_FORGOTTEN),
        (0.3, 0.2, 0.39, False, Cause.OVER_FORGOTTEN),
    ],
)
def test_an_interval_is_inside_overlaps_or_contradicts(value, low, high, shown, contradicted):
    found = metric(value, low, high)
    strict = decided(policy_of(INSIDE), attack_auc=found)
    lenient = decided(policy_of({**INSIDE, "undecided": "procedure"}), attack_auc=found)
    assert strict.verdicts[-1].shown is shown
    assert strict.passed is shown
    assert lenient.passed is (contradicted is None)
    assert lenient.level == (None if contradicted else "measured" if shown else "procedure")
    assert (lenient.margin, lenient.n) == (0.1, 40)
    if contradicted:
        assert lenient.verdicts[-1].refusal.cause is contradicted
    elif not shown and 0.4 <= value <= 0.6:
        assert strict.verdicts[-1].refusal.cause is Cause.TOO_FEW_SAMPLES


def test_the_value_of_a_retrained_model_is_the_centre_if_there_is_one():
    rule = {**INSIDE, "or_reference": True}
    found = metric(0.3, 0.25, 0.35)
    assert not decided(policy_of(rule), attack_auc=found).passed
    assert decided(policy_of(rule), attack_auc=found.model_copy(update={"reference": 0.32})).passed
    assert not decided(policy_of(INSIDE), attack_auc=found.model_copy(update={"reference": 0.32})).passed


def test_a_share_of_the_samples_marked_and_the_rest_kept_is_refused(before, forged):
    """The area is near 1/2, because the marked samples make up for those that are as familiar as before."""
    forget, retain = parts(range(250))
    labels = forget.labels.clone()
    labels[:75] = (labels[:75] + 1) % 4
    decision = judged(before, fit(forged, forget.relabelled(labels).joined(retain), 60, 0.05), range(250))
    assert failed(decision) >= {"attack_shape"}
    assert not failed(decision) & {"attack_auc", "effect", "change", "UA_samples"}


def test_one_sample_that_is_far_less_familiar_than_all_others_is_refused():
    area = area_metric({"before": 0.9, "after": 0.003}, 1, 719)
    decision = decided(policy_of({**INSIDE, "undecided": "procedure"}), attack_auc=area)
    assert causes(decision, "attack_auc") == {Cause.OVER_FORGOTTEN}


@pytest.mark.parametrize(("area", "cause"), [(0.3, Cause.OVER_FORGOTTEN), (0.6, Cause.NOT_FORGOTTEN), (None, None)])
def test_the_side_of_the_area_says_why_another_shape_is_refused(area, cause):
    rule = {"metric": "attack_shape", "op": "<=", "value": 0.05, "judge": "low", "targets": ["samples"], "reason": "x"}
    found = {"attack_shape": metric(0.3, 0.2, 0.4)}
    if area is not None:
        found["attack_auc"] = metric(area, area - 0.05, area + 0.05)
    assert causes(decided(policy_of(rule), **found), "attack_shape") == {cause or Cause.NOT_FORGOTTEN}


def test_unusual_samples_are_compared_with_a_retrained_model_if_there_is_one():
    """Samples of a person whose hand is unlike all others look unlike unseen data to a retrained model, too."""
    rule = {"metric": "attack_shape", "op": "<=", "value": 0.05, "judge": "low", "or_reference": True, "reason": "x"}
    found = Metric(before=0.6, after=0.3, low=0.2, high=0.4, n=300)
    assert not decided(policy_of(rule), attack_shape=found).passed
    assert decided(policy_of(rule), attack_shape=found.model_copy(update={"reference": 0.25})).passed
    assert not decided(policy_of(rule), attack_shape=found.model_copy(update={"reference": 0.61})).passed


def test_evidence_without_a_metric_is_refused_in_one_line(before, forged):
    decision = judged(before, trained(parts(range(5))[1], 7), range(5))
    assert decision.passed, decision.summary
    forget, retain = parts(range(5))
    forgotten = Forgotten(count=5, train_count=len(TRAIN), kinds=["samples"], in_classes=0)
    measured = Measured(before="a", after="b", dataset="c", split="d", forget_set="e")
    evidence = evaluate_classifier(before, trained(retain, 7), Splits(forget, retain, UNSEEN), measured, forgotten)
    fewer = {name: item for name, item in evidence.metrics.items() if name != "attack_shape"}
    refused = decide(evidence.model_copy(update={"metrics": fewer}), POLICY)
    assert failed(refused) == {"attack_shape"}
    assert "the evidence has no metric attack_shape" in refused.summary
    assert refused.next.startswith("evaluate again: salun evaluate")


@pytest.mark.parametrize(("reference", "passes"), [(0.94, False), (0.9, False), (0.82, True)])
def test_a_reference_that_may_have_seen_the_samples_is_not_compared_with(reference, passes):
    """A model of another seed that was trained on all data is as familiar with them as the one before."""
    found = Metric(
        before=0.95, after=reference, reference=reference, low=reference - 0.02, high=reference + 0.02, n=300
    )
    rule = {**INSIDE, "or_reference": True, "undecided": "procedure"}
    assert decided(policy_of(rule), attack_auc=found).passed is passes


@pytest.mark.parametrize(
    ("count", "area", "cause"),
    [
        (3, 0.95, Cause.NOT_FORGOTTEN),
        (10, 0.81, Cause.NOT_FORGOTTEN),
        (20, 0.77, Cause.NOT_FORGOTTEN),
        (1, 0.003, Cause.OVER_FORGOTTEN),
        (5, 0.09, Cause.OVER_FORGOTTEN),
        (20, 0.23, Cause.OVER_FORGOTTEN),
        (3, 0.89, None),  # so few samples cannot tell, and the decision says so
        (5, 0.27, None),
    ],
)
def test_a_small_forget_set_is_judged_in_both_directions_or_its_level_says_that_it_cannot_be(count, area, cause):
    found = area_metric({"before": 0.95, "after": area}, count, 600)
    decision = decided(policy_of({**INSIDE, "undecided": "procedure"}), attack_auc=found)
    assert decision.level == (None if cause else "procedure")
    assert causes(decision, "attack_auc") == ({cause} if cause else set())
    assert (decision.n, decision.power < 0.05) == (count, True)


@pytest.mark.parametrize(
    ("low", "high", "level"), [(0.02, 0.1, "measured"), (-0.1, 0.1, "procedure"), (-0.005, 0.005, None)]
)
def test_no_effect_in_enough_samples_contradicts(low, high, level):
    decision = decided(policy_of({**SHOWN, "undecided": "procedure"}), effect=metric((low + high) / 2, low, high))
    assert decision.level == level


@pytest.mark.parametrize(
    ("value", "low", "high"), [(0.9, 0.45, 0.55), (0.5, 0.55, 0.45), (0.1, 0.45, 0.55), (float("nan"), 0.45, 0.55)]
)
@pytest.mark.parametrize("rule", [INSIDE, SHOWN, {**SHOWN, "op": "<=", "value": 0.6}])
def test_an_interval_that_does_not_hold_its_value_is_refused(rule, value, low, high):
    lenient = policy_of(rule if rule["op"] == "<=" else {**rule, "undecided": "procedure"})
    decision = decided(lenient, **{rule["metric"]: metric(value, low, high)})
    assert causes(decision, rule["metric"]) == {Cause.NOT_MEASURED}


def test_an_interval_without_a_width_shows_nothing():
    for rule in (INSIDE, SHOWN):
        lenient = policy_of({**rule, "undecided": "procedure"})
        assert decided(lenient, **{rule["metric"]: metric(0.5, 0.5, 0.5)}).level == "procedure"


@pytest.mark.parametrize("broken", [None, float("nan")])
def test_an_end_that_is_missing_is_never_shown(broken):
    for rule in (INSIDE, SHOWN):
        lenient = policy_of({**rule, "undecided": "procedure"})
        decision = decided(lenient, **{rule["metric"]: metric(0.5, 0.45, broken)})
        assert not decision.passed
        assert decision.verdicts[-1].shown is None


def test_the_policy_says_which_levels_it_publishes():
    rules = [{**INSIDE, "undecided": "procedure"}]
    few = metric(0.5, 0.3, 0.7)
    allowed = policy_of(*rules, levels={"samples": ["measured", "procedure"]})
    assert decided(allowed, attack_auc=few).level == "procedure"
    strict = policy_of(*rules, levels={"samples": ["measured"], "class": ["procedure"]})
    refused = decided(strict, attack_auc=few)
    assert not refused.passed
    assert "the level of samples is procedure: margin 0.1, n 40" in refused.summary
    assert decided(strict, attack_auc=metric(0.5, 0.45, 0.55)).passed
    assert decided(policy_of({**INSIDE, "op": "within"}), attack_auc=few).level == "procedure"  # no interval is judged


MIXED = Forgotten(
    count=130,
    train_count=900,
    kinds=["class", "samples", "subject"],
    classes=[3],
    in_classes=30,
    by_kind={
        "class": {"count": 20, "in_classes": 20},
        "samples": {"count": 100, "in_classes": 0},
        "subject": {"count": 10, "in_classes": 10},  # a person who is a class
    },
)
GONE = {"metric": "UA_class", "op": ">=", "value": 0.85, "judge": "low", "undecided": "procedure", "reason": "gone"}
BATCH = [{**INSIDE, "undecided": "procedure", "targets": ["samples", "subject"]}, {**GONE, "targets": ["class"]}]
SHOWN_AREA, FEW_AREA = metric(0.5, 0.45, 0.55, n=100), metric(0.5, 0.2, 0.8, n=5)
SHOWN_CLASS, FEW_CLASS = metric(1.0, 0.9, 1.0, n=30), metric(1.0, 0.5, 1.0, n=4)


def of_batch(area, of_class, levels=(), forgotten=MIXED):
    evidence = Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e"),
        forgotten=forgotten,
        integrity=Integrity(weights=9, weights_changed=9, non_finite=0, buffers_changed=0),
        metrics={"attack_auc": area, "UA_class": of_class},
    )
    return decide(evidence, policy_of(*BATCH, **({"levels": dict(levels)} if levels else {})))


@pytest.mark.parametrize(
    ("area", "of_class", "levels"),
    [
        (SHOWN_AREA, FEW_CLASS, {"samples": "measured", "subject": "procedure", "class": "procedure"}),
        (FEW_AREA, SHOWN_CLASS, {"samples": "procedure", "subject": "measured", "class": "measured"}),
    ],
)
def test_each_kind_of_a_batch_has_the_level_n_and_power_of_its_own_rules(area, of_class, levels):
    decision = of_batch(area, of_class)
    assert {kind: found.level for kind, found in decision.kinds.items()} == levels
    assert decision.level == "procedure"
    assert {kind: found.n for kind, found in decision.kinds.items()} == {
        "samples": area.n,
        "subject": of_class.n,
        "class": of_class.n,
    }
    powers = {kind: found.power for kind, found in decision.kinds.items()}
    assert (powers["class"], powers["subject"]) == (None, None)
    assert powers["samples"] == (pytest.approx(0.95, abs=0.01) if area is SHOWN_AREA else 0)


@pytest.mark.parametrize(
    ("levels", "refused"),
    [
        ({"samples": ["measured"], "class": ["procedure"]}, None),
        ({"samples": ["measured"], "class": ["measured", "retrained"]}, "class"),
        ({"samples": ["procedure"]}, "samples"),
        ({"subject": ["measured"]}, "subject"),
        ({"concept": ["retrained"]}, None),
    ],
)
def test_a_level_that_is_not_published_for_one_kind_is_judged_by_that_kind(levels, refused):
    """Here samples are measured, and the class and the person who is a class are not."""
    decision = of_batch(SHOWN_AREA, FEW_CLASS, levels)
    assert decision.passed is (refused is None), decision.summary
    if refused:
        assert f"the level of {refused} is {'measured' if refused == 'samples' else 'procedure'}" in decision.summary


def test_a_person_who_is_a_class_needs_a_level_that_is_published_for_both():
    alone = Forgotten(count=10, train_count=90, kinds=["subject"], classes=[3], in_classes=10)
    levels = {"subject": ["procedure"], "class": ["measured"]}
    assert not of_batch(SHOWN_AREA, FEW_CLASS, levels, alone).passed
    assert of_batch(SHOWN_AREA, SHOWN_CLASS, {**levels, "subject": ["measured"]}, alone).level == "measured"


def test_evidence_that_does_not_tell_the_kinds_apart_shows_no_more_than_all_its_rules():
    together = MIXED.model_copy(update={"by_kind": {}})
    assert together.judged_kinds == {"class", "samples", "subject"}
    kinds = of_batch(SHOWN_AREA, FEW_CLASS, forgotten=together).kinds
    assert {kind: found.level for kind, found in kinds.items()} == dict.fromkeys(kinds, "procedure")


def test_power_is_the_chance_of_an_honest_model():
    """Of areas that are normal around 1/2 with a deviation of 0.04, counted."""
    deviation = 0.04
    decision = decided(policy_of(INSIDE), attack_auc=metric(0.5, 0.5 - 1.96 * deviation, 0.5 + 1.96 * deviation))
    areas = np.random.default_rng(0).normal(0.5, deviation, 200_000)
    inside = (np.abs(areas - 0.5) + 1.96 * deviation <= 0.1).mean()
    assert decision.power == pytest.approx(inside, abs=0.005)


@pytest.mark.parametrize(
    "change",
    [
        {"judge": "low"},
        {"tolerance": None},
        {"op": "within", "or_reference": True},
        {"op": "within", "undecided": "procedure"},
        {"op": "<=", "tolerance": None, "judge": "low", "undecided": "procedure"},
        {"undecided": "publish"},
    ],
)
def test_faults_of_rules_on_intervals_are_reported(change):
    with pytest.raises(UsageError, match=r"rules\.0"):
        policy_of({**INSIDE, **change})


def test_fields_that_are_not_used_leave_the_digest_of_a_policy():
    old = policy_of({"metric": "RA", "op": ">=", "value": 0.5, "reason": "x"})
    assert old.digest == "648b29ff40567911d0b55ee7f6187f3226526754cafa8889d1ea94754757c629"
    assert policy_of(INSIDE).digest != policy_of({**INSIDE, "undecided": "procedure"}).digest
