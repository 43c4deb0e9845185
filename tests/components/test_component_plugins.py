"""The steps of the pipeline with the method of the example plug-in."""

import json

from salun_core.gate import load_policy
from salun_core.pods.reference import Kind, Scratch
from salun_core.steps.outcome import read_outcome
from salun_core.tasks.run_facts import read_run_facts
from tests.support.plugins import example

__all__ = ["example"]


def with_policy(run, plugins):
    own = load_policy("classifier").model_copy(update={"plugins": plugins})
    run.store.put_new("own.json", own.model_dump_json().encode())
    return f"{run.store.uri}/own.json"


def test_the_steps_use_a_plug_in_that_policy_and_image_allow(run, example):
    assert run.fetch(method="uniform", policy_uri=with_policy(run, ["salun-example"]))[0] == 0
    run.mask(method="uniform", density=0.5)
    run.unlearn(method="uniform")
    scratch, after = Scratch(run.store, run.name), run.reference("after")
    assert after.facts["method"] == "uniform"
    facts = read_run_facts(scratch.get(after.find(Kind.MODEL), run.folder / "got"), "uniform")
    assert [record.name for record in facts.plugins] == ["uniform"]


def test_the_first_step_refuses_a_method_that_the_image_does_not_allow(run, example, monkeypatch):
    """A parameter of the run names code; the variable that allows it is in the image, which no parameter changes."""
    monkeypatch.setenv("SALUN_PLUGINS", "")
    policy = with_policy(run, ["salun-example"])
    assert run.fetch(method="uniform", policy_uri=policy) == (2, [])
    assert "method uniform is not allowed" in read_outcome(run.store, run.name).text


def test_the_first_step_refuses_a_method_that_the_policy_does_not_list(run, example):
    assert run.fetch(method="uniform") == (2, [])
    assert "policy classifier does not allow the method uniform" in read_outcome(run.store, run.name).text
    assert json.dumps(run.reference("inputs").kind) == '"nothing"'
