"""A refusal names the failed rule, its figures, one cause of a closed list, and the next step."""

import json

import pytest

from salun_core.errors import GateRefusedError, IntegrityError
from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import (
    Forgotten,
    Integrity,
    Measured,
    RunFacts,
    TuningFacts,
)
from salun_core.evaluation.metrics import find_row, metric_names
from salun_core.gate import Cause, Expected, GateDecision, Policy, decide, load_policy
from salun_core.steps.outcome import RunState, new_outcome
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import run_key
from salun_core.tasks.classification.tuning import PolicyConstraint, _refusal
from salun_core.tuning import Tuned
from salun_core.tuning.budget import TrialRecord

GOOD = {
    "RA": Metric(before=0.99, after=0.99, n=900),
    "TA": Metric(before=0.95, after=0.94, origin=0.95, n=300, low=0.91, high=0.96),
    "UA_samples": Metric(before=0.0, after=0.08, n=50, low=0.03, high=0.19),
    "UA_unseen": Metric(before=0.05, after=0.06, n=300, low=0.03, high=0.09),
    "attack_auc": Metric(before=0.80, after=0.55, n=50, low=0.45, high=0.65),
    "attack_shape": Metric(before=0.5, after=0.2, n=50, low=0.0, high=0.45),
    "effect": Metric(before=0.0, after=0.25, n=50, low=0.15, high=0.35),
    "change": Metric(before=0.0, after=0.4, n=50, low=0.3, high=0.5),
    "TA_loss": Metric(before=0.2, after=0.25, n=300, low=0.2, high=0.3),
    "RA_loss": Metric(before=0.01, after=0.02, n=900, low=0.01, high=0.03),
}
RUN = RunFacts(method="salun", config={"learning_rate": 0.01, "epochs": 10})


def evidence(kind="samples", run=RUN, integrity=None, **metrics):
    found = {name: metric for name, metric in {**GOOD, **metrics}.items() if metric is not None}
    whole = {"weights": 200, "weights_changed": 50, "frozen_changed": 0, "non_finite": 0, "buffers_changed": 0}
    return Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e", mask="f"),
        forgotten=Forgotten(count=50, train_count=950, kinds=[kind]),
        integrity=Integrity(**{**whole, **(integrity or {})}),
        metrics=found,
        run=run,
    )


def policy(*rules):
    return Policy.model_validate({"name": "own", "rules": [{"reason": "the rule in words", **rule} for rule in rules]})


def only(decision):
    (refusal,) = decision.refusals
    return refusal


def test_a_decision_that_passed_has_no_refusal():
    decision = decide(evidence(), load_policy("classifier"))
    assert decision.passed, decision.summary
    assert (decision.refusals, decision.next) == ([], "")


def test_a_refusal_has_words_figures_cause_and_the_next_step():
    remembered = Metric(before=0.99, after=0.81, n=50, low=0.74, high=0.88)
    decision = decide(evidence(attack_auc=remembered), load_policy("classifier"))
    refusal = only(decision)
    assert refusal.words == "forgotten samples must look like unseen ones, neither more familiar nor less"
    wanted = "attack_auc 0.8100, 95 % interval 0.7400 to 0.8800, required inside 0.5000 ± 0.1000, n 50"
    assert refusal.figures == wanted
    assert refusal.cause is Cause.NOT_FORGOTTEN
    assert "--tune" in refusal.next
    assert "learning_rate=0.02 (it was 0.01)" in refusal.next
    assert decision.next == refusal.next
    for text in (refusal.text, decision.summary):
        assert wanted in text
        assert "not_forgotten" in text


def test_an_adaptive_run_that_was_too_weak_leads_to_salun_and_one_that_was_too_strong_to_another_method():
    run = RunFacts(method="salun_adaptive", config={"learning_rate": 0.003})
    for area, then in (
        (0.81, "unlearn with more strength, such as --method salun with learning_rate=0.006"),
        (0.19, "use another method, such as --method retrain"),
    ):
        found = Metric(before=0.99, after=area, n=50, low=area - 0.05, high=area + 0.05)
        assert decide(evidence(run=run, attack_auc=found), load_policy("classifier")).next.endswith(f"; or {then}")


OWN = {"own": Metric(before=1, after=1, n=9)}
CAUSES = [
    ({"RA": Metric(before=0.99, after=0.90, n=900)}, {"metric": "RA", "op": ">=", "value": 0.95}, "damaged"),
    ({}, {"metric": "attack_auc", "op": "<=", "value": 0.5}, "not_forgotten"),
    ({}, {"metric": "attack_auc", "op": ">=", "value": 0.6}, "over_forgotten"),
    ({}, {"metric": "attack_auc", "op": "within", "value": 0.4, "tolerance": 0.1}, "not_forgotten"),
    ({}, {"metric": "attack_auc", "op": "within", "value": 0.7, "tolerance": 0.1}, "over_forgotten"),
    ({}, {"metric": "UA_samples", "op": "<=", "value": 0.05}, "over_forgotten"),
    ({}, {"metric": "UA_samples", "op": ">=", "value": 0.9}, "not_forgotten"),
    ({}, {"metric": "attack_auc", "op": "<=", "value": 0.6, "judge": "high"}, "too_few_samples"),
    ({}, {"metric": "attack_auc", "op": "<=", "value": 0.6, "min_n": 51}, "too_few_samples"),
    ({"MIA": Metric(before=None, after=None, n=0)}, {"metric": "MIA", "op": ">=", "value": 0.5}, "not_measured"),
    ({}, {"metric": "lira_tpr", "op": "<=", "value": 0.05}, "not_measured"),
    ({}, {"metric": "TA", "op": ">=", "relative_to": {"metric": "TA", "state": "reference"}}, "not_measured"),
    # no model could pass: the model before did not show what was to be forgotten
    (
        {"UA": Metric(before=0.6, after=1.0, n=100)},
        {"metric": "UA", "op": ">=", "relative_to": {"metric": "UA", "state": "before", "offset": 0.5}},
        "not_measured",
    ),
    # a metric of a plug-in: which way its values go is unknown, and a stronger recipe could do more damage
    (OWN, {"metric": "own", "op": "<=", "value": 0, "targets": ["samples"]}, "damaged"),
    (OWN, {"metric": "own", "op": "<=", "value": 0}, "damaged"),
]


@pytest.mark.parametrize(("metrics", "rule", "cause"), CAUSES)
def test_the_cause_follows_from_the_metric_and_the_side_of_the_threshold(metrics, rule, cause):
    refusal = only(decide(evidence(**metrics), policy(rule)))
    assert refusal.cause == cause
    assert "the rule in words" in refusal.words
    assert refusal.next


@pytest.mark.parametrize("metric", [name for name in metric_names() if find_row(name).more_is_forgotten is None])
@pytest.mark.parametrize("op", ["<=", ">="])
def test_what_had_to_be_kept_is_damaged_whatever_kinds_its_rule_is_for(metric, op):
    """`targets` says for which requests a rule holds, not what its metric measures."""
    found = {metric: Metric(before=0.99, after=0.3, n=900)}
    rule = {"metric": metric, "op": op, "value": {"<=": 0.2, ">=": 0.98}[op], "targets": ["samples"]}
    assert only(decide(evidence(**found), policy(rule))).cause is Cause.DAMAGED


@pytest.mark.parametrize(
    ("integrity", "cause", "next_step"),
    [
        ({"weights_changed": 0}, "not_forgotten", "learning_rate=0.02"),
        ({"non_finite": 1}, "damaged", "learning_rate=0.005"),
        ({"frozen_changed": 1}, "integrity", "--mask"),
    ],
)
def test_each_check_that_is_always_enforced_has_a_cause(integrity, cause, next_step):
    refusal = only(decide(evidence(integrity=integrity), load_policy("classifier")))
    assert refusal.cause == cause
    assert next_step in refusal.next


def test_files_of_another_run_are_a_matter_of_integrity():
    refusal = only(decide(evidence(), load_policy("classifier"), Expected(after="0" * 64)))
    assert (refusal.cause, refusal.next) == (
        "integrity",
        "evaluate again with the after at hand: salun evaluate --help",
    )


def test_a_policy_for_other_targets_is_named():
    refusal = only(
        decide(evidence("concept"), policy({"metric": "RA", "op": ">=", "value": 0.5, "targets": ["class"]}))
    )
    assert refusal.cause == "not_measured"
    assert refusal.next == "choose a policy with rules for concept: --policy FILE"


@pytest.mark.parametrize(
    ("metric", "option"),
    [("lira_tpr", "--extra-metrics lira"), ("relearn", "--extra-metrics relearn"), ("ToW", "--extra-metrics tow")],
)
def test_a_metric_that_is_off_by_default_names_its_option(metric, option):
    assert option in only(decide(evidence(), policy({"metric": metric, "op": "<=", "value": 0}))).next


def test_a_lacking_reference_names_its_option():
    rule = {"metric": "TA", "op": ">=", "relative_to": {"metric": "TA", "state": "reference"}}
    assert "--retrain-reference" in only(decide(evidence(), policy(rule))).next


def searched(rules, *trials):
    """Return the decision after a search whose trials had these metrics; a trial without metrics diverged."""
    constraint = PolicyConstraint(policy(*rules), evidence().forgotten)
    records = []
    for number, metrics in enumerate(trials):
        found = constraint({**GOOD, **metrics}) if metrics is not None else None
        measured = {"refused": found.reasons, "causes": found.causes, "distance": 0.1} if found else {}
        state, epochs = ("finished", 1) if found else ("failed", 0)
        fields = {"number": number, "method": "salun", "settings": {}, "epochs": epochs, "epochs_run": 1}
        fields |= {"passes": 1, "seconds": 1.0}
        records.append(TrialRecord.model_validate({**fields, **measured, "state": state}))
    return _refusal(constraint, Tuned(records, 1, 1.0, None, []))


RA = {"metric": "RA", "op": ">=", "value": 0.95}
AREA = {"metric": "attack_auc", "op": "inside", "value": 0.5, "tolerance": 0.1}
SEARCHED = [
    ([RA], [{"RA": Metric(before=0.99, after=0.4, n=900)}], {"damaged"}),
    ([{**RA, "targets": ["samples"]}], [{"RA": Metric(before=0.99, after=0.4, n=900)}], {"damaged"}),
    ([{"metric": "UA_samples", "op": ">=", "value": 0.9}], [{}], {"not_forgotten"}),
    ([{"metric": "UA_samples", "op": "<=", "value": 0.2}], [{"UA_samples": GOOD["RA"]}], {"over_forgotten"}),
    ([AREA], [{"attack_auc": Metric(before=0.8, after=0.1, n=50, low=0.0, high=0.2)}], {"over_forgotten"}),
    # all rules of the nearest trial count, and no rule of another one
    ([{"metric": "UA_samples", "op": ">=", "value": 0.9}, {**RA, "value": 1.0}], [{}], {"not_forgotten", "damaged"}),
    ([RA, AREA], [{"RA": GOOD["UA_samples"], "attack_auc": GOOD["RA"]}, {"RA": GOOD["UA_samples"]}], {"damaged"}),
    ([RA], [None, None], {"damaged"}),
    ([{"metric": "UA_samples", "op": ">=", "value": 0.9}], [None, {}], {"not_forgotten"}),
]


@pytest.mark.parametrize(("rules", "trials", "causes"), SEARCHED)
def test_a_search_without_a_setting_has_the_causes_of_its_nearest_trial(rules, trials, causes):
    decision = searched(rules, *trials)
    assert {refusal.cause for refusal in decision.refusals} == causes
    assert not decision.passed
    assert decision.next.startswith("give a larger --tune-budget")


BOTH = ({"metric": "attack_auc", "op": "<=", "value": 0.5}, {"metric": "RA", "op": ">=", "value": 1.0})


def test_more_and_less_strength_at_once_is_not_advised():
    decision = decide(evidence(), policy(*BOTH))
    assert [refusal.cause for refusal in decision.refusals] == ["not_forgotten", "damaged"]
    assert decision.next == "search for a setting that passes: --tune; or use another method, such as --method retrain"


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (RunFacts(method="retrain"), "retraining cannot be made stronger or gentler"),
        (
            RUN.model_copy(
                update={"tuning": TuningFacts(trials=3, budget="20e", passes=1, seconds=1.0, policy_digest="0")}
            ),
            "--tune-budget (it was 20e)",
        ),
    ],
)
def test_the_next_step_fits_how_the_model_was_made(run, text):
    decision = decide(evidence(run=run), policy(*BOTH))
    assert text in decision.next
    assert "--tune;" not in decision.next


def test_the_error_has_the_same_text_the_next_step_and_the_place_of_the_decision():
    decision = decide(evidence(), policy(*BOTH))
    with pytest.raises(GateRefusedError) as caught:
        decision.require("s3://bucket/runs/run-1/decision.json")
    assert caught.value.why == decision.summary
    assert caught.value.remedy.startswith(decision.next)
    assert "the decision is in s3://bucket/runs/run-1/decision.json" in str(caught.value)
    assert "nothing was published" in str(caught.value)


def test_many_failed_rules_fit_into_an_outcome():
    rules = [{"metric": "RA", "op": ">=", "value": 1 + place / 10, "reason": f"rule {place}"} for place in range(20)]
    decision = decide(evidence(), policy(*rules))
    assert decision.summary.endswith("more failed checks")
    text = f"the gate refused the model: {decision.summary}"
    assert new_outcome("run-1", "faces", RunState.REFUSED, text).text == text


def test_a_decision_without_its_reasons_or_its_level_is_damaged():
    document = json.loads(decide(evidence(), policy(*BOTH)).model_dump_json())
    kept = [{name: value for name, value in item.items() if name != "refusal"} for item in document["verdicts"]]
    for changes in ({"verdicts": kept}, {"passed": True}):
        with pytest.raises(IntegrityError, match="decision.json"):
            parse_stored(GateDecision, json.dumps({**document, **changes}).encode(), "decision.json")


@pytest.mark.s3
def test_a_run_that_was_killed_after_the_refusal_has_the_same_text(store):
    from salun_core.pods.ends import verdict_of
    from salun_core.pods.pod import Pod
    from salun_core.sweeps.runs import RunStatus
    from salun_core.sweeps.settle import Settled

    pod, settled = Pod(store.uri, "faces", "run-1"), Settled("run-1", RunStatus.GATE_REFUSED)
    decision = decide(evidence(), policy(*BOTH))
    store.put_new(run_key("run-1", "decision.json"), decision.model_dump_json().encode())
    outcome = verdict_of(pod, settled)
    assert outcome.text == f"the gate refused the model: {decision.summary}"
    assert outcome.next == f"the next sweep tries another recipe, if there is one; or {decision.next}"
    told = verdict_of(pod, Settled("run-1", RunStatus.GATE_REFUSED, next="next: a gentler recipe")).next
    assert told == f"next: a gentler recipe; or {decision.next}"
    store.put_new(run_key("run-2", "decision.json"), b"damaged")
    assert verdict_of(Pod(store.uri, "faces", "run-2"), settled).text == "the gate refused the model"
