"""The names of all metrics, and the closed sets of their labels' values.

`python -m salun_core.telemetry.metrics` prints the table of the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from salun_core.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Spec:
    """One metric. All are gauges: values that short-lived steps push do not add up."""

    name: str
    help: str
    unit: str
    labels: tuple[str, ...] = ()


_RESULT = ("model_line", "method")
SPECS = {
    spec.name: spec
    for spec in (
        Spec("salun_requests", "Deletion requests by status.", "requests", ("status",)),
        Spec("salun_oldest_request_age_seconds", "Age of the oldest request that is not settled.", "seconds"),
        Spec(
            "salun_requests_by_level",
            "Completed requests by assurance level; damaged: its event cannot be read; not_read: not yet read.",
            "requests",
            ("level",),
        ),
        Spec("salun_requests_overdue", "Requests past their due date that are not settled.", "requests"),
        Spec("salun_forget_accuracy_ratio", "Accuracy on the forget set after unlearning.", "ratio", _RESULT),
        Spec("salun_retain_accuracy_ratio", "Accuracy on the retain set after unlearning.", "ratio", _RESULT),
        Spec("salun_test_accuracy_ratio", "Accuracy on the test set after unlearning.", "ratio", _RESULT),
        Spec(
            "salun_membership_attack_ratio",
            "Share of the forget set that the membership attack classifies as never seen.",
            "ratio",
            _RESULT,
        ),
        Spec("salun_mask_density_ratio", "Share of salient weights in the mask.", "ratio", _RESULT),
        Spec("salun_step_duration_seconds", "Wall-clock time of the step's last run.", "seconds", ("model_line",)),
        Spec("salun_gate_passed", "1 when the gate passed the last run, else 0.", "boolean", _RESULT),
        Spec(
            "salun_assurance_level",
            "1 for the assurance level of the last decision of the gate, else 0; 0 for all when it refused.",
            "boolean",
            (*_RESULT, "level"),
        ),
        Spec("salun_assurance_margin_ratio", "Margin of the equivalence test behind the level.", "ratio", _RESULT),
        Spec("salun_assurance_samples", "Samples behind the assurance level.", "samples", _RESULT),
        Spec("salun_assurance_power_ratio", "Power of the equivalence test behind the level.", "ratio", _RESULT),
        Spec(
            "salun_sweep_skipped",
            "1 for the reason why the last sweep claimed nothing, else 0.",
            "boolean",
            ("model_line", "reason"),
        ),
        Spec(
            "salun_sweep_skipped_due",
            "Due requests that the last sweep left waiting, because another run held the line.",
            "requests",
            ("model_line",),
        ),
        Spec(
            "salun_unlearning_debt_ratio",
            "Share of the training data forgotten since the last full training.",
            "ratio",
            ("model_line",),
        ),
        Spec("salun_runs_since_training", "Unlearning runs since the last full training.", "runs", ("model_line",)),
        Spec("salun_last_run_timestamp_seconds", "Unix time of the last run's end.", "seconds", ("model_line",)),
        Spec(
            "salun_last_success_timestamp_seconds",
            "Unix time of the end of the last run that succeeded.",
            "seconds",
            ("model_line",),
        ),
        Spec(
            "salun_requests_by_deadline",
            "Unsettled requests that are past this stage of their month.",
            "requests",
            ("stage",),
        ),
        Spec(
            "salun_exporter_last_refresh_timestamp_seconds",
            "Unix time of the exporter's last successful refresh.",
            "seconds",
        ),
        Spec(
            "salun_exporter_refresh_duration_seconds",
            "Wall-clock time of the exporter's last successful refresh.",
            "seconds",
        ),
        Spec("salun_exporter_refresh_failures", "Failed refreshes since the last successful one.", "refreshes"),
        Spec("salun_exporter_unreadable_lines", "Model lines whose HEAD or version is damaged.", "lines"),
        Spec("salun_build_info", "Always 1; the version of the code is a label.", "info", ("version",)),
    )
}

# A label value comes from a fixed list, or matches the pattern of a name that an operator chooses: no request, run,
# sample or subject can become a label.
LABELS: dict[str, tuple[str, ...] | re.Pattern[str]] = {
    "pipeline": tuple(
        f"salun-{name}{suffix}"
        for name in ("unlearning", "deletion-sweep", "deletion-sweep-compact")
        for suffix in ("", "-cpu")
    ),
    "step": (
        "claim_requests",
        "fetch_model",
        "compute_mask",
        "unlearn",
        "evaluate",
        "gate_publish",
        "settle_requests",
        "purge",
        "train",
        "run",
    ),
    "model_line": re.compile(r"[a-z0-9][a-z0-9._-]{0,62}"),
    "method": re.compile(r"[a-z][a-z0-9_]{0,31}"),  # a row of a table of methods, or `other`: see `method_label`
    "split": ("train", "validation", "test", "forget", "retain"),
    "status": (
        "received",
        "rejected",
        "on_hold",
        "queued",
        "in_progress",
        "completed",
        "failed",
        "cancelled",
    ),
    "level": ("retrained", "measured", "procedure", "nothing_to_erase", "damaged", "not_read"),
    "reason": ("no_requests", "not_due", "line_held"),
    "stage": ("target", "half", "most"),
    "outcome": ("unlearned", "retrained", "nothing_to_erase"),
    "version": re.compile(r"[0-9][0-9a-z.+-]{0,30}"),
}


def check_metric(name: str, labels: Mapping[str, str], given_later: str = "") -> None:
    """Raise UsageError for a metric that is not in `SPECS`, or that has other labels or values than its own.

    `given_later` is a label that is added when the metric is pushed.
    """
    if name not in SPECS:
        raise unknown_name("metric", name, SPECS)
    for label, value in labels.items():
        check_label(label, value)
    expected = {label for label in SPECS[name].labels if label != given_later}
    if set(labels) != expected:
        raise UsageError(f"the metric {name} takes other labels", f"got {sorted(labels)}", f"give {sorted(expected)}")


def check_label(name: str, value: str) -> None:
    """Raise UsageError for an unknown label, or a value outside its closed set, which could grow without bound."""
    if name not in LABELS:
        raise unknown_name("metric label", name, LABELS)
    allowed = LABELS[name]
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise unknown_name(f"value of the metric label {name}", value, allowed)
    elif not allowed.fullmatch(value):
        raise UsageError(
            f"the metric label {name} cannot be {value!r}", f"it must match {allowed.pattern}", "use its name"
        )


def metrics_table() -> str:
    """Return the table of all metrics in Markdown."""
    head = (
        "# Metrics\n\nAll metrics are gauges. At its end, a step pushes its values to the Pushgateway in "
        "`PUSHGATEWAY_URL`, under the grouping key `pipeline`, `step`, `model` (job `salun`). Scrape the Pushgateway "
        "with `honor_labels: true`. `pipeline` is the pipeline of the run, or `salun-unlearning` outside of pipelines. "
        "`salun exporter` serves the metrics of requests and model lines: see [monitoring](../how-to/monitor.md)."
    )
    lines = ["| name | unit | labels | meaning |", "|---|---|---|---|"]
    lines += [f"| `{s.name}` | {s.unit} | {_listed(s.labels)} | {s.help} |" for s in SPECS.values()]
    lines += ["", "Values of the labels:", "", "| label | values |", "|---|---|"]
    lines += [f"| `{name}` | {_values(allowed)} |" for name, allowed in LABELS.items()]
    return "\n".join([head, "", *lines])


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _values(allowed: tuple[str, ...] | re.Pattern[str]) -> str:
    return _listed(allowed) if isinstance(allowed, tuple) else f"matches `{allowed.pattern}`"


if __name__ == "__main__":
    print(metrics_table())
