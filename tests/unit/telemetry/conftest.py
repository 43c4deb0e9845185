"""A real Pushgateway of Debian's package on loopback."""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import structlog


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def gateway():
    """The URL of a Pushgateway that keeps nothing on disk."""
    binary = shutil.which("prometheus-pushgateway")
    if binary is None:
        pytest.skip("prometheus-pushgateway is not installed (Debian: apt-get install prometheus-pushgateway)")
    address = f"127.0.0.1:{free_port()}"
    command = [binary, f"--web.listen-address={address}", "--persistence.file=", "--log.level=error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(f"http://{address}/-/ready", process)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(10)


def _wait(url, process):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Pushgateway ended at once"
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the Pushgateway did not get ready in 20 s")


@pytest.fixture
def scrape(gateway):
    """Return what the gateway serves, parsed: {(name, frozen labels): value}; and the raw text."""

    def read():
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{gateway}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        samples = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}
        return samples, text

    return read


@pytest.fixture(autouse=True)
def _own_logging():
    """Each test sets up the logs anew."""
    import logging

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)
