"""Collects the values of a short-lived step and pushes them to a Pushgateway at its end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from salun_core import __version__
from salun_core.errors import UsageError, unknown_name
from salun_core.telemetry.logs import get_logger
from salun_core.telemetry.metrics import LABELS, SPECS, check_label

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

TIMEOUT_SECONDS = 5.0
URL_VARIABLE = "PUSHGATEWAY_URL"
PIPELINE_VARIABLE = "SALUN_PIPELINE"
PIPELINE = "salun-unlearning"  # of a step that no pipeline runs


class _Metric(Protocol):
    @property
    def after(self) -> float | None: ...


class _Run(Protocol):
    @property
    def method(self) -> str: ...

    @property
    def density(self) -> float | None: ...


class EvidenceLike(Protocol):
    """The part of `Evidence` that is told as metrics."""

    @property
    def metrics(self) -> Mapping[str, _Metric]:
        """Measured shares by name."""

    @property
    def run(self) -> _Run:
        """How the model was made."""


class DecisionLike(Protocol):
    """The part of `GateDecision` that is told as metrics."""

    @property
    def passed(self) -> bool:
        """Whether the gate passed."""


class StepMetrics:
    """Values of one short-lived step, pushed all at once at its end.

    Args:
        clock: gives Unix time in seconds.
        timer: gives a time that never goes back, in seconds; the step's duration counts from construction.
    """

    def __init__(self, clock: Callable[[], float] = time.time, timer: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._timer, self._started = clock, timer, timer()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def record(self, name: str, value: float | None, **labels: str) -> None:
        """Set a metric's value.

        Args:
            name: one of `SPECS`.
            value: in the metric's unit; None and NaN are left out.
            labels: all of the metric's labels but `model_line`, which the push knows.

        Raises:
            UsageError: an unknown name or label, a label that is missing, or a value outside its closed set.
        """
        if name not in SPECS:
            raise unknown_name("metric", name, SPECS)
        for label, text in labels.items():
            check_label(label, text)
        wanted = {label for label in SPECS[name].labels if label != "model_line"}
        if set(labels) != wanted:
            raise UsageError(f"the metric {name} takes other labels", f"got {sorted(labels)}", f"give {sorted(wanted)}")
        if value is not None and math.isfinite(value):
            self._values[name, tuple(sorted(labels.items()))] = float(value)

    def record_evidence(self, evidence: EvidenceLike, decision: DecisionLike | None = None) -> None:
        """Set the metrics that evidence and the gate's decision give.

        Args:
            evidence: measured shares; one that is missing is left out.
            decision: the gate's answer, where there is one.
        """
        known, method = LABELS["method"], evidence.run.method
        label = method if isinstance(known, tuple) and method in known else "other"

        def after(name: str) -> float | None:
            return evidence.metrics[name].after if name in evidence.metrics else None

        wrong = after("UA")
        self.record("salun_forget_accuracy_ratio", None if wrong is None else 1.0 - wrong, method=label)
        self.record("salun_retain_accuracy_ratio", after("RA"), method=label)
        self.record("salun_test_accuracy_ratio", after("TA"), method=label)
        self.record("salun_membership_attack_ratio", after("MIA"), method=label)
        self.record("salun_mask_density_ratio", evidence.run.density, method=label)
        self.record("salun_gate_passed", None if decision is None else float(decision.passed), method=label)

    def push(self, step: str, model_line: str, pipeline: str | None = None, succeeded: bool = True) -> bool:
        """Push everything to the Pushgateway that `PUSHGATEWAY_URL` names.

        A success replaces the whole group {pipeline, step, model}. A failure replaces only what it measured, so
        that the time of the last success stays.

        Args:
            step: name of the step.
            model_line: name of the model line.
            pipeline: name of the pipeline; else what `SALUN_PIPELINE` says, which each compiled pipeline sets.
            succeeded: whether the step did its work.

        Returns:
            Whether the gateway took it; False too where no gateway is named. It never raises: a metric is not
            worth a run. Each failure is logged as a warning.
        """
        url = os.environ.get(URL_VARIABLE, "").strip()
        if not url:
            return False
        pipeline = pipeline or os.environ.get(PIPELINE_VARIABLE) or PIPELINE
        try:
            self._push(url, {"pipeline": pipeline, "step": step, "model": model_line}, succeeded)
        except Exception as error:  # whatever the network or a bad URL brings
            get_logger().warning("metrics_push_failed", gateway=_host(url), step=step, error=_say(error))
            return False
        return True

    def _push(self, url: str, group: dict[str, str], succeeded: bool) -> None:
        from prometheus_client import push_to_gateway, pushadd_to_gateway

        check_label("pipeline", group["pipeline"])
        check_label("step", group["step"])
        check_label("model_line", group["model"])
        send = push_to_gateway if succeeded else pushadd_to_gateway
        registry = self._registry(group["model"], succeeded)
        send(url, job="salun", registry=registry, grouping_key=group, timeout=TIMEOUT_SECONDS)

    def _registry(self, model_line: str, succeeded: bool) -> CollectorRegistry:
        from prometheus_client import CollectorRegistry, Gauge

        self._add_times(succeeded)
        registry = CollectorRegistry()
        gauges: dict[str, Gauge] = {}
        for (name, pairs), value in self._values.items():
            spec = SPECS[name]
            if name not in gauges:
                gauges[name] = Gauge(name, spec.help, spec.labels, registry=registry)
            labels = {**dict(pairs), "model_line": model_line}
            gauge = gauges[name].labels(**{key: labels[key] for key in spec.labels}) if spec.labels else gauges[name]
            gauge.set(value)
        return registry

    def _add_times(self, succeeded: bool) -> None:
        now = self._clock()
        if ("salun_step_duration_seconds", ()) not in self._values:
            self.record("salun_step_duration_seconds", self._timer() - self._started)
        self.record("salun_last_run_timestamp_seconds", now)
        if succeeded:
            self.record("salun_last_success_timestamp_seconds", now)
        self.record("salun_build_info", 1.0, version=__version__)


def _host(url: str) -> str:
    """Return host and port alone: the URL may hold a password."""
    try:
        return urlsplit(url if "//" in url else f"//{url}").netloc.rpartition("@")[2]
    except ValueError:
        return "unreadable"


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
