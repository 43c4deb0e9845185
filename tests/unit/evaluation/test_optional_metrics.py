"""Measurements that are off by default: their names, and what they add to the evidence."""

import json

import pytest

from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import OptionalMetricFacts, TuningFacts
from salun_core.evaluation.optional_metrics import (
    Subject,
    measure_optional_metrics,
    parse_optional_metrics,
    require_reference,
)


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
        ("tow=2", "counts nothing"),
    ],
)
def test_wrong_names_and_counts_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_optional_metrics(text)


def test_a_distance_needs_its_reference():
    require_reference({"kl": 1}, True)
    with pytest.raises(UsageError, match="kl and tow cannot be measured"):
        require_reference({"kl": 1, "tow": 1, "probe": 1}, False)


def never(*_):
    raise AssertionError("nobody asked for it")


def test_only_what_was_asked_for_is_measured(lab, forgotten_class):
    model, _, evidence = forgotten_class
    forget, retain = lab.parts("class")
    kept = lab.test.select([i for i, label in enumerate(lab.test.labels.tolist()) if label != 3])
    subject = Subject({"before": lab.model, "after": model}, forget, retain, kept)
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
    subject = Subject({"before": lab.model, "after": model}, forget, retain, lab.test)
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
    assert document.pop("generation") is document.pop("further") is document["run"].pop("tuning") is None
    assert document["run"].pop("moved") is None
    assert evidence.digest == sha256_bytes(canonical_json(document))
    further = evidence.model_copy(update={"further": OptionalMetricFacts(asked=["probe"], seconds=1.0)})
    facts = TuningFacts(trials=1, budget="20e", passes=1, seconds=1.0, policy_digest="p")
    tuned = evidence.model_copy(update={"run": evidence.run.model_copy(update={"tuning": facts})})
    assert len({evidence.digest, further.digest, tuned.digest}) == 3
