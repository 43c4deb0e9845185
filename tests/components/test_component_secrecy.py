"""What a fault must not tell: everybody who may see a run can read its logs, its outcome and its artifacts."""

import json

import pytest

from salun_core.data.decode import decode
from salun_core.errors import DataError, StoreUnreachableError
from salun_core.pods import pod
from salun_core.pods import steps as pod_steps
from salun_core.steps.outcome import read_outcome

pytestmark = pytest.mark.s3
NAME = "patient-0017"  # stands for a sample id, a subject or a prompt
OF_A_SET = {"format": "salun.forget-set/v1", "dataset_digest": "x", "split_digest": "y", "kinds": []}
DOCUMENTS = {
    "a key": json.dumps({"kind": "samples", "ids": ["0"], NAME: 1}),
    "a class that does not exist": json.dumps({"kind": "class", "class_id": NAME}),
    "a kind that does not exist": json.dumps({"kind": NAME}),
    "a mapping for a list": json.dumps({"kind": "samples", "ids": {NAME: 3}}),
    "a damaged forget set": json.dumps({**OF_A_SET, "ids": {NAME: 3}}),
    "the address of a manifest": json.dumps(
        {"kind": "samples", "manifest_uri": f"s3://salun/{NAME}.json", "sha256": "0" * 64}
    ),
    "a tag": f"kind: !{NAME} x\n",
    "an alias": f"kind: *{NAME}\n",
}


def told(run, capfd):
    """Return all that Kubeflow gets of a run."""
    shown, outcome = capfd.readouterr(), read_outcome(run.store, run.name)
    files = [path.read_text(encoding="utf-8") for path in run.folder.iterdir() if path.is_file()]
    return "\n".join([shown.out, shown.err, outcome.text, outcome.next, *files])


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_wrong_forget_set_is_not_quoted(run, capfd, document):
    run.store.put_new("wrong.json", document.encode())
    assert run.fetch(forget_manifest_uri=f"{run.store.uri}/wrong.json")[0] == 2
    seen = told(run, capfd)
    assert NAME not in seen
    assert "pipelines submit" in seen


def test_several_faults_quote_nothing_of_the_forget_set(run, capfd):
    run.store.put_new("wrong.json", DOCUMENTS["a key"].encode())
    assert run.fetch(forget_manifest_uri=f"{run.store.uri}/wrong.json", method="salum")[0] == 2
    seen = told(run, capfd)
    assert NAME not in seen
    assert "salum" in seen


def broken(*_given, **_named):
    raise KeyError(NAME)


def full(*_given, **_named):
    raise OSError(28, "No space left on device", f"/tmp/{NAME}.png")  # noqa: S108 - only a text


def corrupt(*_given, **_named):
    decode([b"no image"], [NAME], None, None)


def unreachable(*_given, **_named):
    raise StoreUnreachableError("cannot read a manifest", f"{NAME}", public="a manifest cannot be read")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(broken, "KeyError"), (full, "No space left"), (corrupt, "corrupt"), (unreachable, "cannot be read")],
)
def test_a_fault_in_a_step_names_no_sample(run, capfd, monkeypatch, fault, kind):
    monkeypatch.setattr(pod, "PAUSES", ())
    run.fetch()
    monkeypatch.setattr(pod_steps, "mask_step", fault)
    if fault is corrupt:  # the data are wrong: a verdict
        run.mask()
    else:
        with pytest.raises(SystemExit):
            run.mask()
    seen = told(run, capfd)
    assert NAME not in seen
    assert kind in seen


def test_a_fault_in_one_of_several_processes_names_no_sample(run, capfd, monkeypatch, forked_processes):
    """Of a fault that is no verdict, the log has no text at all: test_step_processes.py."""
    run.fetch()
    monkeypatch.setattr(pod_steps, "mask_step", corrupt)
    run.mask(processes="2")
    assert NAME not in told(run, capfd)


def test_the_user_still_reads_the_details():
    with pytest.raises(DataError, match=NAME):
        decode([b"no image"], [NAME], None, None)
