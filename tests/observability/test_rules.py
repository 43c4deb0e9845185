"""Alerts fire when they should and say what to do; what is recorded and shown is there to be scraped."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from salun_core.registry.manifest import DEBT_LIMIT, RUNS_LIMIT
from salun_core.telemetry.metrics import LABELS, SPECS, check_label

ROOT = Path(__file__).parents[2]
RULES = ROOT / "manifests" / "prometheus-rules" / "salun-rules.yaml"
OBJECT = ROOT / "manifests" / "prometheus-operator" / "prometheusrule.yaml"
DASHBOARD = ROOT / "manifests" / "60-grafana-dashboard.yaml"
CASES = Path(__file__).with_name("salun-rules.test.yaml")
CRD = ROOT.parent / "shared" / "crds" / "prom-prometheusrules.yaml"

GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALL = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in ALL if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in ALL if "record" in rule}
BOARD = json.loads(yaml.safe_load(DASHBOARD.read_text())["data"]["salun.json"])
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
SHOWN = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [*dict.fromkeys([rule["expr"] for rule in ALL] + SHOWN)]
WORDS = {
    "min_over_time",
    "changes",
    "bool",
    "sum",
    "max",
    "min",
    "count",
    "by",
    "on",
    "unless",
    "or",
    "and",
    "group_left",
    "time",
    "absent",
}
GROUPING = {"step", "pipeline", "model"}


def names(expr):
    """The series that an expression asks for: its words without selectors, labels and PromQL's own."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on) \([^)]*\)", " ", expr)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - WORDS


def selectors(expr):
    return re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', expr)


def test_the_alerts_fire_when_they_should_and_not_before(promtool):
    for command in (("check", "rules", RULES), ("test", "rules", CASES)):
        code, said = promtool(*command)
        assert code == 0, said


def test_the_alerts_use_the_debt_limits_of_the_library():
    limits = {alert: float(ALERTS[alert]["expr"].split()[-1]) for alert in ("SalunDebtHigh", "SalunRunsHigh")}
    assert limits == {"SalunDebtHigh": DEBT_LIMIT, "SalunRunsHigh": RUNS_LIMIT}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_tried_both_quiet_and_firing(alert):
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test.get("alert_rule_test", [])]
    assert {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert} == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert):
    rule, text = ALERTS[alert], (ROOT / "docs" / "how-to" / "monitor.md").read_text()
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/how-to/monitor.md#{alert.lower()}"
    assert f"\n### {alert}\n" in text
    assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= {"model_line", "step"}


def test_the_page_describes_only_alerts_that_exist():
    text = (ROOT / "docs" / "how-to" / "monitor.md").read_text()
    assert set(re.findall(r"\bSalun[A-Z]\w+", text)) == set(ALERTS)


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_only_series_and_labels_that_exist_are_asked_for(expr):
    found = names(expr)
    assert found <= set(SPECS) | set(RECORDED)
    known = GROUPING.union(*(SPECS[name].labels for name in found if name in SPECS), {"model_line"})
    for label, operator, value in selectors(expr):
        assert label in known
        if isinstance(LABELS[label], tuple):
            for choice in value.split("|") if "~" in operator else filter(None, [value]):
                check_label(label, choice)


def test_every_metric_is_on_the_dashboard():
    shown, deeper = set(), set().union(*(names(expr) for expr in SHOWN))
    while deeper:  # what is recorded may rest on what is recorded
        shown |= deeper
        deeper = set().union(*(names(RECORDED[name]) for name in deeper if name in RECORDED))
    assert set(SPECS) <= shown


def test_the_panels_lie_beside_each_other():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_the_generated_manifests_are_in_step(monkeypatch):
    pytest.importorskip("grafana_foundation_sdk")
    monkeypatch.setattr(sys, "path", [str(ROOT / ".ci"), *sys.path])
    import observability

    for path, text in observability.documents():
        assert (ROOT / path).read_text() == text, f"{path}: make generated"


def test_the_operators_object_holds_the_same_rules_and_fits_its_schema():
    document = yaml.safe_load(OBJECT.read_text())
    assert document["spec"]["groups"] == GROUPS
    if not CRD.is_file():
        pytest.skip("the custom resource's schema is not beside the checkout")
    jsonschema = pytest.importorskip("jsonschema")
    text = CRD.read_text().replace("^(?i)", "(?i)^")  # Go's regular expressions take flags anywhere
    (version,) = [v for v in yaml.safe_load(text)["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(document, version["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_prometheus_parses_every_expression(prometheus, expr):
    answer = prometheus.get("format_query", query=expr)
    assert answer["status"] == "success", answer


def test_prometheus_refuses_what_is_no_expression(prometheus):
    assert prometheus.get("format_query", query="max by (salun_requests")["status"] == "error"


@pytest.mark.parametrize("expr", [*dict.fromkeys([*SHOWN, *RECORDED])])
def test_every_panel_and_recording_finds_what_is_really_pushed_and_served(prometheus, expr):
    assert prometheus.query(expr.replace("$line", "faces"))


def test_the_rules_judge_what_is_really_pushed_and_served(prometheus):
    rules = prometheus.rules()
    assert {name: rule["health"] for name, rule in rules.items()} == dict.fromkeys([*ALERTS, *RECORDED], "ok")
    states = {name: rule["state"] for name, rule in rules.items() if rule["type"] == "alerting"}
    waiting = {"SalunRequestHalfOfMonth", "SalunRequestNearDue", "SalunSweepNotRun", "SalunDebtHigh", "SalunRunsHigh"}
    quiet = {"SalunSweepUnknown", "SalunStepFailed", "SalunLineUnreadable", "SalunExporterStale"}
    assert {name for name, state in states.items() if state == "pending"} == waiting
    assert {name for name, state in states.items() if state == "inactive"} == quiet
    assert states["SalunSweepSkipped"] == "firing"
    (debt,) = prometheus.query("model_line:salun_unlearning_debt_ratio:max")
    assert (debt["metric"]["model_line"], debt["value"][1]) == ("faces", "0.06")
