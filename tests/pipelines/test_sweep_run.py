"""The compiled deletion sweep, run step by step on a real store: claimed, erased, certified, settled."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.local import run_compiled
from pipelines.packages import COMPILED
from salun_core.certificates.keys import create_key
from salun_core.config import load
from salun_core.data.targets import ClassTarget, SamplesTarget
from salun_core.gate import GateDecision
from salun_core.models import load_model
from salun_core.registry.lookup import read_head, read_version
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.storage.keys import certificate_key, run_key
from salun_core.storage.leases import holder_of
from salun_core.sweeps.runs import RunLog, RunStatus
from salun_core.times import utc_clock
from tests.pipelines.conftest import messages
from tests.pipelines.leaks import leaks

pytestmark = [pytest.mark.s3, pytest.mark.e2e, pytest.mark.usefixtures("forked_runs")]
SWEEP = COMPILED / "salun-deletion-sweep-cpu.yaml"
INNER = ["fetch-model", "compute-mask", "unlearn", "evaluate", "gate-publish"]
LAST = ["conclude", "settle-requests"]
WORKING = [*INNER, "claim-requests", "settle-requests"]  # the last step only reads
WEIGHTS = "model.safetensors"
QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005})


class SweptLine:
    """A store with a model line, its ledger, and the compiled sweep to run on them."""

    def __init__(self, store, folder, split):
        self.store, self.folder, self.split = store, folder, split
        self.ledger = Ledger(store, utc_clock)

    @property
    def head(self):
        return read_head(self.store, "digits")[0].version

    def sweep(self, name, **changes):
        common = {"model_line": "digits", "store_uri": self.store.uri, "min_requests": 1}
        common |= {"method": "salun", "method_config": QUICK}
        return run_compiled(SWEEP, {**common, **changes}, self.folder / name)

    def left_nothing_behind(self, run):
        assert holder_of(self.store, "digits") is None
        assert not list(self.store.list("scratch/"))
        assert set(re.findall(r'"run_id": "([^"]+)"', log_of(run))) == {run.run}  # one id in every step
        said = messages(run)
        assert [line for line in said if line.get("run") != run.run] == []
        assert {line["step"] for line in said if line["event"] == "step_started"} == {
            named(step) for step in run.steps if step != "conclude"
        }

    def certified(self, request):
        envelope = json.loads(self.store.get(certificate_key(request)).data)
        return json.loads(base64.b64decode(envelope["payload"]))["predicate"]


def named(step):
    """The name that a step has in logs and metrics."""
    return "purge" if step == "purge-store" else step.replace("-", "_")


def log_of(run):
    return run.files["run.log"].read_text(encoding="utf-8")


@pytest.fixture
def pushed(monkeypatch):
    """The groups that are pushed to a gateway: path by path."""
    paths = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self):  # noqa: N802 - a name of the standard library
            paths.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(202)
            self.end_headers()

        do_POST = do_PUT  # noqa: N815

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        monkeypatch.setenv("PUSHGATEWAY_URL", f"http://127.0.0.1:{server.server_port}")
        yield paths
        server.shutdown()
        thread.join()


@pytest.fixture
def line(store, digits_line, digits_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))
    return SweptLine(store, tmp_path, load_model(digits_model).split)


def test_a_sweep_erases_what_is_due(line, pushed):
    parent, samples, untrained = line.head, sorted(line.split.train)[:5], line.split.ids("test")[0]
    line.ledger.submit("r-class", "digits", ClassTarget(dataset_digest=line.split.dataset_digest, class_id=3))
    line.ledger.submit("r-samples", "digits", SamplesTarget(ids=samples))
    line.ledger.submit("r-nothing", "digits", SamplesTarget(ids=[untrained]))
    run = line.sweep("green")
    assert (run.exit_code, run.error, run.failed) == (0, "", "")
    assert [step for step in run.steps if step != "purge-store"] == ["claim-requests", *INNER, *LAST]
    assert "purge-store" in run.steps
    assert run.parent == parent != run.version == line.head
    assert read_version(line.store, "digits", run.version).run == run.run
    assert run.outputs["claim-requests"]["requests"] == 2
    assert run.outputs["settle-requests"] == {"status": "published", "completed": 2, "queued": 0, "failed": 0}
    outcomes = {"r-class": "unlearned", "r-samples": "unlearned", "r-nothing": "nothing_to_erase"}
    for request, outcome in outcomes.items():
        assert line.ledger.status(request) is Status.COMPLETED
        assert line.certified(request)["outcome"] == outcome
    statuses = [json.loads(line.store.get(entry.key).data)["to_status"] for entry in line.store.list(events_of(run))]
    assert statuses == ["claimed", "masking", "unlearning", "evaluating", "gated", "published"]
    line.left_nothing_behind(run)
    weights = line.store.get(f"blobs/sha256/{read_version(line.store, 'digits', parent).files[WEIGHTS].sha256}").data
    assert leaks(run, [*samples, untrained], [weights]) == []
    assert pushed_groups(pushed) == {("salun-deletion-sweep-cpu", named(step), "digits") for step in WORKING} | {
        ("salun-deletion-sweep-cpu", "purge", "all")
    }


def pushed_groups(paths):
    """Return pipeline, step and model of each push, including the steps of the nested pipeline."""
    keys = [dict(zip(words[::2], words[1::2], strict=True)) for words in (path.split("/")[2:] for path in paths)]
    return {(key["pipeline"], key["step"], key["model"]) for key in keys}


def events_of(run):
    return f"runs/{run.run}/events/"


def test_a_sweep_without_requests_changes_nothing(line):
    head = line.head
    run = line.sweep("idle")
    assert (run.exit_code, sorted(run.steps)) == (0, ["claim-requests", "purge-store", "settle-requests"])
    assert run.outputs["claim-requests"]["reason"] == "no request waits"
    assert run.outputs["settle-requests"]["status"] == ""
    assert line.head == head
    line.left_nothing_behind(run)


def test_a_refused_gate_fails_the_run_and_queues_the_request_with_a_gentler_recipe(line):
    head = line.head
    rule = {"metric": "TA", "op": ">=", "value": 1.0, "reason": "no model is perfect"}
    policy = line.folder / "strict.yaml"
    policy.write_text(json.dumps({"format": "salun.policy/v1", "name": "strict", "rules": [rule]}))
    line.ledger.submit("r-more", "digits", ClassTarget(class_id=5))
    run = line.sweep("red", policy_uri=str(policy))
    assert (run.exit_code, run.failed, run.version) == (3, "gate-publish", None)
    assert "the gate refused the model" in run.error
    assert [step for step in run.steps if step != "purge-store"][-2:] == LAST  # the purge runs beside the others
    assert (run.outcome.state, run.outcome.queued) == ("refused", 1)
    assert run.outputs["settle-requests"] == {"status": "gate_refused", "completed": 0, "queued": 1, "failed": 0}
    state = line.ledger.state("r-more")
    assert state.status is Status.QUEUED
    assert "next: a gentler recipe" in state.last.reason  # the accuracy on the test data was too low
    assert RunLog(line.store, utc_clock).status(run.run) is RunStatus.GATE_REFUSED
    assert line.head == head
    line.left_nothing_behind(run)
    assert not load(GateDecision, run.files["decision.json"]).passed
    assert "<html" in run.files["report.html"].read_text(encoding="utf-8")[:200]
    assert line.store.get(run_key(run.run, "decision.json")) is not None
