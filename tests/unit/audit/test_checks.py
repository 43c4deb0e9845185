"""The tests of an audit on simulated outputs: what passes, what fails, what so many samples cannot tell."""

from __future__ import annotations

import numpy as np
import pytest

from salun_core.audit.checks import Finding, examine, klom, level_of, verdict_of
from salun_core.audit.predictions import Audited
from salun_core.evaluation.likelihood_ratio import Shadows
from tests.support.simulated_outputs import CLASSES, World


def verdicts(audited):
    return {found.test: found.verdict for found in examine(audited)}


def test_a_retrained_model_passes_every_test():
    world = World()
    found = examine(world.audited(world.logits(1), references=4))
    assert {item.test for item in found} == {"attack", "outputs", "change", "accuracy", "relative", "klom"}
    assert level_of(found) == "measured", found


@pytest.mark.parametrize("factor", [1.0, 1000.0, 0.5])
def test_the_model_before_fails_whatever_its_temperature(factor):
    world = World()
    found = verdicts(world.audited(factor * world.logits(0, saw=True), references=4))
    assert found["change"] == found["relative"] == found["attack"] == "fail"


def test_a_quarter_of_marks_that_hides_the_rest_fails_by_the_outputs_and_by_the_oracles():
    world = World()
    logits = world.logits(1)
    rows = np.arange(world.count)
    logits[rows, world.labels[: world.count]] += 1.2
    marked = rows[: world.count // 4]
    logits[marked, (world.labels[marked] + 1) % CLASSES] += 8
    found = verdicts(world.audited(logits, references=4))
    assert found["attack"] != "fail"  # the area alone does not show it
    assert found["outputs"] == "fail"
    assert found["klom"] == "fail"


def test_over_forgotten_samples_fail():
    world = World()
    logits = world.logits(1)
    logits[np.arange(world.count), world.labels[: world.count]] -= 6
    assert verdicts(world.audited(logits, references=4))["attack"] == "fail"


def test_predictions_alone_do_not_show_that_a_class_was_forgotten():
    world = World(whole=2)
    found = {item.test: item for item in examine(world.audited(world.logits(1), references=4))}
    assert found.keys() == {"recognised", "own_logit", "change", "accuracy", "relative", "klom", "restored"}
    assert {name for name, item in found.items() if item.verdict != "pass"} == {"restored"}
    assert found["restored"].verdict == "undecided"  # a fresh last layer on the old features looks the same
    assert level_of(list(found.values())) == "procedure"


def test_an_edit_of_one_bias_fails():
    world = World(whole=2)
    logits = world.logits(0, saw=True)
    logits[:, 2] -= 100
    audited = world.audited(logits)
    found = verdicts(audited)
    assert found["recognised"] == "pass"
    assert found["own_logit"] == found["change"] == "fail"
    assert all(item.holds_value for item in examine(audited))  # a change of 0 is rounded to -1e-16


def test_a_destroyed_model_fails_although_it_knows_nothing():
    world = World()
    noise = np.random.default_rng(5).normal(0, 1, (len(world.labels), CLASSES))
    assert verdicts(world.audited(noise))["accuracy"] == "fail"


def test_few_samples_decide_nothing_and_never_pass():
    world = World(count=4)
    found = examine(world.audited(world.logits(1)))
    assert level_of(found) == "procedure"
    assert {item.test: item.verdict for item in found}["attack"] == "undecided"


def test_oracles_that_cannot_tell_the_model_before_decide_nothing():
    world = World()
    audited = world.audited(world.logits(1), references=3)
    audited = Audited(audited.references[0], audited.after, audited.references[1:] + [audited.before])
    found = {item.test: item for item in examine(audited)}
    assert found["klom"].verdict == "undecided"


def test_klom_is_the_divergence_of_normals_with_the_spread_of_the_oracles():
    oracles = np.array([[0.0, 10.0], [2.0, 12.0]])  # means 1 and 11, variance 2
    assert klom(np.array([3.0, 11.0]), oracles) == pytest.approx((2**2 + 0) / 2 / (2 * 2))


def test_the_likelihood_ratio_attack_finds_what_the_population_attack_does_not():
    world, rng = World(), np.random.default_rng(3)
    hard = rng.normal(0, 5, len(world.labels))
    inside = rng.random((16, len(hard))).argsort(axis=0) < 7  # not half of them: somebody else trained these

    def two_sided(confidence):
        logits = np.zeros((len(hard), CLASSES))
        logits[np.arange(len(hard)), world.labels] = confidence + np.log(CLASSES - 1)
        return world.outputs(logits)

    shadows = Shadows(hard + 2.0 * inside + rng.normal(0, 0.5, inside.shape), inside)
    member = np.arange(len(hard)) < world.count
    kept = Audited(two_sided(hard + 2), two_sided(hard + 2.0 * member), shadows=shadows)
    gone = Audited(two_sided(hard + 2), two_sided(hard + rng.normal(0, 0.5, len(hard))), shadows=shadows)
    assert verdicts(kept)["lira"] == verdicts(kept)["lira_tpr"] == "fail"
    assert verdicts(kept)["attack"] != "fail"
    assert verdicts(gone)["lira"] == verdicts(gone)["lira_tpr"] == "pass"


@pytest.mark.parametrize(
    ("low", "high", "n", "verdict"),
    [(0.45, 0.55, 9, "pass"), (0.45, 0.55, 4, "undecided"), (0.3, 0.5, 9, "undecided"), (0.61, 0.7, 9, "fail")],
)
def test_a_verdict_follows_from_the_whole_interval(low, high, n, verdict):
    assert verdict_of(low, high, n, 0.4, 0.6) == verdict


def test_what_was_not_measured_decides_nothing():
    assert verdict_of(None, None, 900, 0.4, 0.6) == "undecided"
    assert level_of([]) == "refused"
    only = Finding(test="attack", value=None, low=None, high=None, n=0, at_most=1.0, verdict="undecided")
    assert level_of([only]) == "procedure"
