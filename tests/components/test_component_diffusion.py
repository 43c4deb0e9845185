"""The components that let a classifier forget a class let a diffusion model forget one too."""

import json

import pytest

from salun_core.models import load_model
from salun_core.registry.lookup import read_head, read_version
from salun_core.storage.blobs import fetch_blob
from salun_core.tasks import register_model
from tests.components.conftest import LINE, Run
from tests.components.test_component_steps import ended, gate
from tests.support.tiny_diffusion_models import CLASS, PERMISSIVE, QUICK, tiny_ddpm

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
pytestmark = pytest.mark.s3


def test_the_same_steps_serve_a_diffusion_line(store, digits_model, tmp_path):
    register_model(store, "judge", digits_model, "train", len(load_model(digits_model).split.train))
    parent = register_model(store, LINE, tiny_ddpm(tmp_path / "model", "judge"), "train", 1000)
    store.put_new("policy.json", json.dumps(PERMISSIVE).encode())
    store.put_new("forget.json", json.dumps({"kind": "class", "class_id": CLASS}).encode())
    run = Run(store, parent, f"{store.uri}/forget.json", [], tmp_path)
    policy, config = f"{store.uri}/policy.json", json.dumps(QUICK)
    assert run.fetch(policy_uri=policy, method_config=config)[0] == 0
    run.mask(method_config=config)
    run.unlearn(method_config=config)
    run.evaluate()
    decision, report, _ = gate(run, policy_uri=policy)
    head = read_head(store, LINE)[0].version
    version = read_version(store, LINE, head)
    assert (ended(run).state, decision.facts["version"], version.parent) == ("published", head, parent)
    file = version.files["evidence.json"]
    fetch_blob(store, file.sha256, tmp_path / "evidence.json", file.size)
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    assert evidence["integrity"]["frozen_changed"] == 0
    assert evidence["generation"]["judge"]
    assert run.made["metrics"].metadata["UA_after"] == evidence["metrics"]["UA"]["after"]
    assert "data:image/" in report
