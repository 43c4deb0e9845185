"""The fan-out over shards, compiled and run: its mask is the one of one process."""

import json

from pipelines.local import run_compiled
from pipelines.packages import COMPILED
from salun_core.methods.recipe import Recipe
from salun_core.pods.reference import Scratch, read_reference
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from tests.pipelines.conftest import messages, read

SHIPPED = COMPILED / "salun-sharded-mask-cpu.yaml"


def test_no_retry_inside_the_loop():
    """Retries inside a loop are an open defect of Kubeflow: issue 13897."""
    spec, _ = read(SHIPPED.stem)
    (loop,) = [item for name, item in spec["components"].items() if name.startswith("comp-for-loop")]
    (shard,) = loop["dag"]["tasks"].values()
    assert "retryPolicy" not in shard


def test_sharded_mask_equals_the_mask_of_one_process(trained, digits_model, tmp_path, monkeypatch, forked_runs):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forget = json.dumps({"kind": "samples", "ids": sorted(train_ids(digits_model))[:600]})
    trained.store.put_new("many.json", forget.encode())
    arguments = {
        "model_line": "digits",
        "store_uri": trained.store.uri,
        "forget_manifest_uri": f"{trained.store.uri}/many.json",
        "shards": 3,
    }
    run = run_compiled(SHIPPED, arguments, tmp_path / "run")
    assert run.exit_code == 0, run.error
    (artifact,) = (tmp_path / "run").rglob("merge-scores/mask")
    reference = read_reference(artifact)
    assert reference.uri in run.outcome.text
    made = Scratch(trained.store, run.run).get(reference, tmp_path / "made") / "mask.safetensors"
    context = RunContext(digits_model, arguments["forget_manifest_uri"], device="cpu")
    alone = compute_mask(context, Recipe(), tmp_path / "alone")
    assert SaliencyMask.load(made).digest == alone.digest
    assert SaliencyMask.load(made).facts["shards"] == "3"
    said = messages(run)
    assert sum(line["event"] == "step_finished" for line in said) == 5
    assert {line.get("run") for line in said} == {run.run}


def train_ids(folder):
    from salun_core.models import load_model

    return load_model(folder).split.train
