"""A metric is one row: evidence, gate, report and terminal derive from it what they need."""

import subprocess
import sys

import pytest

from salun_core.cli.output import print_metrics
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.metrics import (
    ADDED,
    CLASSIFIER,
    GENERATED,
    MetricRow,
    Unit,
    extra_metrics,
    functions_of,
    metric_names,
)
from salun_core.evaluation.optional_metrics import AddedMetric, MeasuredModels, measure_optional_metrics
from salun_core.evaluation.optional_metrics import parse_optional_metrics as parsed
from salun_core.gate import Cause, Policy, decide
from salun_core.report import ReportContext, render_report


def surprise(seen):
    """The mean loss on D_f."""
    means = {model: float(by_split["forget"].losses.mean()) for model, by_split in seen.outputs.items()}
    return {"surprise": Metric.of(means, len(seen.outputs["after"]["forget"]))}


TOY = MetricRow(
    name="surprise",
    function=surprise,
    title="Mean surprise",
    meaning="loss on what was forgotten",
    unit=Unit("nats", 1),
    more_is_forgotten=True,
)


def decided(evidence, **rule):
    rules = [{"metric": "surprise", "op": ">=", "value": 1e6, "reason": "it was forgotten", **rule}]
    return decide(evidence, Policy.model_validate({"name": "own", "rules": rules}))


def test_a_metric_is_added_by_one_row(monkeypatch, lab, forgotten_class, capsys):
    monkeypatch.setitem(CLASSIFIER, TOY.name, TOY)
    model, mask, _ = forgotten_class
    evidence = lab.evidence("class", model, mask)
    found = evidence.metrics["surprise"]
    assert found.after > found.before > 0
    decision = decided(evidence)
    assert [refusal.cause for refusal in decision.refusals] == [Cause.NOT_FORGOTTEN]
    assert decided(evidence, op="<=", value=0.0).refusals[0].cause is Cause.OVER_FORGOTTEN
    text = render_report(evidence, decision, ReportContext(model_line="digits", created_at="2026-01-02T03:04:05Z"))
    assert "Mean surprise<small>loss on what was forgotten</small>" in text
    print_metrics(evidence)
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("surprise")]
    assert line == ["surprise", f"{found.before:.4f}", f"{found.after:.4f}", str(found.n)]


def test_an_extra_metric_is_added_by_one_row(monkeypatch, lab, forgotten_class):
    row = MetricRow(name="surprise", function=surprise, title="Mean surprise", extra="amaze")
    monkeypatch.setitem(CLASSIFIER, row.name, row)
    model, mask, _ = forgotten_class
    evidence = lab.evidence("class", model, mask)
    assert "surprise" not in evidence.metrics
    assert "--extra-metrics amaze" in decided(evidence).next
    subject = MeasuredModels({"before": lab.model, "after": model}, *lab.parts("class"), lab.test)
    found = measure_optional_metrics(evidence, parsed("amaze"), subject, None, None)
    assert found.metrics["surprise"].after > 0
    assert found.further.asked == ["amaze"]


def test_a_plug_in_has_the_same_row(monkeypatch, lab, forgotten_class):
    row = MetricRow(title="Ours", unit=Unit("x", 1))
    offered = AddedMetric(lambda subject, seed: Metric.of({"before": 1.0, "after": 2.0}, 3), row)
    monkeypatch.setattr("salun_core.evaluation.optional_metrics.added", lambda name: offered)
    monkeypatch.delitem(ADDED, "ours", raising=False)
    model, _, evidence = forgotten_class
    subject = MeasuredModels({"before": lab.model, "after": model}, *lab.parts("class"), lab.test)
    found = measure_optional_metrics(evidence, {"ours": 1}, subject, None, None)
    assert found.metrics["ours"].after == 2.0
    rule = {"metric": "ours", "op": "<=", "value": 1.0, "reason": "it is small"}
    decision = decide(found, Policy.model_validate({"name": "own", "rules": [rule]}))
    assert [refusal.cause for refusal in decision.refusals] == [Cause.DAMAGED]
    assert "Ours<small>" in render_report(
        found, decision, ReportContext(model_line="digits", created_at="2026-01-02T03:04:05Z")
    )


@pytest.mark.parametrize("rows", [CLASSIFIER, GENERATED], ids=["classifier", "generated"])
def test_every_row_is_complete(rows):
    for name, row in rows.items():
        assert (row.name, bool(row.title), bool(row.meaning)) == (name, True, True)
        assert row.side in ("", *rows)
        assert all(callable(function) for function in functions_of([row]))


def test_rows_of_one_name_agree():
    for name in CLASSIFIER.keys() & GENERATED.keys():
        first, second = CLASSIFIER[name], GENERATED[name]
        assert (first.unit, first.more_is_forgotten, first.side) == (second.unit, second.more_is_forgotten, second.side)


def test_costly_extra_metrics_are_measured_last():
    order = [function.__name__ for function in functions_of(row for rows in extra_metrics().values() for row in rows)]
    assert order == ["decile", "divergence", "tow", "probe", "relearning", "lira", "several_seeds"]


def test_the_table_is_read_without_torch():
    code = "import sys, salun_core.evaluation.metrics as m; print(len(m.metric_names()), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(metric_names())), "False"]
