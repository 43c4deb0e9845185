"""Steps that need no tensors import no torch: it costs two seconds of processor time and 200 MiB in each pod."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from salun_core.certificates.keys import create_key
from salun_core.gate import decide, load_policy
from salun_core.registry.versions import publish_head, stage_version
from salun_core.requests.ledger import Ledger
from salun_core.steps.outcome import read_outcome
from salun_core.storage.keys import certificate_key
from salun_core.sweeps.runs import RunStatus
from salun_core.times import utc_clock
from tests.support.certified import OTHER, evidence_of
from tests.support.toy_line import LINE, begin, claim_next, sweep_context, target

pytestmark = pytest.mark.s3
PROGRAM = """
import sys
from kfp import dsl
from components import conclude, purge_store, settle_requests
ADDRESS = dict(store_uri={store!r}, model_line={line!r}, run_id="run-1")
FINISHED = dsl.PipelineTaskFinalStatus("SUCCEEDED", "job", "exit-handler-1", None, None)

def imported(step):
    print(step, sorted({{"torch", "PIL", "scipy"}} & set(sys.modules)))

purge_store.purge_store.python_func({store!r}, run_id="run-1")
imported("purge_store")
settle_requests.settle_requests.python_func(**ADDRESS, final_status=FINISHED)
imported("settle_requests")
conclude.conclude.python_func(**ADDRESS)
imported("conclude")
"""


def steps_in_a_new_process(store):
    """Run the steps in a process of their own, as a pod does; return which heavy modules each has imported."""
    program = PROGRAM.format(store=store.uri, line=LINE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.endswith("]")]


def publish_judged(store, runs):
    """Publish a version with what a certificate needs; return it."""
    for status in ("masking", "unlearning", "evaluating", "gated"):
        runs.advance("run-1", RunStatus(status), "toy", "goes on")
    record = runs.read("run-1")
    fields = {"line": LINE, "parent": record.parent, "run": "run-1", "method": "salun", "forget_count": 40}
    fields |= {"forget_set_digest": record.forget_sha256, "lineage": {"trained_on": 1200, "runs_since_training": 1}}
    evidence = evidence_of()
    decision = decide(evidence, load_policy("classifier"))
    with tempfile.TemporaryDirectory() as folder:
        files = {"model.safetensors": "weights", "model.json": json.dumps({"split_digest": OTHER})}
        files |= {"evidence.json": evidence.model_dump_json(), "decision.json": decision.model_dump_json()}
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        version, _ = stage_version(store, fields, {name: Path(folder) / name for name in files})
    publish_head(store, LINE, version, record.parent, "run-1")
    return version


def test_the_steps_around_a_run_do_not_import_torch(store, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))
    begin(store)
    Ledger(store, utc_clock).submit("r-1", LINE, target(1, 2))
    context = sweep_context(store)
    assert claim_next(context, "run-1").requests == 1
    version = publish_judged(store, context.runs)
    assert steps_in_a_new_process(store) == ["purge_store []", "settle_requests []", "conclude []"]
    outcome = read_outcome(store, "run-1")
    assert (outcome.state, outcome.version, outcome.completed) == ("published", version, 1)
    assert json.loads(store.get(certificate_key("r-1")).data)["signatures"]
