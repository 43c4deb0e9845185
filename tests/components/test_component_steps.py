"""Each component, called as Kubeflow calls it, on real artifacts and a real store."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from kfp import dsl

from components.claim_requests import claim_requests
from components.conclude import conclude
from components.gate_publish import gate_publish
from components.settle_requests import settle_requests
from components.sweep_compact import sweep_compact
from salun_core.certificates.keys import create_key
from salun_core.data.targets import ClassTarget, SamplesTarget
from salun_core.digest import sha256_file
from salun_core.errors import StoreUnreachableError
from salun_core.models import load_model
from salun_core.pods import pod
from salun_core.pods import steps as pod_steps
from salun_core.pods.reference import Kind, Scratch
from salun_core.registry.lookup import ancestry, read_head, read_version, require_head
from salun_core.registry.versions import publish
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.saliency import SaliencyMask
from salun_core.steps.outcome import read_outcome
from salun_core.storage.keys import certificate_key, run_key
from salun_core.storage.leases import acquire, holder_of
from salun_core.storage.s3 import S3Store
from salun_core.tasks import line as open_line
from salun_core.tasks.run_facts import read_run_facts
from salun_core.times import utc_clock
from tests.components.conftest import LINE, QUICK
from tests.support.api_server import WORKFLOW_PATH

pytestmark = pytest.mark.s3
FAILED = dsl.PipelineTaskFinalStatus("FAILED", "job", "exit-handler-1", None, None)


def concluded(run, capfd):
    """Return the exit code and the last line of the last step."""
    capfd.readouterr()
    code = 0
    try:
        conclude.python_func(**run.address)
    except SystemExit as ended:
        code = ended.code
    return code, capfd.readouterr().err.splitlines()[-1]


def ended(run):
    return read_outcome(run.store, run.name)


def test_fetch_model_fixes_head_and_moves_no_weights(chain):
    inputs = chain.reference("inputs")
    assert (inputs.kind, inputs.facts["version"]) == (Kind.INPUTS, chain.parent)
    assert inputs.facts["forget_samples"] == len(chain.forgotten)
    assert chain.made["inputs"].metadata == inputs.metadata
    assert set(inputs.files) == {"inputs.json"}
    assert not [entry.key for entry in chain.store.list("scratch/run-1/inputs/") if entry.size > 2000]


WRONG = {
    "an unknown method": ({"method": "salum"}, "salum"),
    "a method's unknown setting": ({"method_config": '{"epochz": 2}'}, "epochz"),
    "settings that are no object": ({"method_config": "[1, 2]"}, "method_config"),
    "a density above one": ({"density": 1.5}, "density"),
    "an unknown policy": ({"policy_uri": "nobody"}, "nobody"),
    "an unknown metric": ({"extra_metrics": "lirra"}, "lirra"),
    "a forget set that does not exist": ({"forget_manifest_uri": "s3://salun/none.json"}, "none.json"),
}


@pytest.mark.parametrize(("changes", "named"), WRONG.values(), ids=WRONG)
def test_the_first_step_refuses_wrong_input_with_an_outcome(run, capfd, changes, named):
    assert run.fetch(**changes) == (2,)
    assert ended(run).state == "wrong_input"
    assert named in ended(run).text
    assert run.reference("inputs").kind is Kind.NOTHING
    code, line = concluded(run, capfd)
    assert code == 2
    assert line.startswith("Error: ")
    assert named in line
    settle_requests.python_func(**run.address, final_status=FAILED)
    assert holder_of(run.store, LINE) is None
    assert ended(run).state == "wrong_input"


def test_fetch_model_refuses_to_forget_everything(run, digits_model, tmp_path):
    everything = tmp_path / "all.json"
    everything.write_text(json.dumps({"kind": "samples", "ids": sorted(load_model(digits_model).split.train)}))
    assert run.fetch(forget_manifest_uri=str(everything))[0] == 1
    assert ended(run).state == "wrong_input"


def test_a_second_run_of_the_line_ends_with_line_held(run, capfd):
    acquire(run.store, LINE, "run-0", 600)
    assert run.fetch()[0] == 4
    assert ended(run).state == "line_held"
    assert "run-0" in concluded(run, capfd)[1]


def test_compute_mask_writes_the_mask(chain, tmp_path):
    reference = chain.reference("mask")
    mask = SaliencyMask.load(Scratch(chain.store, chain.name).get(reference, tmp_path) / "mask.safetensors")
    assert mask.density == pytest.approx(0.5, abs=1e-4) == reference.facts["density"]
    assert reference.find(Kind.INPUTS) == chain.reference("inputs")


def test_no_mask_is_made_for_a_method_that_takes_none(run):
    run.fetch(method="finetune")
    run.mask(method="finetune")
    assert run.reference("mask").files == {}
    assert not list(run.store.list("scratch/run-1/mask/"))
    run.unlearn(method="finetune")
    assert run.reference("after").facts["method"] == "finetune"


def test_unlearn_writes_a_child_of_the_model(chain, digits_model, tmp_path):
    after = load_model(Scratch(chain.store, chain.name).get(chain.reference("after"), tmp_path))
    before = load_model(digits_model)
    assert (after.card.parent, after.digest != before.digest) == (before.digest, True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts processes on a CPU")
def test_unlearning_works_in_as_many_processes_as_given(chain, tmp_path, forked_processes):
    """What two processes compute, test_step_processes.py compares with one."""
    again = replace(chain, folder=tmp_path, made=dict(chain.made))
    again.unlearn(processes="2")
    made = Scratch(again.store, again.name).get(again.reference("after"), tmp_path / "got")
    facts = read_run_facts(made, "salun")
    assert facts.environment["processes"] == "2"
    assert again.reference("after").facts["seconds"] == facts.seconds["unlearn"]


def test_the_mask_is_made_in_as_many_processes_as_given(run, monkeypatch):
    counts = []
    monkeypatch.setattr(pod_steps, "in_processes", lambda count, step, *given: counts.append(count) or step(*given))
    run.fetch()
    run.mask(processes="2")
    assert counts == [2]
    assert run.reference("mask").kind is Kind.MASK


def test_a_changed_file_is_refused(worked):
    run = worked
    reference = run.reference("mask")
    key = reference.uri.removeprefix(f"{run.store.uri}/") + "/mask.safetensors"
    run.store.delete(key)
    run.store.put_new(key, b"another mask")
    run.unlearn()
    assert ended(run).state == "damaged"
    assert run.reference("after").kind is Kind.NOTHING


def test_a_changed_forget_set_is_refused(run):
    run.fetch()
    (key,) = [entry.key for entry in run.store.list("scratch/run-1/forget/")]
    document = json.loads(run.store.get(key).data)
    run.store.delete(key)
    run.store.put_new(key, json.dumps({**document, "ids": document["ids"][1:]}).encode())
    run.mask()
    assert ended(run).state == "damaged"
    assert "forget set of the run" in ended(run).text


def test_an_artifact_that_names_another_place_is_refused(run):
    run.fetch()
    path = Path(run.made["inputs"].path)
    path.write_text(path.read_text().replace("scratch/run-1", "scratch/run-2"))
    run.mask()
    assert ended(run).state == "damaged"
    assert "another place" in ended(run).text


def test_evaluate_logs_the_evidence(chain):
    logged = chain.made["metrics"].metadata
    assert {"UA_after", "RA_after", "TA_after", "MIA_after", "mask_density"} <= set(logged)
    assert all(isinstance(value, float) and math.isfinite(value) for value in logged.values())
    matrix = chain.made["classification"].metadata["confusionMatrix"]
    assert len(matrix["rows"]) == len(matrix["annotationSpecs"]) == 10
    assert Path(chain.made["report"].path).read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert set(chain.reference("evidence").files) == {"evidence.json"}


def test_no_sample_can_be_tried_out_with_what_kubeflow_keeps(chain, tmp_path):
    """Whoever knows the data set computes the digests of the set without each one sample, and compares."""
    inputs, model = chain.reference("inputs"), chain.reference("after")
    scratch = Scratch(chain.store, chain.name)
    pinned = json.loads((scratch.get(inputs, tmp_path / "inputs") / "inputs.json").read_bytes())
    after = scratch.get(model, tmp_path / "after")
    evidence = scratch.get(chain.reference("evidence"), tmp_path / "evidence") / "evidence.json"
    files = [path for path in after.iterdir() if path.name != "model.safetensors"]  # its digest needs the training
    known = {pinned["forget_digest"], *map(sha256_file, (*files, evidence))}
    assert sha256_file(after / "split.parquet") in known
    kept = json.dumps([item.metadata for item in chain.made.values()])
    kept += "".join(Path(item.path).read_text("utf-8") for item in chain.made.values() if Path(item.path).is_file())
    assert chain.parent in kept
    assert [digest for digest in known if digest in kept] == []


def test_a_step_after_a_verdict_passes_on(run, monkeypatch):
    run.fetch(density=2.0)
    monkeypatch.setattr(pod, "lease_renewed", None)  # no later step may work
    run.mask()
    run.unlearn()
    run.evaluate()
    assert {run.reference(name).kind for name in ("mask", "after", "evidence")} == {Kind.NOTHING}
    assert run.made["metrics"].metadata == {}
    assert "No report" in Path(run.made["report"].path).read_text(encoding="utf-8")
    assert ended(run).step == "fetch_model"


def counting(download, downloaded):
    """Return the method that downloads, and notes each key."""

    def noted(store, key, *given):
        downloaded.append(key)
        return download(store, key, *given)

    return noted


def gate(run, **changes):
    """Call the last working component: (decision, report, summary)."""
    made = run.artifact("decision"), run.artifact("judged", dsl.HTML), run.artifact("summary", dsl.Markdown)
    named = dict(zip(("decision", "report", "summary"), made, strict=True))
    gate_publish.python_func(run.made["evidence"], **run.address, **named, **changes)
    return run.reference("decision"), *(Path(item.path).read_text(encoding="utf-8") for item in made[1:])


def test_a_refused_gate_is_an_outcome_with_its_report(worked, tmp_path, capfd):
    strict = tmp_path / "strict.json"
    rule = {"metric": "TA", "op": ">=", "value": 1.0, "reason": "no model is perfect"}
    strict.write_text(json.dumps({"format": "salun.policy/v1", "name": "strict", "rules": [rule]}))
    decision, report, summary = gate(worked, policy_uri=str(strict))
    assert (decision.kind, decision.facts["state"]) == (Kind.NOTHING, "refused")
    assert read_head(worked.store, LINE)[0].version == worked.parent
    outcome = ended(worked)
    assert (outcome.state, outcome.code, outcome.step) == ("refused", 3, "gate_publish")
    assert outcome.report == f"{worked.store.uri}/runs/run-1/report.html"
    assert worked.store.get(run_key("run-1", "report.html")).data.decode() == report
    assert "| **fails** |" in summary
    told = "no model is perfect (TA"
    code, last = concluded(worked, capfd)
    assert code == 3
    for text in (outcome.text, summary, report, last):
        assert told in text.replace("&gt;", ">")
    for text in (outcome.next, summary, report, last):
        assert "--tune" in text
    assert holder_of(worked.store, LINE) is None
    assert gate(worked)[1] == report  # the pod was lost, and the policy is another one now
    assert ended(worked).state == "refused"
    assert read_head(worked.store, LINE)[0].version == worked.parent


def test_gate_publish_publishes_and_may_be_repeated(worked, capfd):
    """One test, because each part changes the line for the next one."""
    run = worked
    decision, report, summary = gate(run)
    version = decision.facts["version"]
    assert (read_head(run.store, LINE)[0].version, ended(run).version) == (version, version)
    assert read_version(run.store, LINE, version).run == "run-1"
    assert report.rstrip().endswith("</html>")
    assert version[:12] in summary
    assurance = ended(run).assurance
    assert assurance.level in {"measured", "procedure"}
    assert f"Assurance level **{assurance.figures}**" in summary
    assert holder_of(run.store, LINE) is None
    assert concluded(run, capfd) == (0, f"published digits@{version[:12]}")

    assert gate(run)[0].facts["version"] == version  # the pod was lost after publishing
    assert len(ancestry(run.store, LINE)) == 2

    newest = publish_on_top(run, version, "retrain")
    assert gate(run)[0].facts["version"] == version  # and another version was published on top
    assert read_head(run.store, LINE)[0].version == newest

    run.store.delete(run_key("run-1", "outcome.json"))  # killed before its outcome: only the version names the run,
    settle_requests.python_func(**run.address, final_status=FAILED)  # which has no record without requests
    assert (ended(run).state, ended(run).version) == ("published", version)


def publish_on_top(run, parent, method):
    """Publish another version of the line, with the files that the run made; return it."""
    files = Scratch(run.store, run.name).get(run.reference("after"), run.folder / "copy")
    fields = {"line": LINE, "parent": parent, "method": method, "lineage": {"trained_on": 1}}
    names = ("model.safetensors", "model.json", "split.parquet")
    return publish(run.store, fields, {name: files / name for name in names})[0].version


def test_a_stale_parent_is_an_outcome(worked, capfd):
    newer = publish_on_top(worked, worked.parent, "import")
    assert gate(worked)[0].facts["state"] == "stale_parent"
    code, line = concluded(worked, capfd)
    assert (code, "stale parent" in line) == (4, True)
    assert read_head(worked.store, LINE)[0].version == newer
    assert len(ancestry(worked.store, LINE)) == 2


@pytest.fixture
def signed(tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))


def claim(run, **changes):
    found = claim_requests.python_func(
        **run.address, summary=run.artifact("claim", dsl.Markdown), **{"min_requests": 1, **changes}
    )
    return dict(zip(("requests", "forget", "method", "density", "config", "reason", "code"), found, strict=True))


def test_claim_writes_why_there_is_nothing_to_do(run, signed):
    found = claim(run)
    assert (found["requests"], found["code"], found["reason"]) == (0, 0, "no request waits")
    assert (ended(run).state, ended(run).code) == ("nothing_to_do", 0)
    assert "no request waits" in Path(run.made["claim"].path).read_text(encoding="utf-8")


def test_claim_says_when_a_batch_is_due(run, signed):
    Ledger(run.store, utc_clock).submit("r-1", LINE, SamplesTarget(ids=["secret-digit"]))
    assert "1 waiting, and no batch is due before 20" in claim(run, min_requests=3)["reason"]
    assert "unless 2 more are filed" in Path(run.made["claim"].path).read_text(encoding="utf-8")


def test_claim_tells_what_waits_for_a_person(run, signed):
    ledger = Ledger(run.store, utc_clock)
    ledger.submit("r-1", LINE, SamplesTarget(ids=["secret-digit"]))
    found, summary = claim(run), Path(run.made["claim"].path).read_text(encoding="utf-8")
    assert (found["requests"], found["code"], ended(run).state) == (0, 0, "nothing_to_do")
    assert "1 held for review: `salun request list --status on_hold`" in ended(run).text
    assert "secret" not in ended(run).text + summary
    assert ledger.status("r-1") is Status.ON_HOLD


def test_claim_tells_that_the_line_is_held(run, signed):
    acquire(run.store, LINE, "run-0", 600)
    found = claim(run)
    assert (found["requests"], found["code"]) == (0, 0)
    assert (ended(run).state, "run-0" in ended(run).text) == ("line_held", True)


def test_claim_refuses_wrong_input_before_it_claims(run, signed):
    Ledger(run.store, utc_clock).submit("r-1", LINE, ClassTarget(class_id=3))
    assert claim(run, method="nobody")["code"] == 2
    assert Ledger(run.store, utc_clock).status("r-1") is Status.QUEUED


def test_claim_without_a_signing_key_claims_nothing(run, monkeypatch):
    monkeypatch.delenv("SALUN_SIGNING_KEY", raising=False)
    Ledger(run.store, utc_clock).submit("r-1", LINE, ClassTarget(class_id=3))
    assert claim(run)["code"] == 2
    assert Ledger(run.store, utc_clock).status("r-1") is Status.QUEUED


def test_a_run_settles_its_requests_and_downloads_each_model_once_a_step(run, signed, monkeypatch):
    """The model before by every step that computes, the model after by the two that judge it; fetch takes neither."""
    ledger, downloaded = Ledger(run.store, utc_clock), []
    ledger.submit("r-1", LINE, ClassTarget(class_id=3))
    found = claim(run, method="salun", method_config=QUICK)
    assert (found["requests"], found["config"]) == (1, QUICK)
    monkeypatch.setattr(S3Store, "download", counting(S3Store.download, downloaded))
    fetch = partial(run.fetch, forget_manifest_uri=found["forget"])
    for step in (fetch, run.mask, run.unlearn, run.evaluate, partial(gate, run)):
        downloaded.append("step")
        step()
    digests = {read_version(run.store, LINE, run.parent).files["model.safetensors"].sha256: "before"}
    names = [digests.get(key.rpartition("/")[2], key.split("/")[-1]) for key in downloaded]
    computing, judging = ["step", "before"], ["step", "before", "model.safetensors"]
    weights = [name for name in names if name in judging]
    assert weights == ["step", *computing, *computing, *judging, *judging]
    assert ledger.status("r-1") is Status.COMPLETED
    assert run.store.get(certificate_key("r-1")) is not None
    assert (ended(run).state, ended(run).completed) == ("published", 1)
    assert holder_of(run.store, LINE) is None
    status = dsl.PipelineTaskFinalStatus("SUCCEEDED", "job", "exit-handler-1", None, None)
    settle_requests.python_func(**run.address, final_status=status)
    assert (ended(run).state, ended(run).completed) == ("published", 1)
    assert not list(run.store.list("scratch/run-1/"))


def test_the_exit_handler_names_the_step_that_was_killed(run, signed):
    ledger = Ledger(run.store, utc_clock)
    ledger.submit("r-1", LINE, ClassTarget(class_id=3))
    found = claim(run, method="salun", method_config=QUICK)
    run.fetch(forget_manifest_uri=found["forget"])
    run.mask()  # killed in the next step: nothing writes an outcome
    pod.write_outcome(run.store, pod.new_outcome("run-1", LINE, pod.RunState.RUNNING, "unlearn works", step="unlearn"))
    assert settle_requests.python_func(**run.address, final_status=FAILED) == ("failed", 0, 1, 0)
    outcome = ended(run)
    assert (outcome.state, outcome.code, outcome.step, outcome.queued) == ("killed", 1, "unlearn", 1)
    assert "out of memory" in outcome.text
    assert ledger.status("r-1") is Status.QUEUED
    run.unlearn()  # a Retry from the browser: it works no more
    assert run.reference("after").kind is Kind.NOTHING


def test_the_exit_handler_takes_the_reason_from_the_workflow(run, kubernetes):
    pod.write_outcome(run.store, pod.new_outcome("run-1", LINE, pod.RunState.RUNNING, "unlearn works", step="unlearn"))
    row = {"type": "Pod", "phase": "Failed", "displayName": "executor", "boundaryID": "n-1"}
    nodes = {
        "n-1": {"type": "DAG", "displayName": "unlearn"},
        "n-2": {**row, "message": "main: OOMKilled (exit code 137)"},
    }
    kubernetes.answers[WORKFLOW_PATH] = 200, {"kind": "Workflow", "spec": {}, "status": {"nodes": nodes}}
    settle_requests.python_func(**run.address, final_status=FAILED)
    outcome = ended(run)
    assert outcome.state == "killed"
    assert outcome.text == "unlearn was killed: out of memory; Argo reports: main: OOMKilled (exit code 137)"
    assert outcome.next.startswith("give more memory in the run form")


def test_a_retry_of_the_gate_after_the_exit_handler_works_no_more(worked, capfd):
    """Its files are gone by then, and its outcome stays."""
    run = worked  # killed in the next step
    settle_requests.python_func(**run.address, final_status=FAILED)
    decision, report, summary = gate(run)
    assert (decision.kind, decision.facts["state"]) == (Kind.NOTHING, "killed")
    assert "No report" in report
    assert "killed" in summary
    assert read_head(run.store, LINE)[0].version == run.parent
    assert concluded(run, capfd)[0] == 1


def test_the_exit_handler_of_a_line_that_does_not_exist_ends_well(run):
    address = {**run.address, "model_line": "digitz"}
    assert settle_requests.python_func(**address, final_status=FAILED) == ("", 0, 0, 0)
    assert (ended(run).state, ended(run).step) == ("killed", "")


def test_a_run_that_another_one_settled_publishes_nothing(run, signed):
    Ledger(run.store, utc_clock).submit("r-1", LINE, ClassTarget(class_id=3))
    found = claim(run, method="salun", method_config=QUICK)
    run.fetch(forget_manifest_uri=found["forget"])
    from salun_core.steps.settle import settle_requests as settle

    settle(run.store.uri, LINE, "run-1", keep_scratch=True)
    run.mask()
    assert ended(run).state == "settled_before"


def test_a_store_that_is_gone_ends_the_step_with_one_line(run, capfd, monkeypatch):
    monkeypatch.setattr(pod, "PAUSES", (0.0,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SALUN_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SystemExit) as left:
        run.fetch()
    assert left.value.code == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: fetch_model failed: ")
    assert "no answer from http://127.0.0.1:9" in last


def test_a_fault_that_passes_is_repeated_inside_the_step(run, monkeypatch):
    """Argo's stock settings do not repeat a step that fails."""
    given = []

    def head_after_two_faults(*known):
        given.append(known)
        if len(given) < 3:
            raise StoreUnreachableError("no answer from the store", "", "wait")
        return require_head(*known)

    monkeypatch.setattr(pod, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(open_line, "require_head", head_after_two_faults)
    assert run.fetch()[0] == 0
    assert len(given) == 3
    assert run.reference("inputs").kind is Kind.INPUTS


def compact(run, **changes):
    named = {"metrics": dsl.Metrics(), "classification": dsl.ClassificationMetrics()}
    named |= {"report": run.artifact("report", dsl.HTML), "summary": run.artifact("summary", dsl.Markdown)}
    run.made |= named
    recipe = {"method": "salun", "method_config": QUICK}
    return sweep_compact.python_func(**run.address, **named, **{"min_requests": 1, **recipe, **changes})


def test_the_compact_sweep_does_all_in_one_step(run, signed):
    ledger = Ledger(run.store, utc_clock)
    ledger.submit("r-1", LINE, ClassTarget(class_id=3))
    assert compact(run) == 0
    assert ledger.status("r-1") is Status.COMPLETED
    assert (ended(run).state, ended(run).completed) == ("published", 1)
    assert run.made["metrics"].metadata["UA_after"] > 0
    assert Path(run.made["report"].path).read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert holder_of(run.store, LINE) is None
    assert not list(run.store.list("scratch/"))


def test_the_compact_sweep_refuses_and_stays_idle_like_the_other(run, signed, tmp_path, capfd):
    assert compact(run) == 0
    assert ended(run).state == "nothing_to_do"
    strict = tmp_path / "strict.json"
    rule = {"metric": "TA", "op": ">=", "value": 1.0, "reason": "no model is perfect"}
    strict.write_text(json.dumps({"format": "salun.policy/v1", "name": "strict", "rules": [rule]}))
    run.name = "run-2"
    Ledger(run.store, utc_clock).submit("r-1", LINE, ClassTarget(class_id=3))
    assert compact(run, policy_uri=str(strict)) == 3
    assert (ended(run).state, ended(run).queued) == ("refused", 1)
    assert "**fails**" in Path(run.made["summary"].path).read_text(encoding="utf-8")
    assert concluded(run, capfd)[0] == 3
