"""Collects the values of a short-lived step and pushes them to a Pushgateway at its end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from salun_core import __version__
from salun_core.telemetry.logs import get_logger
from salun_core.telemetry.metrics import SPECS, check_label, check_metric

TIMEOUT_SECONDS = 5.0
URL_VARIABLE = "PUSHGATEWAY_URL"
PIPELINE_VARIABLE = "SALUN_PIPELINE"
PIPELINE = "salun-unlearning"  # of a step that runs outside of a pipeline


class StepMetrics:
    """Values of one short-lived step, pushed together at its end; its duration counts from construction.

    `clock` returns Unix time, and `timer` a monotonic time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time, timer: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._timer, self._started = clock, timer, timer()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def record(self, name: str, value: float | None, **labels: str) -> None:
        """Set a metric's value, in its unit; None, NaN and infinity are left out.

        `labels` are all labels of the metric but `model_line`, which `push` adds.
        """
        check_metric(name, labels, given_later="model_line")
        if value is not None and math.isfinite(value):
            self._values[name, tuple(sorted(labels.items()))] = float(value)

    def push(self, step: str, model_line: str, pipeline: str | None = None, succeeded: bool = True) -> bool:
        """Push everything to the Pushgateway that `PUSHGATEWAY_URL` names, and return whether it took it.

        A success replaces the whole group {pipeline, step, model}. A failure replaces only what it measured, so that
        the time of the last success stays. `pipeline` defaults to `SALUN_PIPELINE`, which each compiled pipeline sets.
        It never raises, because metrics are not worth failing a run for; a failure is logged as a warning.
        """
        url = os.environ.get(URL_VARIABLE, "").strip()
        if not url:
            return False
        pipeline = pipeline or os.environ.get(PIPELINE_VARIABLE) or PIPELINE
        try:
            self._push(url, {"pipeline": pipeline, "step": step, "model": model_line}, succeeded)
        except Exception as error:  # of the network, or of a wrong URL
            message = f"{type(error).__name__}: {error}"
            get_logger().warning("metrics_push_failed", gateway=_host(url), step=step, error=message)
            return False
        return True

    def _push(self, url: str, group: dict[str, str], succeeded: bool) -> None:
        from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, pushadd_to_gateway

        for key, label in {"pipeline": "pipeline", "step": "step", "model": "model_line"}.items():
            check_label(label, group[key])
        now = self._clock()
        if ("salun_step_duration_seconds", ()) not in self._values:
            self.record("salun_step_duration_seconds", self._timer() - self._started)
        self.record("salun_last_run_timestamp_seconds", now)
        if succeeded:
            self.record("salun_last_success_timestamp_seconds", now)
        self.record("salun_build_info", 1.0, version=__version__)
        registry = CollectorRegistry()
        gauges: dict[str, Gauge] = {}
        for (name, pairs), value in self._values.items():
            spec = SPECS[name]
            if name not in gauges:
                gauges[name] = Gauge(name, spec.help, spec.labels, registry=registry)
            labels = {**dict(pairs), "model_line": group["model"]}
            gauge = gauges[name].labels(**{key: labels[key] for key in spec.labels}) if spec.labels else gauges[name]
            gauge.set(value)
        send = push_to_gateway if succeeded else pushadd_to_gateway
        send(url, job="salun", registry=registry, grouping_key=group, timeout=TIMEOUT_SECONDS)


def _host(url: str) -> str:
    """Return host and port alone: the URL may hold a password."""
    try:
        return urlsplit(url if "//" in url else f"//{url}").netloc.rpartition("@")[2]
    except ValueError:
        return "unreadable"
