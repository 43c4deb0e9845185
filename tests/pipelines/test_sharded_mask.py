"""The fan-out over shards, compiled and run: its mask is the one of one process."""

import json

import pytest
import yaml

from pipelines import sharded_mask
from pipelines.compile import compile_pipeline
from pipelines.local import run_compiled
from salun_core.saliency import SaliencyMask
from salun_core.steps.mask import compute_mask


@pytest.fixture(scope="module")
def compiled():
    return compile_pipeline(sharded_mask.sharded_mask, sharded_mask.NAME)


def test_the_compiled_fan_out_has_no_defects(compiled):
    assert compiled.defects() == []


def test_no_retry_inside_the_loop(compiled):
    """An open fault of Kubeflow's: issue 13897."""
    (shard,) = compiled.spec["components"]["comp-salun-score-shard"]["dag"]["tasks"].values()
    assert shard["retryPolicy"].get("maxRetryCount", 0) == 0


def test_the_fan_out_makes_the_mask_of_one_process(compiled, house, digits_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forget = json.dumps({"kind": "samples", "ids": sorted(house_ids(digits_model))[:600]})
    house.store.put_new("many.json", forget.encode())
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump_all([compiled.spec, compiled.platform]))
    arguments = {
        "model_line": "digits",
        "store_uri": house.store.uri,
        "forget_manifest_uri": f"{house.store.uri}/many.json",
        "shards": ["1/2", "2/2"],
    }
    run = run_compiled(tmp_path / "pipeline.yaml", arguments, tmp_path / "run")
    assert run.exit_code == 0, run.error
    (made,) = (tmp_path / "run").rglob("merge-scores/mask")
    alone = compute_mask(digits_model, arguments["forget_manifest_uri"], 0.5, tmp_path / "alone", device="cpu")
    assert SaliencyMask.load(made).digest == alone.digest
    assert SaliencyMask.load(made).facts["shards"] == "2"


def house_ids(folder):
    from salun_core.models import load_model

    return load_model(folder).split.train
