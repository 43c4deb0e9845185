"""Claiming concepts: they need no training data, and do not count against the share that a run forgets."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from salun_core.data import DataSpec, ForgetSet, load_data
from salun_core.data.split import SplitManifest
from salun_core.data.targets import ClassTarget, ConceptTarget, SamplesTarget
from salun_core.requests.resolve import TableResolver
from salun_core.requests.schema import Status
from salun_core.storage.keys import request_key, run_key, scratch_key
from salun_core.sweeps.claim import claim
from salun_core.tasks import TASKS
from salun_core.tasks.line import OpenLine
from salun_core.times import utc_clock
from tests.support import toy_line as toy

EMPTY = SplitManifest(dataset_digest="0" * 64, train={}, validation={}, test={})


def concept(number):
    return ConceptTarget(prompts=[f"secret {number}"], anchor_prompt="a bird")


@pytest.fixture
def context(store):
    toy.begin(store)
    return toy.sweep_context(store)


def submit(context, *targets):
    """File requests `r-0`, `r-1`…, each a minute after the one before."""
    start = utc_clock() - timedelta(hours=1)
    for number, target in enumerate(targets):
        context.ledger.submit(f"r-{number}", toy.LINE, target, start + timedelta(minutes=number))


def claimed(context, table, split, **settings):
    def resolver_of(line):
        return TableResolver(table, split, TASKS["diffusion"])

    return claim(context, OpenLine(context.store, toy.LINE), "run-1", toy.policy(**settings), resolver_of)


def test_a_line_without_data_claims_concepts_with_its_first_recipe(context):
    submit(context, concept(0), concept(1), concept(0), ClassTarget(class_id=3))
    found = claimed(context, None, EMPTY, max_forget_fraction=0.01)
    record = found.record
    assert [member.id for member in record.members] == ["r-0", "r-1", "r-2"]
    assert [(member.found, member.named) for member in record.members] == [(1, 1)] * 3
    assert (record.forget_count, record.train_count, record.rung, record.method) == (2, 0, 0, "salun")
    assert list(found.refused) == ["r-3"]
    frozen = ForgetSet.model_validate_json(context.store.get(scratch_key("run-1", "forget.json")).data)
    assert frozen.digest == record.forget_sha256
    assert len(frozen.concepts) == 2
    assert [context.ledger.status(f"r-{number}") for number in range(3)] == [Status.IN_PROGRESS] * 3


def test_classes_count_against_the_share_and_concepts_do_not(context):
    data = load_data(DataSpec(source="digits"))
    submit(context, ClassTarget(class_id=3), *map(concept, range(5)), ClassTarget(class_id=4), concept(9))
    found = claimed(context, data.table, data.split, max_forget_fraction=0.12)
    assert [member.id for member in found.record.members] == [*(f"r-{number}" for number in range(6)), "r-7"]
    assert found.record.rung == 0
    assert context.ledger.status("r-6") is Status.QUEUED


def test_a_class_beyond_the_share_is_claimed_alone_with_the_last_recipe(context):
    data = load_data(DataSpec(source="digits"))
    submit(context, ClassTarget(class_id=3), concept(1))
    found = claimed(context, data.table, data.split, max_forget_fraction=0.01)
    assert [member.id for member in found.record.members] == ["r-0"]
    assert (found.record.rung, found.record.method) == (len(toy.RECIPES) - 1, "retrain")


def test_single_samples_fail_and_do_not_delay_others(context):
    submit(context, SamplesTarget(ids=["unknown"]), concept(1))
    found = claimed(context, None, EMPTY)
    assert [member.id for member in found.record.members] == ["r-1"]
    assert context.ledger.status("r-0") is Status.FAILED
    assert "UsageError" in context.ledger.state("r-0").last.reason


def test_prompts_stay_in_the_request_and_the_frozen_set(context, caplog, capfd):
    submit(context, concept(1), concept(2))
    claimed(context, None, EMPTY)
    allowed = {request_key("r-0"), request_key("r-1"), scratch_key("run-1", "forget.json")}
    holding = {entry.key for entry in context.store.list("") if b"secret" in context.store.get(entry.key).data}
    assert holding == allowed
    assert json.loads(context.store.get(run_key("run-1", "run.json")).data)["forget_count"] == 2
    told = capfd.readouterr()
    assert "secret" not in caplog.text + told.out + told.err
