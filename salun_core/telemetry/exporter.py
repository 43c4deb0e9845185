"""The long-lived exporter: one thread refreshes a snapshot, and a scrape is answered from memory."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from socketserver import TCPServer, ThreadingMixIn
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from salun_core import __version__
from salun_core.errors import UsageError, unknown_name
from salun_core.telemetry.logs import get_logger
from salun_core.telemetry.metrics import SPECS, check_label

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

INTERVAL_SECONDS = 15.0
PORT = 9400
_STALE_INTERVALS = 5
_STALE_SECONDS = 120.0
_CLIENT_SECONDS = 10.0
_ENDING_SECONDS = 0.5
Sample = tuple[str, Mapping[str, str], float]


class SnapshotLike(Protocol):
    """What the exporter serves: gauges as of any time after the snapshot was taken."""

    def at(self, now: float) -> Iterable[Sample]:
        """Return name, labels and value of each gauge, as of a Unix time."""


@dataclass(frozen=True)
class _Refresh:
    """The last refresh that succeeded: what it took, when by both clocks, and how long it lasted."""

    snapshot: SnapshotLike
    wall: float
    ended: float
    seconds: float


class Exporter(Collector):
    """Refreshes a snapshot and serves it; a refresh that fails leaves the last one in place.

    Args:
        take: takes a snapshot; whatever it raises is a failed refresh.
        interval: seconds between two refreshes.
        clock: gives Unix time in seconds.
        timer: gives a time that never goes back, in seconds.
    """

    def __init__(
        self,
        take: Callable[[], SnapshotLike],
        interval: float = INTERVAL_SECONDS,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take, self._interval, self._clock, self._timer = take, interval, clock, timer
        self._last: _Refresh | None = None
        self._failures = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def refresh(self) -> None:
        """Take a snapshot and serve it from now on.

        Raises:
            Exception: whatever taking it raises; the last snapshot stays.
            UsageError: a metric or label that is none of ours.
        """
        started = self._timer()
        snapshot = self._take()
        now, ended = self._clock(), self._timer()
        for sample in snapshot.at(now):
            check_sample(*sample)
        self._last, self._failures = _Refresh(snapshot, now, ended, ended - started), 0

    def try_refresh(self) -> bool:
        """Refresh and return whether it succeeded; the first failure of a row is logged."""
        try:
            self.refresh()
        except Exception as error:  # whatever the store brings: the exporter lives on
            if not self._failures:
                get_logger().warning("exporter_refresh_failed", error=f"{type(error).__name__}: {error}")
            self._failures += 1
            return False
        return True

    def run(self, stop: Event) -> None:
        """Refresh at once and then every interval, until told to stop."""
        while not stop.is_set():
            self.try_refresh()
            stop.wait(self._interval)

    @property
    def age(self) -> float | None:
        """Seconds since the last refresh that succeeded; None before the first."""
        return None if self._last is None else self._timer() - self._last.ended

    @property
    def healthy(self) -> bool:
        """Whether the last refresh is younger than five intervals, and than two minutes where those are shorter."""
        age = self.age
        return age is not None and age < max(_STALE_INTERVALS * self._interval, _STALE_SECONDS)

    def samples(self) -> Iterator[Sample]:
        """Yield name, labels and value of every gauge as of now."""
        last = self._last
        if last is not None:
            yield from last.snapshot.at(self._clock())
            yield "salun_exporter_last_refresh_timestamp_seconds", {}, last.wall
            yield "salun_exporter_refresh_duration_seconds", {}, last.seconds
        yield "salun_exporter_refresh_failures", {}, self._failures
        yield "salun_build_info", {"version": __version__}, 1.0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges as prometheus-client asks for them, in the order of `SPECS`."""
        families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in self.samples():
            spec = SPECS[name]
            family = families.setdefault(name, GaugeMetricFamily(name, spec.help, labels=spec.labels))
            family.add_metric([labels[label] for label in spec.labels], value)
        yield from (families[name] for name in SPECS if name in families)

    def text(self) -> str:
        """Return what a scrape gets, in the text format of Prometheus."""
        return generate_latest(self._registry).decode()

    def app(self) -> WSGIApplication:
        """Return the web application: `/metrics`, and `/healthz` that is 200 while the snapshot is fresh."""
        metrics = make_wsgi_app(self._registry)

        def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                served: Iterable[bytes] = metrics(environ, start)
                return served
            if path == "/healthz":
                return _plain(start, "200 OK" if self.healthy else "503 Service Unavailable", self._health())
            return _plain(start, "404 Not Found", "here are /metrics and /healthz")

        return answer

    def _health(self) -> str:
        age = self.age
        return "no refresh has succeeded yet" if age is None else f"refreshed {age:.0f} s ago"


def check_sample(name: str, labels: Mapping[str, str], _value: float) -> None:
    """Refuse a gauge that is not in `SPECS`, or a label outside its closed set.

    Raises:
        UsageError: it is one of these.
    """
    if name not in SPECS:
        raise unknown_name("metric", name, SPECS)
    if set(labels) != set(SPECS[name].labels):
        raise UsageError(
            f"the metric {name} takes other labels", f"got {sorted(labels)}", f"give {list(SPECS[name].labels)}"
        )
    for label, value in labels.items():
        check_label(label, value)


def _plain(start: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request; none of them keeps the process from ending."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking the DNS for our own name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as in socketserver
        """Say nothing of a client that hung up or was too slow."""
        get_logger().debug("exporter_client_lost", exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - as in http.server
        """Log no scrape."""


@contextmanager
def serving(exporter: Exporter, host: str = "127.0.0.1", port: int = PORT) -> Iterator[str]:
    """Refresh and serve while the block runs.

    Args:
        exporter: what is served.
        host: the address to listen on; `0.0.0.0` or `::` for all.
        port: the port; 0 for any that is free.

    Yields:
        The URL of the metrics.

    Raises:
        UsageError: nobody can listen there.
    """
    server = _listen(host, port)
    server.set_app(exporter.app())
    stop = Event()
    refreshing = Thread(target=exporter.run, args=(stop,), name="refresh", daemon=True)
    answering = Thread(target=server.serve_forever, args=(0.1,), name="serve", daemon=True)
    refreshing.start()
    answering.start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        refreshing.join(_ENDING_SECONDS)


def _listen(host: str, port: int) -> _Server:
    try:
        return (_ServerV6 if ":" in host else _Server)((host, port), _Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port}", str(error), "choose another --port, or an address of this machine"
        ) from error
