"""A real Prometheus that evaluates the rules that ship, over a real Pushgateway and the exporter."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from salun_core.requests.gauges import LineGauges, Snapshot, stages
from salun_core.requests.schema import Status
from salun_core.steps.context import record_assurance, record_evidence
from salun_core.sweeps.claim import Skipped
from salun_core.telemetry.exporter import Exporter, serving
from salun_core.telemetry.push import StepMetrics

RULES = Path(__file__).parents[2] / "manifests" / "prometheus-rules" / "salun-rules.yaml"
HOUR = 3600


class Prometheus:
    """Asks a server over HTTP."""

    def __init__(self, url):
        self.url = url

    def get(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def query(self, expr):
        answer = self.get("query", query=expr)
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    def rules(self):
        groups = self.get("rules")["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def evaluated(self):
        """The time since when every rule was evaluated."""
        return min(datetime.fromisoformat(rule["lastEvaluation"]) for rule in self.rules().values())


@pytest.fixture(scope="session")
def promtool():
    """Run promtool; gives its exit code and what it said."""
    tool = needed("promtool", "prometheus")

    def run(*args):
        done = subprocess.run([tool, *map(str, args)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def needed(name, package):
    tool = shutil.which(name)
    if tool is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install {package})")
    return tool


@contextmanager
def running(command, url):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is None and ready(url), f"{command[0]} did not get ready")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def ready(url):
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
            return True
    except OSError:
        return False


def until(condition, complaint):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)


def snapshot():
    """A ledger with one request that is overdue, and a line that is deep in debt."""
    received = datetime.now(UTC) - timedelta(days=40)
    passing = {stage: [moment.timestamp()] for stage, moment in stages(received).items()}
    counts = {Status.QUEUED: 1, Status.FAILED: 1, Status.COMPLETED: 8}
    return Snapshot(
        counts=counts,
        received=received.timestamp(),
        passing=passing,
        levels={"measured": 5, "procedure": 3},
        lines={"faces": LineGauges(0.06, 11, time.time() - HOUR)},
        unreadable=0,
    )


def push_steps():
    """What the steps of a refused run push, and a sweep of two days ago."""
    shares = {name: SimpleNamespace(after=value) for name, value in {"UA": 0.2, "RA": 1, "TA": 0.9, "MIA": 0.5}.items()}
    evidence = SimpleNamespace(metrics=shares, run=SimpleNamespace(method="salun", density=0.5))
    evaluated = StepMetrics()
    record_evidence(evaluated, evidence)
    assert evaluated.push("evaluate", "faces")
    refused = StepMetrics()
    record_evidence(refused, evidence, SimpleNamespace(passed=False))
    refused.record("salun_unlearning_debt_ratio", 0.9)
    assert refused.push("gate_publish", "faces", pipeline="salun-deletion-sweep", succeeded=False)
    earlier = StepMetrics(clock=lambda: time.time() - 48 * HOUR)
    record_evidence(earlier, evidence, SimpleNamespace(passed=True))
    record_assurance(earlier, "salun", SimpleNamespace(level="measured", margin=0.1, n=200, power=0.9))
    assert earlier.push("gate_publish", "faces", pipeline="salun-unlearning-cpu")
    sweep = StepMetrics(clock=lambda: time.time() - 48 * HOUR)
    assert sweep.push("settle_requests", "faces", pipeline="salun-deletion-sweep")
    push_skipped_sweep()


def push_skipped_sweep():
    """What a sweep pushes that found two due requests and another run on the line."""
    claimed = StepMetrics()
    for reason in Skipped:
        claimed.record("salun_sweep_skipped", float(reason is Skipped.LINE_HELD), reason=reason)
    claimed.record("salun_sweep_skipped_due", 2)
    assert claimed.push("claim_requests", "faces", pipeline="salun-deletion-sweep")


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory):
    """A Prometheus that scraped both and evaluated every rule."""
    folder = tmp_path_factory.mktemp("prometheus")
    server = needed("prometheus", "prometheus")
    gateway = [needed("prometheus-pushgateway", "prometheus-pushgateway"), "--persistence.file=", "--log.level=error"]
    pushes, own = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as environment,
        running([*gateway, f"--web.listen-address={pushes}"], f"http://{pushes}"),
        serving(Exporter(snapshot), port=0) as exporter,
    ):
        environment.setenv("PUSHGATEWAY_URL", f"http://{pushes}")
        push_steps()
        (folder / "prometheus.yml").write_text(configuration(pushes, urllib.parse.urlsplit(exporter).netloc))
        command = [server, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with running([*command, f"--web.listen-address={own}"], f"http://{own}") as url:
            asked = Prometheus(url)
            until(lambda: all(map(asked.query, ("salun_gate_passed", "salun_requests"))), "it did not scrape both")
            recorded = "model_line:salun_sweep_skipped_due:last"
            until(lambda: asked.query(recorded), "it did not evaluate the first sweep that was skipped")
            assert not asked.query("model_line:salun_sweep_skipped_twice:bool")
            push_skipped_sweep()
            twice = "model_line:salun_sweep_skipped_twice:bool"
            until(lambda: asked.query(twice), "it did not see the second one")
            now = datetime.now(UTC)
            until(lambda: asked.evaluated() > now + timedelta(seconds=1), "it did not evaluate the rules after that")
            yield asked


def configuration(gateway, exporter):
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "pushed", "honor_labels": True, "static_configs": [{"targets": [gateway]}]},
                {"job_name": "exporter", "static_configs": [{"targets": [exporter]}]},
            ],
        }
    )
