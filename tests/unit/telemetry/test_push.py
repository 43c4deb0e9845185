"""Names, label sets, and the push to a real Pushgateway."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from salun_core import __version__
from salun_core.errors import UsageError
from salun_core.steps.claim import claim_requests
from salun_core.steps.context import record_assurance, record_evidence
from salun_core.storage.leases import release
from salun_core.sweeps.claim import Skipped
from salun_core.sweeps.heartbeat import hold_line
from salun_core.tasks.line import OpenLine
from salun_core.telemetry import metrics as names
from salun_core.telemetry.push import StepMetrics
from tests.support import toy_line as toy

ROOT = Path(__file__).parents[3]
PUBLISHED = [
    "salun_requests",
    "salun_oldest_request_age_seconds",
    "salun_requests_by_level",
    "salun_requests_overdue",
    "salun_forget_accuracy_ratio",
    "salun_retain_accuracy_ratio",
    "salun_test_accuracy_ratio",
    "salun_membership_attack_ratio",
    "salun_mask_density_ratio",
    "salun_step_duration_seconds",
    "salun_gate_passed",
    "salun_assurance_level",
    "salun_assurance_margin_ratio",
    "salun_assurance_samples",
    "salun_assurance_power_ratio",
    "salun_sweep_skipped",
    "salun_sweep_skipped_due",
    "salun_unlearning_debt_ratio",
    "salun_runs_since_training",
    "salun_last_run_timestamp_seconds",
    "salun_last_success_timestamp_seconds",
    "salun_requests_by_deadline",
    "salun_exporter_last_refresh_timestamp_seconds",
    "salun_exporter_refresh_duration_seconds",
    "salun_exporter_refresh_failures",
    "salun_exporter_unreadable_lines",
    "salun_build_info",
]


def evidence(method="salun", density=0.5, **after):
    shares = {name: SimpleNamespace(after=value) for name, value in after.items()}
    return SimpleNamespace(metrics=shares, run=SimpleNamespace(method=method, density=density))


def group(samples, step, model):
    """Values of one group by name; the gateway's own series left out."""
    return {
        name: value
        for (name, labels), value in samples.items()
        if {("step", step), ("model", model)} <= labels and name.startswith("salun_")
    }


def test_metric_names_are_exactly_the_published_ones():
    assert list(names.SPECS) == PUBLISHED
    for spec in names.SPECS.values():
        assert set(spec.labels) <= set(names.LABELS)
        assert spec.unit not in ("ratio", "seconds") or spec.name.endswith(f"_{spec.unit}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_id", "r-1"),
        ("subject", "x"),
        ("method", "a prompt of somebody"),
        ("status", "overdue"),
        ("step", "unlearn-0001"),
        ("pipeline", "salun-unlearning-x7k2p"),
        ("split", ""),
        ("model_line", "UPPER"),
        ("model_line", "-leading"),
        ("model_line", "a/b"),
        ("model_line", "line\n"),
        ("model_line", ""),
        ("model_line", "a" * 64),
        ("version", "sha-" + "f" * 64),
    ],
)
def test_labels_outside_their_closed_set_are_refused(name, value):
    with pytest.raises(UsageError) as caught:
        names.check_label(name, value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_line", "a" * 63), ("model_line", "0.cifar_10-x"), ("method", "salun"), ("version", __version__)],
)
def test_labels_in_their_closed_set_are_accepted(name, value):
    names.check_label(name, value)


def test_a_wrong_metric_name_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'salun_gate_passed'"):
        StepMetrics().record("salun_gate_pased", 1.0, method="salun")


@pytest.mark.parametrize("labels", [{}, {"method": "salun", "split": "test"}, {"status": "queued"}])
def test_a_metric_takes_exactly_its_labels(labels):
    with pytest.raises(UsageError, match="takes other labels"):
        StepMetrics().record("salun_gate_passed", 1.0, **labels)


def test_the_documented_table_is_current():
    made = subprocess.run(
        [sys.executable, "-m", "salun_core.telemetry.metrics"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert made.stderr == ""
    assert made.stdout == (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(salun_\w+)`", made.stdout, re.MULTILINE) == PUBLISHED


def test_a_push_reaches_a_real_gateway(gateway, scrape, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    ticks = iter([100.0, 103.5])
    step = StepMetrics(clock=lambda: 1_790_000_000.0, timer=lambda: next(ticks))
    record_evidence(step, evidence(UA=0.25, RA=0.99, TA=0.9, MIA=0.125), SimpleNamespace(passed=True))
    step.record("salun_unlearning_debt_ratio", 0.02)
    assert step.push("evaluate", "cifar-10") is True
    samples, _ = scrape()
    assert group(samples, "evaluate", "cifar-10") == {
        "salun_forget_accuracy_ratio": 0.75,
        "salun_retain_accuracy_ratio": 0.99,
        "salun_test_accuracy_ratio": 0.9,
        "salun_membership_attack_ratio": 0.125,
        "salun_mask_density_ratio": 0.5,
        "salun_gate_passed": 1.0,
        "salun_unlearning_debt_ratio": 0.02,
        "salun_step_duration_seconds": 3.5,
        "salun_last_run_timestamp_seconds": 1_790_000_000.0,
        "salun_last_success_timestamp_seconds": 1_790_000_000.0,
        "salun_build_info": 1.0,
    }
    key = {
        ("job", "salun"),
        ("instance", ""),
        ("pipeline", "salun-unlearning"),
        ("step", "evaluate"),
        ("model", "cifar-10"),
    }
    own = {("model_line", "cifar-10"), ("method", "salun")}
    assert ("salun_gate_passed", frozenset(key | own)) in samples
    assert ("salun_build_info", frozenset({*key, ("version", __version__)})) in samples


def test_a_second_push_replaces_the_group_and_no_other(gateway, scrape, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    first, other, second = StepMetrics(), StepMetrics(), StepMetrics()
    record_evidence(first, evidence(RA=0.5, TA=0.5))
    record_evidence(other, evidence(RA=0.7))
    record_evidence(second, evidence(method="retrain", density=None, RA=0.6))
    assert first.push("evaluate", "replaced")
    assert other.push("evaluate", "kept")
    assert second.push("evaluate", "replaced")
    samples, _ = scrape()
    found = group(samples, "evaluate", "replaced")
    assert found["salun_retain_accuracy_ratio"] == 0.6
    assert "salun_test_accuracy_ratio" not in found
    assert "salun_mask_density_ratio" not in found
    assert group(samples, "evaluate", "kept")["salun_retain_accuracy_ratio"] == 0.7


def test_a_failed_run_keeps_the_time_of_the_last_success(gateway, scrape, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    assert StepMetrics(clock=lambda: 1000.0).push("unlearn", "line-a")
    assert StepMetrics(clock=lambda: 2000.0).push("unlearn", "line-a", succeeded=False)
    found = group(scrape()[0], "unlearn", "line-a")
    assert found["salun_last_success_timestamp_seconds"] == 1000.0
    assert found["salun_last_run_timestamp_seconds"] == 2000.0


def test_missing_values_are_left_out(gateway, scrape, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    step = StepMetrics()
    record_evidence(step, evidence(density=None, UA=None, RA=float("nan"), TA=0.0, MIA=float("inf")), None)
    assert step.push("evaluate", "sparse")
    found = group(scrape()[0], "evaluate", "sparse")
    assert {name for name in found if name.endswith("_ratio")} == {"salun_test_accuracy_ratio"}
    assert "salun_gate_passed" not in found


@pytest.mark.s3
def test_a_sweep_that_does_nothing_says_why(gateway, scrape, monkeypatch, store):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    toy.begin(store, "idle")

    def pushed():
        claim_requests(store, OpenLine(store, "idle"), "run-1", toy.policy(min_requests=2))
        found = {}
        for (name, labels), value in scrape()[0].items():
            if {("step", "claim_requests"), ("model_line", "idle")} <= labels:
                found[dict(labels).get("reason") or name] = value
        return {reason: found[reason] for reason in names.LABELS["reason"]}, found["salun_sweep_skipped_due"]

    assert pushed() == ({"no_requests": 1, "not_due": 0, "line_held": 0}, 0)
    ledger = toy.sweep_context(store).ledger
    ledger.submit("r-1", "idle", toy.target(1))
    assert pushed() == ({"no_requests": 0, "not_due": 1, "line_held": 0}, 0)
    release(store, "idle", "run-1")
    hold_line(store, "idle", "run-9")
    ledger.submit("r-2", "idle", toy.target(2))
    assert pushed() == ({"no_requests": 0, "not_due": 0, "line_held": 1}, 2)


def test_the_reasons_of_the_metric_are_those_of_a_claim():
    assert names.LABELS["reason"] == tuple(Skipped)


def test_an_unknown_method_becomes_other(gateway, scrape, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    step = StepMetrics()
    record_evidence(step, evidence(method="somebody's name", RA=1.0), SimpleNamespace(passed=False))
    assert step.push("gate_publish", "elsewhere", pipeline="salun-deletion-sweep")
    samples, text = scrape()
    assert "somebody" not in text
    labels = next(
        dict(labels)
        for (name, labels), _ in samples.items()
        if name == "salun_gate_passed" and ("model", "elsewhere") in labels
    )
    assert labels["method"] == "other"
    assert labels["pipeline"] == "salun-deletion-sweep"


def test_the_pipeline_label_names_the_running_pipeline(gateway, scrape, monkeypatch, capsys):
    """What the compiled pipelines set; outside of them it is the unlearning."""
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    for value in ("", "salun-deletion-sweep", "salun-deletion-sweep-cpu"):
        monkeypatch.setenv("SALUN_PIPELINE", value)
        assert StepMetrics().push("compute_mask", "labelled")
    assert StepMetrics().push("compute_mask", "labelled", pipeline="salun-unlearning-cpu")
    labels = [dict(labels) for (name, labels) in scrape()[0] if name == "salun_build_info"]
    found = {label["pipeline"] for label in labels if label["model"] == "labelled"}
    assert found == {
        "salun-unlearning",
        "salun-deletion-sweep",
        "salun-deletion-sweep-cpu",
        "salun-unlearning-cpu",
    }
    capsys.readouterr()
    monkeypatch.setenv("SALUN_PIPELINE", "salun-unlearning-x7k2p")
    assert StepMetrics().push("compute_mask", "labelled") is False
    assert "metrics_push_failed" in capsys.readouterr().err


def test_every_pipeline_that_ships_has_a_label():
    shipped = {path.stem for path in (ROOT / "pipelines" / "compiled").glob("*.yaml")}
    assert shipped == set(names.LABELS["pipeline"])


def test_promtool_finds_no_fault(gateway, scrape, monkeypatch):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus, from 13 on promtool)")
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    step = StepMetrics()
    for spec in names.SPECS.values():
        labels = {
            label: {
                "method": "salun",
                "status": "queued",
                "stage": "half",
                "version": "1.0",
                "reason": "not_due",
                "level": "measured",
            }[label]
            for label in spec.labels
            if label != "model_line"
        }
        step.record(spec.name, 1.0, **labels)
    assert step.push("run", "all-metrics")
    ours = [line for line in scrape()[1].splitlines() if re.match(r"(# (HELP|TYPE) )?salun_", line)]
    assert {re.match(r"# TYPE (\w+) gauge", line).group(1) for line in ours if line.startswith("# TYPE")} == set(
        PUBLISHED
    )
    checked = subprocess.run(
        [promtool, "check", "metrics"], input="\n".join(ours) + "\n", capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def _closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_a_gateway_nothing_is_pushed_or_logged(monkeypatch, capsys):
    monkeypatch.delenv("PUSHGATEWAY_URL", raising=False)
    assert StepMetrics().push("evaluate", "line") is False
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("broken", ["down", "not a URL", "bad port", "label", "step"])
def test_a_failed_push_is_logged_once_and_never_raises(broken, monkeypatch, capsys):
    urls = {"not a URL": "ftp//:nowhere:x", "bad port": "http://127.0.0.1:99999999"}
    monkeypatch.setenv("PUSHGATEWAY_URL", urls.get(broken, f"http://somebody:hidden@127.0.0.1:{_closed_port()}"))
    monkeypatch.setenv("SALUN_LOG", "json")
    step, line = {"label": ("evaluate", "No Good"), "step": ("another", "line")}.get(broken, ("evaluate", "line"))
    assert StepMetrics().push(step, line) is False
    out, err = capsys.readouterr()
    assert out == ""
    lines = [json.loads(line) for line in err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [("metrics_push_failed", "warning")]
    assert lines[0]["error"]
    assert "hidden" not in err


def test_a_refusal_by_the_gateway_is_a_failed_push(gateway, monkeypatch, capsys):
    monkeypatch.setenv("PUSHGATEWAY_URL", f"{gateway}/nowhere")
    assert StepMetrics().push("evaluate", "line") is False
    assert "HTTPError" in capsys.readouterr().err


def test_the_level_of_a_decision_and_its_figures_are_pushed(gateway, scrape, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", gateway)
    step = StepMetrics()
    record_assurance(step, "salun", SimpleNamespace(level="procedure", margin=0.1, n=5, power=None))
    assert step.push("gate_publish", "leveled")
    samples, _ = scrape()
    levels = {
        dict(labels)["level"]: value
        for (name, labels), value in samples.items()
        if name == "salun_assurance_level" and ("model", "leveled") in labels
    }
    assert levels == {"retrained": 0.0, "measured": 0.0, "procedure": 1.0, "nothing_to_erase": 0.0}
    found = group(samples, "gate_publish", "leveled")
    assert (found["salun_assurance_margin_ratio"], found["salun_assurance_samples"]) == (0.1, 5.0)
    assert "salun_assurance_power_ratio" not in found
