"""Each step of the compiled pipelines a container of the built image, on a real store: a whole run, and a sweep.

`.ci/image` runs this. kfp.local takes a container that vanished before it could be asked for a success: so what counts
here is what lies in the store.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from pipelines.local import for_this_machine
from pipelines.packages import load_package
from salun_core.certificates.keys import create_key
from salun_core.certificates.verify import fetch_certificate, verify_certificate
from salun_core.config import load
from salun_core.data.targets import ClassTarget
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.models import load_model
from salun_core.registry.lookup import ancestry, read_head
from salun_core.registry.versions import fetch_version
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.storage.leases import holder_of
from salun_core.times import utc_clock

IMAGE = os.environ.get("SALUN_BUILT_IMAGE", "")
pytestmark = [
    pytest.mark.s3,
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore::UserWarning:kfp.*"),  # of resources, which mean nothing here
    pytest.mark.skipif(not IMAGE, reason="takes minutes and an engine: `make image`, which sets SALUN_BUILT_IMAGE"),
]
LINE = "digits"
UID = 10001
STEPS = ["compute-mask", "evaluate", "fetch-model", "gate-publish", "unlearn"]
AROUND = ["claim-requests", "purge-store", "settle-requests"]
QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005})


@pytest.fixture(scope="module")
def image_digest():
    """The digest of the image under test, from the engine that DOCKER_HOST names."""
    docker = pytest.importorskip("docker", reason="kfp's DockerRunner needs the package docker")
    engine = docker.from_env()
    try:
        return engine.images.get(IMAGE).id
    finally:
        engine.close()


class Cluster:
    """Runs a compiled pipeline as a cluster would: every step a container, stricter than the restricted profile."""

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        self.signing = folder / "signing"  # what a cluster mounts from a Secret
        self.public = create_key(self.signing / "key").public
        (self.signing / "key.pem").chmod(0o644)  # its mode there is that of a volume of a Secret

    def run(self, pipeline, **arguments):
        """Run it and return the folder that the steps wrote."""
        from docker.types import Mount
        from kfp import components, local

        root = self.folder / pipeline
        root.mkdir()
        root.chmod(0o777)  # the steps have a uid of their own
        signing = Mount("/etc/salun/signing", str(self.signing), type="bind", read_only=True)
        runner = local.DockerRunner(
            network_mode="host",  # where the store listens on loopback
            read_only=True,
            tmpfs={"/tmp": ""},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            environment=self.settings,
            mounts=[signing],
        )
        local.init(runner=runner, pipeline_root=str(root))
        text = for_this_machine(load_package(pipeline, IMAGE).text, f"image-{secrets.token_hex(4)}", {})
        components.load_component_from_text(text)(model_line=LINE, method="salun", method_config=QUICK, **arguments)
        return root


@pytest.fixture
def cluster(s3_server, image_digest):
    """With the folder of the run outside pytest's own, which other uids may not enter."""
    folder = Path(tempfile.mkdtemp(prefix="salun-image-"))
    folder.chmod(0o755)
    try:
        yield Cluster(folder, {**s3_server, "OMP_NUM_THREADS": "1", "SALUN_IMAGE_DIGEST": image_digest})
    finally:
        shutil.rmtree(folder, ignore_errors=os.geteuid() != 0)


def ran_in_containers(root, steps):
    """Each step wrote its outputs, and as the image's user: not this process, nor root."""
    written = {path.parent.name: path.stat().st_uid for path in root.glob("*/*/executor_output.json")}
    assert written == dict.fromkeys(steps, UID)


def test_five_steps_from_fetch_to_publish(cluster, store, digits_line, digits_model, tmp_path):
    parent = read_head(store, LINE)[0].version
    ids = sorted(load_model(digits_model).split.train)[::10]
    store.put_new("forget.json", json.dumps({"kind": "samples", "ids": ids}).encode())
    root = cluster.run("unlearning-cpu", store_uri=store.uri, forget_manifest_uri=f"{store.uri}/forget.json")
    ran_in_containers(root, STEPS)
    head = read_head(store, LINE)[0].version
    assert head != parent
    manifest = fetch_version(store, LINE, head, tmp_path / "model")  # every file against its digest
    assert (manifest.parent, manifest.forget_count, manifest.method) == (parent, len(ids), "salun")
    assert load(GateDecision, tmp_path / "model" / "decision.json").passed
    evidence = load(Evidence, tmp_path / "model" / "evidence.json")
    assert evidence.integrity.frozen_changed == 0
    assert evidence.metrics["TA"].after > 0.9
    assert load_model(tmp_path / "model").digest != load_model(digits_model).digest


def test_a_sweep_from_claim_to_certificate(cluster, store, digits_line, digits_model, image_digest, tmp_path):
    parent, split = read_head(store, LINE)[0].version, load_model(digits_model).split
    ledger = Ledger(store, utc_clock)
    ledger.submit("r-1", LINE, ClassTarget(dataset_digest=split.dataset_digest, class_id=3))
    root = cluster.run("deletion-sweep-cpu", store_uri=store.uri, min_requests=1)
    ran_in_containers(root, sorted([*STEPS, *AROUND]))
    assert ledger.status("r-1") is Status.COMPLETED
    assert holder_of(store, LINE) is None
    head = read_head(store, LINE)[0].version
    assert [version.digest for version in ancestry(store, LINE)] == [head, parent]
    fetch_version(store, LINE, head, tmp_path / "model")
    fetch_certificate(store.uri, "r-1", tmp_path / "r-1.json")
    verified = verify_certificate(tmp_path / "r-1.json", tmp_path / "model", [cluster.public])
    stated = verified.certificate.predicate
    assert (stated.model.version, stated.outcome) == (head, "unlearned")
    assert stated.provenance.image_digest == image_digest
