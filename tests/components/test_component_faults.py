"""What a step does after a kill, beside a twin of itself, with changed artifacts and with addresses that are wrong."""

import json
import time
from pathlib import Path

import pytest
from kfp import dsl

from components.settle_requests import settle_requests
from salun_core.data.targets import ClassTarget
from salun_core.errors import DeviceMemoryError
from salun_core.pods import pod
from salun_core.pods import steps as pod_steps
from salun_core.pods.reference import Kind, Reference, write_reference
from salun_core.registry.lookup import ancestry, read_head
from salun_core.registry.versions import publish_head
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.steps import publishing, sweep
from salun_core.steps.outcome import RunState, new_outcome, read_outcome, write_outcome
from salun_core.storage.keys import run_key
from salun_core.storage.leases import acquire, release
from salun_core.times import utc_clock
from tests.components.conftest import LINE
from tests.components.test_component_steps import FAILED, compact, concluded, ended, gate, signed

pytestmark = pytest.mark.s3
SUCCEEDED = dsl.PipelineTaskFinalStatus("SUCCEEDED", "job", "exit-handler-1", None, None)
__all__ = ["signed"]  # the fixture


class KilledError(BaseException):
    """Ends a step like SIGKILL: nothing catches it."""


def kill(*_given, **_named):
    raise KilledError


def head(run):
    return read_head(run.store, LINE)[0].version


def change(run, name, edit):
    """Change an artifact, as somebody can who may write to Kubeflow's store."""
    path = Path(run.made[name].path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "wrong", [{"model_line": "a/b"}, {"store_uri": "s3:/x"}, {"store_uri": "nonsense"}, {"run_id": "a b"}], ids=str
)
def test_a_wrong_address_ends_with_one_line(run, capfd, monkeypatch, wrong):
    monkeypatch.setattr(type(run), "address", {**run.address, **wrong})
    with pytest.raises(SystemExit) as left:
        run.fetch()
    assert left.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("Error: fetch_model failed: ")


def test_the_exit_handler_takes_any_message(run, signed):
    run.fetch()
    message = "bad\x1b[31m \x00 text\x9f \ud800 " + "x" * 3000
    status = dsl.PipelineTaskFinalStatus("FAILED", "job", "exit-handler-1", 1, message)
    settle_requests.python_func(**run.address, final_status=status)
    assert (ended(run).state, len(ended(run).text)) == ("killed", 500)
    assert "\x1b" not in ended(run).text


def test_an_artifact_that_says_that_the_run_ended_does_not_skip_the_gate(run, capfd, signed):
    run.fetch()
    write_reference(Reference(kind=Kind.NOTHING), run.made["inputs"].path)
    run.mask()
    assert (ended(run).state, ended(run).code) == ("damaged", 5)
    run.unlearn()
    run.evaluate()
    gate(run)
    assert concluded(run, capfd)[0] == 5
    assert head(run) == run.parent


def test_a_run_without_a_verdict_is_never_green(run, capfd, signed):
    run.fetch()
    assert concluded(run, capfd)[0] == 1
    settle_requests.python_func(**run.address, final_status=SUCCEEDED)
    assert (ended(run).state, ended(run).code) == ("failed", 1)


def test_a_retry_after_the_outcome_was_purged_ends_with_a_verdict(run, capfd):
    run.fetch()
    write_outcome(run.store, new_outcome("run-1", LINE, RunState.FAILED, "it failed"))
    run.mask()
    run.unlearn()
    run.evaluate()
    run.store.delete(run_key("run-1", "outcome.json"))
    gate(run)
    assert concluded(run, capfd)[0] == 5


def test_the_facts_of_an_artifact_decide_nothing(run):
    run.fetch()
    change(run, "inputs", lambda document: document["facts"].update(version="0" * 64))
    run.mask()
    assert run.reference("mask").kind is Kind.MASK


def test_a_mask_that_was_taken_out_of_an_artifact_is_missed(worked):
    change(worked, "mask", lambda document: document.pop("files"))
    worked.unlearn()
    assert (ended(worked).state, "needs a mask" in ended(worked).text) == ("wrong_input", True)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"kind":"inputs","made_from":[' * 3000, '{"kind":"model"}'])
def test_a_damaged_artifact_is_a_verdict(run, text):
    run.fetch()
    Path(run.made["inputs"].path).write_text(text)
    run.mask()
    assert ended(run).state == "damaged"


@pytest.mark.parametrize("killed", ["before", "after"])
def test_two_pods_of_the_gate_at_once_publish_one_version(worked, monkeypatch, killed):
    """The first pod is slow; the one that replaced it publishes, and writes the outcome or is killed before."""
    run, twins = worked, []

    def slow(*given):
        if not twins:
            twins.append("the replacement")
            time.sleep(1.1)  # versions of another second have another digest
            with monkeypatch.context() as patched:
                if killed == "before":
                    patched.setattr(pod_steps, "_settle_here", kill)
                    with pytest.raises(KilledError):
                        gate(run)
                else:
                    gate(run)
        return publish_head(*given)

    monkeypatch.setattr(publishing, "publish_head", slow)
    decision = gate(run)[0]
    assert twins
    assert (ended(run).state, ended(run).version) == ("published", head(run))
    assert decision.facts["version"] == head(run)
    assert len(ancestry(run.store, LINE)) == 2


def test_the_gate_publishes_nothing_without_the_lease(worked):
    run = worked
    release(run.store, LINE, "run-1")
    acquire(run.store, LINE, "run-9", 600)
    gate(run)
    assert ended(run).state == "settled_before"
    assert head(run) == run.parent


def test_a_retry_of_a_killed_gate_publishes_nothing(worked, signed):
    run = worked
    settle_requests.python_func(**run.address, final_status=FAILED)
    acquire(run.store, LINE, "run-9", 600)
    gate(run)
    assert ended(run).state == "killed"
    assert head(run) == run.parent


def test_a_compact_sweep_that_was_killed_before_its_outcome_finds_it(run, signed, monkeypatch):
    ledger = Ledger(run.store, utc_clock)
    ledger.submit("r-1", LINE, ClassTarget(class_id=3))
    with monkeypatch.context() as patched:
        patched.setattr(pod_steps, "published_outcome", kill)
        with pytest.raises(KilledError):
            compact(run)
    assert compact(run) == 0
    assert (ended(run).state, ended(run).completed) == ("published", 1)
    assert ledger.status("r-1") is Status.COMPLETED
    assert Path(run.made["report"].path).read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_a_compact_sweep_names_the_fault_that_ended_it(run, signed, monkeypatch):
    monkeypatch.setattr(pod, "PAUSES", (0.0,))
    Ledger(run.store, utc_clock).submit("r-1", LINE, ClassTarget(class_id=3))

    def full(*_given, **_named):
        raise DeviceMemoryError("the device's memory is full")

    monkeypatch.setattr(sweep, "run_steps", full)
    assert compact(run) == 1
    assert (ended(run).state, ended(run).queued) == ("failed", 1)
    assert "memory is full" in read_outcome(run.store, run.name).text
