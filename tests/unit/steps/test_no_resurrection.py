"""What one run forgot, the next run may not retain: it would be learnt again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from salun_core.errors import DataError, GateRefusedError, IntegrityError
from salun_core.models import load_model, save_model
from salun_core.registry.lookup import ancestry, read_head
from salun_core.steps.context import RunContext
from salun_core.steps.fetch import fetch_model
from salun_core.steps.publishing import gate_and_publish
from salun_core.steps.run import run_all
from salun_core.steps.run_form import UnlearningForm
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.runs import RunLog
from salun_core.tasks import register_model
from salun_core.tasks.resolve import policy_digest
from salun_core.times import utc_clock
from tests.support.toy_line import run_record

pytestmark = pytest.mark.s3
KEPT = {"metric": "RA", "op": ">=", "reason": "retained data must be classified"}


def targets(folder: Path, ids: list[str]) -> str:
    path = folder / f"forget-{len(ids)}-{ids[0].replace('/', '-')}.json"
    path.write_text(json.dumps({"kind": "samples", "ids": ids}))
    return str(path)


def settings(store: S3Store, forget: str) -> UnlearningForm:
    policy = Path(forget).with_name("kept.json")  # what is forgotten how well is not the question here
    policy.write_text(json.dumps({"name": "kept", "rules": [{**KEPT, "value": 0.5}]}))
    places = {"model_line": "digits", "forget_manifest_uri": forget, "store_uri": store.uri, "policy_uri": str(policy)}
    return UnlearningForm.model_validate({**places, "method": "salun", "method_config": {"epochs": 2}})


def test_a_second_run_does_not_retain_what_the_first_forgot(digits_model: Path, store: S3Store, tmp_path: Path) -> None:
    ids = load_model(digits_model).split.ids("train")
    register_model(store, "digits", digits_model, "train", len(ids))
    first, second = ids[:8], ids[8:20]
    run_all(settings(store, targets(tmp_path, first)), tmp_path / "one")
    outcome = run_all(settings(store, targets(tmp_path, second)), tmp_path / "two")

    child = load_model(tmp_path / "two" / "after")
    assert set(child.split.train) == set(ids) - set(first) - set(second)
    assert child.split.dataset_digest == load_model(digits_model).split.dataset_digest
    assert outcome.evidence.forgotten.train_count == len(ids) - len(first)
    newest = ancestry(store, "digits")[0].manifest
    assert (newest.lineage.runs_since_training, newest.lineage.forgotten_since_training) == (2, 20)
    with pytest.raises(DataError, match="forget set is empty"):
        fetch_model(RunContext(tmp_path / "three", targets(tmp_path, first), "digits", store.uri))


def test_a_candidate_that_would_retain_them_is_not_published(
    digits_model: Path, store: S3Store, tmp_path: Path
) -> None:
    original = load_model(digits_model)
    forget = targets(tmp_path, original.split.ids("train")[:8])
    parent = register_model(store, "digits", digits_model, "train", len(original.split.train))
    register_model(store, "twin", digits_model, "train", len(original.split.train))
    run_all(settings(store, forget).model_copy(update={"model_line": "twin"}), tmp_path / "run")

    made = load_model(tmp_path / "run" / "after")
    card = made.card.model_copy(update={"split_digest": original.split.digest})
    save_model(tmp_path / "whole-split", made.model, card, original.split)
    paths = tmp_path / "whole-split", tmp_path / "run" / "evidence.json", tmp_path / "report.html"
    with pytest.raises(IntegrityError, match="the split of the model after"):
        gate_and_publish(RunContext(tmp_path / "run" / "before", forget, "digits", store.uri), *paths, parent=parent)

    # The evidence of this run is replayed: for another request, and for another model.
    others = targets(tmp_path, original.split.ids("train")[8:20])
    kept = original.split.without(original.split.ids("train")[8:20])
    save_model(tmp_path / "others", made.model, made.card.model_copy(update={"split_digest": kept.digest}), kept)
    context = RunContext(tmp_path / "run" / "before", others, "digits", store.uri)
    with pytest.raises(GateRefusedError, match="the evidence was measured on another forget set"):
        gate_and_publish(context, tmp_path / "others", *paths[1:], parent=parent)
    with torch.no_grad():
        next(made.model.parameters()).mul_(2)
    save_model(tmp_path / "other-model", made.model, made.card, made.split)
    context = RunContext(tmp_path / "run" / "before", forget, "digits", store.uri)
    with pytest.raises(GateRefusedError, match="the evidence was measured on another after"):
        gate_and_publish(context, tmp_path / "other-model", *paths[1:], parent=parent)

    # Somebody edits the policy while the run works.
    edited = tmp_path / "edited.json"
    edited.write_text(
        json.dumps({"name": "mild", "rules": [{"metric": "RA", "op": ">=", "value": 0, "reason": "any"}]})
    )
    claimed = {"policy_digest": policy_digest("classifier"), "forget_sha256": context.inputs.forget_set.digest}
    RunLog(store, utc_clock).start(run_record("run-9", parent, "2026-01-02T03:04:05+00:00", **claimed), "sweep")
    context = RunContext(tmp_path / "run" / "before", forget, "digits", store.uri, run="run-9")
    with pytest.raises(IntegrityError, match="the policy that the run began with"):
        gate_and_publish(context, tmp_path / "run" / "after", *paths[1:], parent=parent, policy_uri=str(edited))
    head = read_head(store, "digits")
    assert head is not None
    assert head[0].version == parent
