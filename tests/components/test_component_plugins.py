"""The steps of the pipeline with the method of the example plug-in."""

import base64
import json

from salun_core.data.targets import ClassTarget
from salun_core.plugins import source_digest
from salun_core.pods.reference import Kind, Scratch
from salun_core.registry.lookup import read_head
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.steps.outcome import read_outcome
from salun_core.storage.keys import certificate_key
from salun_core.tasks.run_facts import read_run_facts
from salun_core.times import utc_clock
from tests.components.conftest import LINE, QUICK
from tests.components.test_component_steps import claim, gate, signed
from tests.support.plugins import example

__all__ = ["example", "signed"]


def with_policy(run, plugins, name="own"):
    """Store a policy that refuses hardly anything but plug-ins; return its address."""
    rule = {"metric": "TA", "op": ">=", "value": 0.1, "reason": "it is better than chance"}
    own = {"format": "salun.policy/v1", "name": name, "rules": [rule], "plugins": plugins}
    run.store.put_new(f"{name}.json", json.dumps(own).encode())
    return f"{run.store.uri}/{name}.json"


def work(run, **given):
    """Do all steps up to the evaluation, with the method of the plug-in."""
    assert run.fetch(method="uniform", **given)[0] == 0
    run.mask(method="uniform", density=0.5)
    run.unlearn(method="uniform")
    run.evaluate()


def test_the_gate_refuses_a_plug_in_that_its_policy_forbids(run, example):
    work(run, policy_uri=with_policy(run, ["salun-example"]))
    scratch, after = Scratch(run.store, run.name), run.reference("after")
    assert after.facts["method"] == "uniform"
    facts = read_run_facts(scratch.get(after.find(Kind.MODEL), run.folder / "got"), "uniform")
    assert [record.name for record in facts.plugins] == ["uniform"]
    decision, report, summary = gate(run, policy_uri=with_policy(run, "forbid", "strict"))
    assert decision.facts["state"] == "refused"
    outcome = read_outcome(run.store, run.name)
    for text in (outcome.text, report, summary):
        assert "the policy does not allow the method uniform (salun-example 1.0" in text
    assert read_head(run.store, LINE)[0].version == run.parent


def test_evidence_and_certificate_name_the_digest_of_a_plug_in(run, example, signed):
    digest = source_digest("salun_example")
    policy = with_policy(run, [f"salun-example@sha256:{digest}"])
    ledger = Ledger(run.store, utc_clock)
    ledger.submit("r-1", LINE, ClassTarget(class_id=3))
    found = claim(run, method="uniform", method_config=QUICK, policy_uri=policy)
    assert found["requests"] == 1, read_outcome(run.store, run.name)
    work(run, forget_manifest_uri=found["forget"], policy_uri=policy)
    files = Scratch(run.store, run.name).get(run.reference("evidence"), run.folder / "got")
    evidence = json.loads((files / "evidence.json").read_bytes())
    assert [record["digest"] for record in evidence["run"]["plugins"]] == [digest]
    decision, _, _ = gate(run, policy_uri=policy)
    assert read_head(run.store, LINE)[0].version == decision.facts["version"] != run.parent
    assert ledger.status("r-1") is Status.COMPLETED
    envelope = json.loads(run.store.get(certificate_key("r-1")).data)
    statement = json.loads(base64.b64decode(envelope["payload"]))
    used = statement["predicate"]["provenance"]["plugins"]
    assert [(record["name"], record["digest"]) for record in used] == [("uniform", digest)]


def test_the_first_step_refuses_a_method_that_the_image_does_not_allow(run, example, monkeypatch):
    """A parameter of the run names code; the variable that allows it is in the image, which no parameter changes."""
    monkeypatch.setenv("SALUN_PLUGINS", "")
    policy = with_policy(run, ["salun-example"])
    assert run.fetch(method="uniform", policy_uri=policy) == (2,)
    assert "method uniform is not allowed" in read_outcome(run.store, run.name).text


def test_the_first_step_refuses_a_method_that_the_policy_does_not_list(run, example):
    assert run.fetch(method="uniform") == (2,)
    assert "policy classifier does not allow the method uniform" in read_outcome(run.store, run.name).text
    assert json.dumps(run.reference("inputs").kind) == '"nothing"'
