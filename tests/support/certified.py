"""What certificates are made from: a request, a version with its files, and evidence that passed the gate."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from salun_core.certificates.issue import CertificateInput, VersionDocuments, certify, issue_addendum
from salun_core.certificates.keys import public_pem
from salun_core.certificates.statement import DisposalDone
from salun_core.data.targets import SubjectTarget
from salun_core.digest import digest_json, sha256_bytes
from salun_core.evaluation.evidence import Evidence, Forgotten, Integrity, Measured, Metric, RunFacts
from salun_core.gate import decide, load_policy
from salun_core.registry.lookup import Version
from salun_core.registry.manifest import VersionManifest
from salun_core.requests.schema import DeletionRequest, Outcome
from salun_core.storage.keys import certificate_key
from tests.support.memory_store import MemoryStore

CANARIES = ("person-canary-07", "ticket-canary", "sample-canary", "class-canary")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WEIGHTS, OTHER = sha256_bytes(b"weights"), sha256_bytes(b"other")
REQUEST = DeletionRequest(
    id="r-1",
    model_line="faces",
    target=SubjectTarget(subject_ref=CANARIES[0]),
    received_at="2026-01-31T09:00:00+00:00",
    due_at="2026-02-28T09:00:00+00:00",
    source=CANARIES[1],
)


def manifest_of(files, method="salun", created_at="2026-02-03T10:00:00+00:00"):
    return VersionManifest(
        line="faces",
        parent=OTHER,
        created_at=created_at,
        files={name: {"sha256": sha256_bytes(data), "size": len(data)} for name, data in files.items()},
        run="run-7",
        method=method,
        forget_set_digest=OTHER,
        forget_count=40,
        retrained=method == "retrain",
        lineage={"runs_since_training": 2, "forgotten_since_training": 60, "trained_on": 1200},
    )


def evidence_of(after=WEIGHTS, method="salun"):
    metric = {"before": 0.0, "after": 0.975, "reference": 1.0, "n": 40, "low": 0.871, "high": 0.996}
    return Evidence(
        created_at="2026-02-03T10:00:00+00:00",
        measured=Measured(before=OTHER, after=after, dataset=OTHER, split=OTHER, forget_set=OTHER, mask=OTHER),
        forgotten=Forgotten(count=40, train_count=1200, kinds=["subject"]),
        integrity=Integrity(
            weights=100, weights_changed=50, frozen_changed=0, non_finite=0, buffers_changed=0, distance=0.99
        ),
        metrics={
            "UA": Metric(**metric),
            "RA": Metric(before=1.0, after=0.99, n=1160, low=0.98, high=0.995),
            "TA": Metric(before=0.96, after=0.95, origin=0.97, n=300, low=0.92, high=0.97),
            "UA_samples": Metric(before=0.0, after=0.1, n=40, low=0.04, high=0.23),
            "UA_unseen": Metric(before=0.04, after=0.05, n=300, low=0.03, high=0.08),
            "MIA": Metric(**metric),
            "attack_auc": Metric(before=0.7, after=0.5, n=40, low=0.4, high=0.6),
            "attack_shape": Metric(before=0.5, after=0.1, n=40, low=0.0, high=0.25),
            "effect": Metric(before=0.0, after=0.2, n=40, low=0.1, high=0.3),
            "change": Metric(before=0.0, after=0.4, n=40, low=0.3, high=0.5),
            "TA_loss": Metric(before=0.2, after=0.25, n=300, low=0.2, high=0.3),
            "RA_loss": Metric(before=0.01, after=0.02, n=1160, low=0.01, high=0.03),
            "MIA_entropy": Metric(before=float("nan"), after=None, n=0),
        },
        classes=[CANARIES[3]],
        run=RunFacts(
            method=method,
            config={"epochs": 5, "learning_rate": 0.003, "clip": None, "momentum": 1.0},
            seed=3,
            density=0.5,
            environment={"torch": "2.13.0", "device": "cpu"},
        ),
    )


def judged(evidence):
    """The documents of a version: its evidence, and the decision that the gate made on it."""
    return VersionDocuments(OTHER, evidence, decide(evidence, load_policy("classifier")))


def input_of(files=None, outcome=Outcome.UNLEARNED, documents=None, **changed):
    """What a certificate is made from: the sweep's input, and the version's documents."""
    files = files or {"model.safetensors": b"weights", "model.json": b"{}"}
    method = "retrain" if outcome is Outcome.RETRAINED else "salun"
    manifest = manifest_of(files, method)
    documents = documents or judged(evidence_of(sha256_bytes(files["model.safetensors"]), method))
    fields = {
        "request": REQUEST,
        "outcome": outcome,
        "completed_at": "2026-02-03T11:00:00.250000+00:00",
        "version": Version(manifest.digest, manifest),
        "salt": secrets.token_hex(16),
        "forget_digest": digest_json({"ids": [CANARIES[2]]}),
        "found": 3,
        "named": 4,
        "run": "run-7",
        "epoch": 2,
        "frozen_digest": OTHER,
    }
    return CertificateInput(**{**fields, **changed}), documents


def nothing(**changed):
    """Input about a request that names nothing to erase."""
    fields = {"found": 0, "run": None, "epoch": None, "frozen_digest": None}
    return input_of(outcome=Outcome.NOTHING_TO_ERASE, **{**fields, **changed})


def write_fixture(folder):
    """Write a certificate, an addendum, the public key and the folder `model`, whose files are read from there."""
    key, store = Ed25519PrivateKey.generate(), MemoryStore()
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    data = certify(*input_of(files, requests=1), key)
    store.put_new(certificate_key("r-1"), data)
    gone = DisposalDone(what="weights of the superseded version", at="2026-03-01T00:00:00+00:00")
    issue_addendum(store, "r-1", [gone], key)
    (folder / "certificate.json").write_bytes(data)
    (addendum,) = store.list("addenda/")
    (folder / "disposal.json").write_bytes(store.get(addendum.key).data)
    (folder / "salun.pub").write_bytes(public_pem(key.public_key()))


if __name__ == "__main__":
    write_fixture(Path(sys.argv[1]))
