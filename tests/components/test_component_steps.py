"""Each component, called as Kubeflow calls it, on real artifacts and a real store."""

import json
import math
import shutil
from pathlib import Path

import pytest
from kfp import dsl

from components.claim_requests import claim_requests
from components.compute_mask import compute_mask
from components.evaluate import evaluate
from components.fetch_model import fetch_model
from components.gate_publish import gate_publish
from components.settle_requests import settle_requests
from components.unlearn import unlearn
from salun_core.config import load
from salun_core.data.targets import ClassTarget
from salun_core.errors import ConflictError, DataError, GateRefusedError, IntegrityError, UsageError
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.models import load_model
from salun_core.registry.lookup import ancestry, read_head, read_version
from salun_core.registry.versions import publish
from salun_core.requests.ledger import Ledger
from salun_core.saliency import SaliencyMask
from salun_core.storage.keys import run_key
from salun_core.times import utc_clock

pytestmark = pytest.mark.s3


def test_fetch_model_returns_head(chain):
    assert chain.fetched == chain.parent
    assert chain.before.metadata == {"model_line": "digits", "version": chain.parent}
    assert load_model(Path(chain.before.path)).card.architecture == "resnet8"


def test_fetch_model_refuses_an_unknown_line(chain, tmp_path):
    with pytest.raises(UsageError, match="has no HEAD"):
        fetch_model.python_func(chain.store.uri, "digitz", chain.forget_uri, dsl.Model(uri=str(tmp_path / "model")))


def test_fetch_model_refuses_to_forget_everything(chain, tmp_path):
    everything = tmp_path / "all.json"
    split = load_model(Path(chain.before.path)).split
    everything.write_text(json.dumps({"kind": "samples", "ids": sorted(split.train)}))
    with pytest.raises(DataError):
        fetch_model.python_func(chain.store.uri, "digits", str(everything), dsl.Model(uri=str(tmp_path / "model")))


def test_compute_mask_writes_the_mask(chain):
    mask = SaliencyMask.load(chain.mask.path)
    assert chain.mask.metadata == {"density": mask.density, "digest": mask.digest}
    assert mask.density == pytest.approx(0.5, abs=1e-4)


def test_compute_mask_refuses_a_wrong_density(chain, tmp_path):
    with pytest.raises(UsageError, match="density"):
        compute_mask.python_func(chain.before, chain.forget_uri, 1.5, dsl.Artifact(uri=str(tmp_path / "mask")))
    assert not (tmp_path / "mask").exists()


def test_unlearn_writes_a_child_of_the_model(chain):
    before, after = (load_model(Path(item.path)) for item in (chain.before, chain.after))
    assert after.card.parent == before.digest
    assert after.digest != before.digest
    assert chain.after.metadata["method"] == "salun"


def test_unlearn_refuses_the_mask_of_another_forget_set(chain, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"kind": "class", "class_id": 3}))
    with pytest.raises(IntegrityError, match="forget set of the mask"):
        unlearn.python_func(chain.before, chain.mask, str(other), dsl.Model(uri=str(tmp_path / "after")))


@pytest.mark.parametrize("text", ["[1, 2]", '{"epochz": 2}', "{"])
def test_unlearn_refuses_a_wrong_configuration(chain, tmp_path, text):
    with pytest.raises(UsageError):
        unlearn.python_func(
            chain.before, chain.mask, chain.forget_uri, dsl.Model(uri=str(tmp_path / "after")), method_config=text
        )
    assert not (tmp_path / "after").exists()


def test_evaluate_logs_the_evidence(chain):
    evidence = load(Evidence, Path(chain.evidence.path))
    logged = chain.metrics.metadata
    assert {"UA_after", "RA_after", "TA_after", "MIA_after", "mask_density"} <= set(logged)
    assert logged["TA_before"] == evidence.metrics["TA"].before
    assert all(isinstance(value, float) and math.isfinite(value) for value in logged.values())
    matrix = chain.classification.metadata["confusionMatrix"]
    assert [row["row"] for row in matrix["rows"]] == evidence.confusion
    assert [item["displayName"] for item in matrix["annotationSpecs"]] == evidence.classes
    assert "reference" not in evidence.roc
    assert Path(chain.report.path).read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_evaluate_retrains_when_asked_to(chain, tmp_path):
    metrics, report = dsl.Metrics(), dsl.HTML(uri=str(tmp_path / "report"))
    evidence = dsl.Artifact(uri=str(tmp_path / "evidence"))
    evaluate.python_func(
        chain.before,
        chain.after,
        chain.mask,
        chain.forget_uri,
        evidence,
        metrics,
        dsl.ClassificationMetrics(),
        report,
        retrain_reference=True,
    )
    assert 0 < metrics.metadata["RA_reference"] <= 1
    assert metrics.metadata["gap_after"] >= 0
    assert metrics.metadata["seconds_reference"] > 0


def judge(chain, folder, **changes):
    """Call the last component: (decision, report, the digest that it returned)."""
    decision, report = dsl.Artifact(uri=str(folder / "decision")), dsl.HTML(uri=str(folder / "report"))
    artifacts = {"before": chain.before, "after": chain.after, "mask": chain.mask, "evidence": chain.evidence}
    place = {"store_uri": chain.store.uri, "model_line": "digits", "forget_manifest_uri": chain.forget_uri}
    given = {**artifacts, **place, "parent": chain.parent, "decision": decision, "report": report, **changes}
    return decision, report, gate_publish.python_func(**given)


def test_gate_publish_refuses_publishes_and_may_be_repeated(chain, tmp_path):
    """One test, because each part changes the line for the next one."""
    strict = tmp_path / "strict.json"
    rule = {"metric": "TA", "op": ">=", "value": 1.0, "reason": "no model is perfect"}
    strict.write_text(json.dumps({"format": "salun.policy/v1", "name": "strict", "rules": [rule]}))
    with pytest.raises(GateRefusedError):
        judge(chain, tmp_path, policy_uri=str(strict), run_id="run-1")
    assert read_head(chain.store, "digits")[0].version == chain.parent
    assert chain.store.get(run_key("run-1", "decision.json")) is not None

    decision, report, version = judge(chain, tmp_path, run_id="run-2")
    assert read_head(chain.store, "digits")[0].version == version
    assert read_version(chain.store, "digits", version).run == "run-2"
    assert load(GateDecision, Path(decision.path)).passed
    assert "run-2" not in decision.metadata.values()
    assert Path(report.path).read_text(encoding="utf-8").rstrip().endswith("</html>")

    assert judge(chain, tmp_path, run_id="run-2")[2] == version  # the pod was lost after publishing
    assert len(ancestry(chain.store, "digits")) == 2
    with pytest.raises(ConflictError, match="stale parent"):
        judge(chain, tmp_path, run_id="run-3")

    files = {name: Path(chain.after.path) / name for name in ("model.safetensors", "model.json", "split.json")}
    fields = {"line": "digits", "parent": version, "method": "retrain", "lineage": {"trained_on": 1}}
    newest = publish(chain.store, fields, files)[0].version
    assert judge(chain, tmp_path, run_id="run-2")[2] == version  # and another version was published on top
    assert read_head(chain.store, "digits")[0].version == newest


def test_gate_publish_refuses_another_model_as_parent(chain, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(chain.before.path, other)
    shutil.copyfile(Path(chain.after.path) / "model.safetensors", other / "model.safetensors")
    with pytest.raises(IntegrityError, match="model before"):
        judge(chain, tmp_path, before=dsl.Model(uri=str(other)))


def test_settled_run_publishes_nothing(chain, digits_line, store, tmp_path):
    """Another process took the run over and settled it; its later results are refused."""
    Ledger(store, utc_clock).submit("r-1", digits_line, ClassTarget(class_id=3))
    claim = {"store_uri": store.uri, "model_line": digits_line, "run_id": "run-1", "min_requests": 1}
    seen = claim_requests.python_func(**claim, dry_run=True)
    assert seen[0] == 0
    assert seen[-1] == "1 waiting; a batch is due: 1 waiting, and 1 make a batch"

    requests, forget_uri, *recipe, reason = claim_requests.python_func(**claim, method_config='{"epochs": 1}')
    assert (requests, recipe, reason) == (1, ["salun", 0.5, '{"epochs": 1}'], "1 waiting, and 1 make a batch")
    status = dsl.PipelineTaskFinalStatus("FAILED", "job", "exit-handler-1", None, None)
    assert settle_requests.python_func(store.uri, digits_line, "run-1", status) == ("failed", 0, 1, 0)

    with pytest.raises(ConflictError, match="run run-1 has ended"):
        compute_mask.python_func(
            chain.before,
            chain.forget_uri,
            0.5,
            dsl.Artifact(uri=str(tmp_path / "mask")),
            store_uri=store.uri,
            run_id="run-1",
        )
    assert not (tmp_path / "mask").exists()
