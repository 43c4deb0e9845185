"""A run is held to the forget set and the policy that its record names, and a given mask is always compared."""

from types import SimpleNamespace

import pytest
import torch

from salun_core.errors import IntegrityError
from salun_core.evaluation.evidence import RunFacts
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.sweeps.runs import RunLog
from salun_core.tasks.masks import used_mask
from salun_core.tasks.resolve import policy_digest
from salun_core.times import utc_clock
from tests.support.toy_line import run_record

CLAIMED, OTHER = "f" * 64, "0" * 64


def context_of(store, tmp_path, digest, run="run-1"):
    """A context whose forget set has a digest; nothing else of it is read."""
    context = RunContext(tmp_path, "unused", store_uri=store.uri, run=run)
    context.__dict__["inputs"] = SimpleNamespace(forget_set=SimpleNamespace(digest=digest))
    return context


@pytest.fixture
def recorded(store):
    record = run_record("run-1", "a" * 64, "2026-01-02T03:04:05+00:00", policy_digest="b" * 64)
    RunLog(store, utc_clock).start(record, "sweep")
    return store


def test_a_forget_set_that_was_replaced_is_refused(recorded, tmp_path):
    context_of(recorded, tmp_path, CLAIMED).require_claimed()
    with pytest.raises(IntegrityError, match="the forget set that the run claimed"):
        context_of(recorded, tmp_path, OTHER).require_claimed()


def test_a_policy_that_was_replaced_is_refused(recorded, tmp_path):
    context = context_of(recorded, tmp_path, CLAIMED)
    context.require_claimed("b" * 64)
    with pytest.raises(IntegrityError, match="the policy that the run began with"):
        context.require_claimed(policy_digest("classifier"))


def test_without_a_record_there_is_nothing_to_compare(store, tmp_path):
    context_of(store, tmp_path, OTHER, run="run-2").require_claimed(OTHER)
    context_of(store, tmp_path, OTHER, run="").require_claimed(OTHER)


def test_auto_is_the_policy_of_the_code_and_has_no_digest_in_the_record():
    assert policy_digest("auto") is None
    assert len(policy_digest("classifier")) == 64


def test_a_given_mask_is_compared_although_the_facts_of_the_run_are_missing(tmp_path):
    mask = SaliencyMask.from_scores({"weight": torch.arange(8.0)}, 0.5)
    mask.save(tmp_path / "mask")
    for facts in (RunFacts(method="salun"), RunFacts(method="finetune"), RunFacts(method="salun", density=0.5)):
        assert used_mask(tmp_path, tmp_path / "mask", facts, None) == mask
    SaliencyMask.full({"weight": (8,)}).save(tmp_path / "full")
    assert used_mask(tmp_path, tmp_path / "full", RunFacts(method="finetune"), None) is None
    assert used_mask(tmp_path, None, RunFacts(method="finetune"), None) is None
