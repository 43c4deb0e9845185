"""The long-lived exporter: one thread refreshes a snapshot, and a scrape is answered from memory.

A scrape never waits for the store: `Exporter.run` is the only caller of the function that reads it, and replaces the
snapshot in one assignment. If a refresh fails or hangs, scrapes get the last snapshot, the number of failures and
the time of the last success; `/healthz` turns to 503 when that is too old.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Event, Thread, Timer
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from salun_core import __version__
from salun_core.errors import UsageError
from salun_core.telemetry.logs import get_logger
from salun_core.telemetry.metrics import SPECS, check_metric

INTERVAL_SECONDS = 15.0
PORT = 9400
_STALE_INTERVALS = 5  # a snapshot is stale after so many intervals,
_STALE_SECONDS = 120.0  # but not before two minutes
CLIENT_SECONDS = 10.0
"""How long a request and its answer may take together, however the client spreads its bytes."""
_ENDING_SECONDS = 0.5  # how long the end waits for a refresh in progress
Sample = tuple[str, Mapping[str, str], float]


class SnapshotLike(Protocol):
    """What the exporter serves: gauges as of any time after the snapshot was taken."""

    def at(self, now: float) -> Iterable[Sample]:
        """Return name, labels and value of each gauge, as of a Unix time."""


@dataclass(frozen=True)
class _Refresh:
    """The last refresh that succeeded: its snapshot, its end by both clocks, and how long it took."""

    snapshot: SnapshotLike
    wall: float
    ended: float
    seconds: float


class Exporter(Collector):
    """Refreshes a snapshot every `interval` seconds and serves it; if a refresh fails, the last snapshot stays.

    Every exception of `take` counts as a failed refresh. `clock` returns Unix time, and `timer` a monotonic time, in
    seconds.
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
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def refresh(self) -> None:
        """Take a snapshot and serve it from now on; if that raises, the last snapshot stays."""
        started = self._timer()
        snapshot = self._take()
        now, ended = self._clock(), self._timer()
        for name, labels, _ in snapshot.at(now):
            check_metric(name, labels)
        self._last, self._failures = _Refresh(snapshot, now, ended, ended - started), 0

    def try_refresh(self) -> bool:
        """Refresh and return whether it succeeded; the first failure in a row is logged."""
        try:
            self.refresh()
        except Exception as error:  # no fault of the store may end the exporter
            if not self._failures:
                get_logger().warning("exporter_refresh_failed", error=f"{type(error).__name__}: {error}")
            self._failures += 1
            return False
        return True

    def run(self, stop: Event) -> None:
        """Refresh at once and then every interval, until `stop` is set."""
        while not stop.is_set():
            self.try_refresh()
            stop.wait(self._interval)

    @property
    def age(self) -> float | None:
        """Seconds since the last refresh that succeeded; None before the first."""
        return None if self._last is None else self._timer() - self._last.ended

    @property
    def healthy(self) -> bool:
        """Whether the last successful refresh is younger than five intervals (at least two minutes)."""
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
        """Yield the gauges for prometheus-client, in the order of `SPECS`."""
        families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in self.samples():
            spec = SPECS[name]
            family = families.setdefault(name, GaugeMetricFamily(name, spec.help, labels=spec.labels))
            family.add_metric([labels[label] for label in spec.labels], value)
        yield from (families[name] for name in SPECS if name in families)

    def text(self) -> str:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry).decode()


# prometheus_client.start_http_server does not fit: it serves metrics on every path, so that /healthz always succeeds;
# a client that sends nothing holds a thread for good; one that hangs up prints a traceback; and the start looks up
# this machine's name in the DNS, which can take seconds in a pod. Its handler is used, which negotiates the format.


def _handler(exporter: Exporter) -> type[BaseHTTPRequestHandler]:
    class Handler(MetricsHandler):
        registry = exporter.registry

        def setup(self) -> None:
            super().setup()
            # A timeout of the socket would begin again with each byte.
            self._cut_off = Timer(CLIENT_SECONDS, _hang_up, (self.connection,))
            self._cut_off.daemon = True
            self._cut_off.start()

        def finish(self) -> None:
            self._cut_off.cancel()
            super().finish()

        def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
            path = urlsplit(self.path).path
            if path == "/metrics":
                super().do_GET()
            elif path == "/healthz":
                age = exporter.age
                text = "no refresh has succeeded yet" if age is None else f"refreshed {age:.0f} s ago"
                self._answer(200 if exporter.healthy else 503, text)
            else:
                self._answer(404, "the paths are /metrics and /healthz")

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(f"{text}\n".encode())

    return Handler


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # the request ended meanwhile
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    """One daemon thread for each request, so that no client keeps the process from ending."""

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own would look up this machine's name

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as in socketserver
        get_logger().debug("exporter_client_lost", exc_info=True)


@contextmanager
def serving(exporter: Exporter, host: str = "127.0.0.1", port: int = PORT) -> Iterator[str]:
    """Refresh and serve while the block runs; yields the URL of the metrics.

    The host `0.0.0.0` or `::` listens on all addresses, and port 0 takes a free one.
    """
    try:
        server = _Server(host, port, _handler(exporter))
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port}", str(error), "choose another --port, or an address of this machine"
        ) from error
    stop = Event()
    refreshing = Thread(target=exporter.run, args=(stop,), name="refresh", daemon=True)
    answering = Thread(target=server.serve_forever, args=(0.1,), name="serve", daemon=True)
    refreshing.start()
    answering.start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}/metrics"
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        refreshing.join(_ENDING_SECONDS)
