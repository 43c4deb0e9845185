"""The compiled pipeline that forgets a class of a classifier forgets one of a diffusion model too."""

import json

import pytest

from pipelines.local import run_compiled
from pipelines.packages import COMPILED
from salun_core.models import load_model
from salun_core.registry.lookup import read_head, read_version
from salun_core.tasks import register_model
from tests.support.tiny_diffusion_models import CLASS, PERMISSIVE, QUICK, tiny_ddpm

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
pytestmark = pytest.mark.s3


def test_the_same_pipeline_serves_a_diffusion_line(store, digits_model, tmp_path):
    register_model(store, "judge", digits_model, "train", len(load_model(digits_model).split.train))
    model = tiny_ddpm(tmp_path / "model", "judge")
    parent = register_model(store, "ddpm", model, "train", 1000)
    store.put_new("policy.json", json.dumps(PERMISSIVE).encode())
    store.put_new("forget.json", json.dumps({"kind": "class", "class_id": CLASS}).encode())
    given = {
        "model_line": "ddpm",
        "store_uri": store.uri,
        "forget_manifest_uri": f"{store.uri}/forget.json",
        "policy_uri": f"{store.uri}/policy.json",
        "method_config": json.dumps(QUICK),
    }
    done = run_compiled(COMPILED / "salun-unlearning.yaml", given, tmp_path / "run", lambda line: None)
    assert done.exit_code == 0, done.error
    head = read_head(store, "ddpm")[0].version
    assert (done.version, read_version(store, "ddpm", head).parent) == (head, parent)
    evidence = json.loads(done.files["evidence.json"].read_text())
    assert evidence["integrity"]["frozen_changed"] == 0
    assert evidence["generation"]["judge"]
    assert "data:image/" in done.files["report.html"].read_text()
