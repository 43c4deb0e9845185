"""What the exporter serves: from memory, to the second, and whatever happens to the store."""

import json
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event

import pytest
from prometheus_client.parser import text_string_to_metric_families

from salun_core.errors import StoreError, UsageError
from salun_core.telemetry.exporter import Exporter, serving
from salun_core.telemetry.logs import configure_logging
from salun_core.telemetry.metrics import LABELS, SPECS

RULES = Path(__file__).parents[3] / "manifests" / "prometheus-rules" / "salun-rules.yaml"
EXAMPLES = {
    "model_line": "faces",
    "method": "salun",
    "version": "1.0",
    "status": "queued",
    "stage": "half",
    "reason": "not_due",
    "level": "measured",
}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, now=1_800_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


class Growing:
    """A snapshot of one request that was received at a time."""

    def __init__(self, received=1_800_000_000.0):
        self.received = received

    def at(self, now):
        yield "salun_oldest_request_age_seconds", {}, now - self.received
        yield "salun_requests", {"status": "queued"}, 1


class Everything:
    """A snapshot with every gauge that there is, but those that the exporter adds."""

    def at(self, _now):
        for spec in SPECS.values():
            if not spec.name.startswith("salun_exporter_re") and spec.name not in OWN:
                yield spec.name, {label: EXAMPLES[label] for label in spec.labels}, 1.0


OWN = {
    "salun_exporter_last_refresh_timestamp_seconds",
    "salun_exporter_refresh_duration_seconds",
    "salun_exporter_refresh_failures",
    "salun_build_info",
}


class Broken:
    """Takes snapshots until it is broken."""

    def __init__(self):
        self.error = None
        self.taken = 0

    def __call__(self):
        self.taken += 1
        if self.error:
            raise self.error
        return Growing()


def parsed(text):
    return {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.status, answer.read().decode()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in 20 s"
        time.sleep(0.005)


def health(url):
    try:
        return get(url.replace("/metrics", "/healthz"))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def logged(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_ages_are_as_of_the_scrape_without_a_refresh():
    clock, take = Clock(), Broken()
    exporter = Exporter(take, clock=clock, timer=Clock(0.0))
    exporter.refresh()
    clock.now += 7
    for _ in range(3):
        values = parsed(exporter.text())
    assert values["salun_oldest_request_age_seconds",] == 7
    assert values["salun_exporter_last_refresh_timestamp_seconds",] == 1_800_000_000
    assert values["salun_requests", "queued"] == 1
    assert take.taken == 1


def test_a_failed_refresh_keeps_the_last_snapshot_and_warns_once(capsys):
    configure_logging(json=True)
    take, timer = Broken(), Clock(0.0)
    exporter = Exporter(take, clock=Clock(), timer=timer)
    assert exporter.try_refresh()
    take.error = StoreError("cannot list s3://salun/index", "secret_access_key=hunter2hunter2", "ask")
    assert [exporter.try_refresh() for _ in range(3)] == [False] * 3
    values = parsed(exporter.text())
    assert values["salun_exporter_refresh_failures",] == 3
    assert values["salun_requests", "queued"] == 1
    (line,) = logged(capsys)
    assert (line["event"], line["level"]) == ("exporter_refresh_failed", "warning")
    assert "cannot list" in line["error"]
    assert "hunter2" not in line["error"]
    take.error = None
    assert exporter.try_refresh()
    assert parsed(exporter.text())["salun_exporter_refresh_failures",] == 0


@pytest.mark.parametrize(("interval", "limit"), [(15, 120), (60, 300)])
def test_it_is_healthy_while_its_snapshot_is_fresh(interval, limit):
    timer = Clock(0.0)
    exporter = Exporter(Broken(), interval, timer=timer)
    assert not exporter.healthy
    exporter.refresh()
    timer.now = limit - 1
    assert exporter.healthy
    timer.now = limit
    assert not exporter.healthy


def test_before_the_first_refresh_only_the_exporters_own_metrics_exist():
    values = parsed(Exporter(Broken()).text())
    assert {name for name, *_ in values} == {"salun_exporter_refresh_failures", "salun_build_info"}


@pytest.mark.parametrize(
    "sample",
    [
        ("salun_request", {}, 1),
        ("salun_requests", {"status": "lost"}, 1),
        ("salun_requests", {"status": "queued", "request": "r-1"}, 1),
        ("salun_unlearning_debt_ratio", {"model_line": "Jane Roe"}, 1),
    ],
)
def test_labels_outside_their_closed_set_are_never_served(sample):
    class Odd:
        def at(self, _now):
            yield sample

    exporter = Exporter(Odd)
    with pytest.raises(UsageError):
        exporter.refresh()
    assert {name for name, *_ in parsed(exporter.text())} == {"salun_exporter_refresh_failures", "salun_build_info"}


def test_it_serves_metrics_and_health_and_nothing_else():
    take, timer = Broken(), Clock(0.0)
    exporter = Exporter(take, 0.01, timer=timer)
    with serving(exporter, port=0) as url:
        until(lambda: exporter.age is not None)
        assert parsed(get(url)[1])["salun_requests", "queued"] == 1
        assert health(url) == (200, "refreshed 0 s ago\n")
        take.error = OSError("gone")
        until(lambda: parsed(exporter.text())["salun_exporter_refresh_failures",] >= 3)  # it goes on trying
        timer.now += 120
        assert health(url) == (503, "refreshed 120 s ago\n")
        assert parsed(get(url)[1])["salun_requests", "queued"] == 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(url.replace("/metrics", "/"))
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(url)


def test_a_hanging_refresh_delays_neither_scrape_nor_end():
    begun, release, ended = Event(), Event(), Event()

    def hang():
        begun.set()
        release.wait(20)
        ended.set()
        return Growing()

    with serving(Exporter(hang), port=0) as url:
        assert begun.wait(10)
        assert "salun_build_info" in get(url)[1]
        assert health(url) == (503, "no refresh has succeeded yet\n")
    assert not ended.is_set()
    release.set()


def test_a_client_that_hangs_up_leaves_no_trace(capsys):
    configure_logging(json=True)
    exporter = Exporter(Growing)
    exporter.refresh()
    with serving(exporter, port=0) as url:
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        for sent in (b"", b"GET /metr", b"\x00\xff\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"):
            for linger in (struct.pack("ii", 0, 0), struct.pack("ii", 1, 0)):  # the second resets the connection
                with socket.create_connection(("127.0.0.1", port)) as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.sendall(sent)
                    time.sleep(0.05)  # so that it is being served when we go
        assert get(url)[0] == 200
    assert capsys.readouterr().err == ""


def test_a_client_that_sends_byte_by_byte_is_cut_off(monkeypatch):
    """A limit for each read would never end such a request."""
    monkeypatch.setattr("salun_core.telemetry.exporter.CLIENT_SECONDS", 0.5)
    with serving(Exporter(Growing), port=0) as url:
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(0.05)
            client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            began, ended = time.monotonic(), False
            while not ended and time.monotonic() - began < 20:
                try:
                    client.sendall(b"x")
                    ended = client.recv(1) == b""
                except TimeoutError:
                    continue
                except OSError:  # our next byte met a closed connection
                    ended = True
        assert ended
        assert get(url)[0] == 200


def test_an_unusable_address_is_a_usage_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("192.0.2.1", 0), ("127.0.0.1", 70_000)):
            with pytest.raises(UsageError, match="cannot listen"), serving(Exporter(Growing), host, port):
                pass


def test_it_listens_on_ipv6():
    if not socket.has_ipv6:
        pytest.skip("Python has no IPv6 here")
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with serving(Exporter(Growing), "::1", 0) as url:
        assert get(url)[0] == 200


def _promtool(*args, text=None):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus, from 13 on promtool)")
    done = subprocess.run([tool, *args], input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_promtool_finds_no_fault_in_any_gauge():
    exporter = Exporter(Everything)
    exporter.refresh()
    text = exporter.text()
    assert {name for name, *_ in parsed(text)} == set(SPECS)
    assert _promtool("check", "metrics", text=text) == (0, "")


def test_alert_rules_and_gauges_use_the_same_stages():
    assert {stage for stage in LABELS["stage"] if f'stage="{stage}"' in RULES.read_text()} == {"half", "most"}
