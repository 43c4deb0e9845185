"""The privacy canary: marked ids and a marked person go through a whole run; then all that is left is searched."""

from __future__ import annotations

import io
import json
from datetime import timedelta

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.local import run_compiled
from pipelines.packages import COMPILED
from salun_core.certificates.keys import create_key, load_signing_key
from salun_core.data import DataSpec
from salun_core.data.targets import SamplesTarget, SubjectTarget
from salun_core.methods.classification import UnlearnConfig
from salun_core.models import load_model
from salun_core.requests.gauges import GaugeReader
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.steps.purge import purge_store
from salun_core.tasks import register_model
from salun_core.tasks.classification.training import train_model
from salun_core.telemetry.exporter import Exporter
from salun_core.times import utc_clock

pytestmark = [pytest.mark.s3, pytest.mark.e2e]
MARK, PERSON = "canary-5ca1ab1e", "canary-person-0ddba11"
LINE = "canary"


@pytest.fixture
def data(tmp_path):
    """Digits as a folder of images: those of a person, and some others, have marked names."""
    digits, rows = load_digits(), []
    for index in range(900):
        label, train = int(digits.target[index]), index < 700
        folder = tmp_path / ("train" if train else "test")
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        marked = train and label != 7 and index % 25 == 0
        name = f"{MARK}-{index}.png" if marked else f"{index}.png"
        Image.fromarray((digits.images[index] * 15).astype(np.uint8)).save(folder / str(label) / name)
        rows.append((f"{label}/{name}", PERSON if train and index % 40 == 1 else "somebody"))
    table = tmp_path / "people.csv"
    table.write_text("file_name,person\n" + "".join(f"{name},{person}\n" for name, person in rows))
    parts = {"source": str(tmp_path / "train"), "test_source": str(tmp_path / "test")}
    return DataSpec(**parts, metadata=str(table), subject_column="person", validation_fraction=0)


@pytest.fixture
def line(store, data, tmp_path):
    config = UnlearnConfig(epochs=6, learning_rate=0.1, schedule="cosine", batch_norm="update", device="cpu")
    train_model(data, "resnet8", config, tmp_path / "model")
    split = load_model(tmp_path / "model").split
    register_model(store, LINE, tmp_path / "model", "train", len(split.train))
    return [sample for sample in split.train if MARK in sample]


def contents(store):
    """Every object and every older version of one that the store still has: key and bytes."""
    client, bucket, prefix = store._client, store._bucket, store._prefix
    for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
        for row in page.get("Versions", []):
            body = client.get_object(Bucket=bucket, Key=row["Key"], VersionId=row["VersionId"])["Body"].read()
            yield row["Key"][len(prefix) :], body


def decoded(body):
    """Return a Parquet file with its values as text, since they are compressed; any other bytes as they are."""
    return body + repr(pq.read_table(io.BytesIO(body)).to_pydict()).encode() if body.startswith(b"PAR1") else body


def hits(pairs):
    marks = (MARK.encode(), PERSON.encode())
    pairs = [(name, decoded(body)) for name, body in pairs]
    return sorted(name for name, body in pairs if any(mark in body or mark in name.encode() for mark in marks))


def test_nothing_that_was_named_is_found_after_settling(store, line, tmp_path, monkeypatch, capfd, forked_runs):
    keys = create_key(tmp_path / "keys" / "salun")
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(keys.private))
    policy = tmp_path / "policy.yaml"
    rule = {"metric": "RA", "op": ">=", "value": 0.5, "reason": "the canary is about names, not about quality"}
    policy.write_text(json.dumps({"name": "canary", "rules": [rule]}))
    ledger = Ledger(store, utc_clock)
    ledger.submit("samples", LINE, SamplesTarget(ids=line))
    ledger.submit("person", LINE, SubjectTarget(subject_ref=PERSON))
    ledger.submit("gone", LINE, SamplesTarget(ids=[f"{MARK}-never-trained-on"]))
    ledger.submit("withdrawn", LINE, SubjectTarget(subject_ref=PERSON))
    ledger.cancel("withdrawn", "ana", "changed their mind")
    assert hits(contents(store)), "the marks must be found before, or the search finds nothing"

    run = run_compiled(
        COMPILED / "salun-deletion-sweep-cpu.yaml",
        {
            "model_line": LINE,
            "store_uri": store.uri,
            "min_requests": 1,
            "policy_uri": str(policy),
            "method": "salun",
            "method_config": json.dumps({"epochs": 1, "device": "cpu"}),
            "max_forget_fraction": 0.3,
        },
        tmp_path / "work",
        progress=print,
    )
    assert run.exit_code == 0, run.error
    assert {ledger.status(name) for name in ("samples", "person")} == {Status.COMPLETED}
    assert ledger.status("gone") == Status.ON_HOLD  # the data do not have that name: a person decides
    assert [key for key in hits(contents(store)) if not key.startswith("blobs/")] == ["requests/gone/request.json"]
    ledger.cancel("gone", "ana", "there is no such sample")

    exporter = Exporter(GaugeReader(store, utc_clock).take, 60)
    exporter.refresh()
    assert hits([("metrics", exporter.text().encode())]) == []
    assert hits([("log", "".join(capfd.readouterr()).encode())]) == []
    written = [
        (str(path.relative_to(run.folder)), path.read_bytes()) for path in run.folder.rglob("*") if path.is_file()
    ]
    assert hits(written) == []
    left = hits(contents(store))
    parents_split = [key for key in left if key.startswith("blobs/")]
    assert left == parents_split
    assert len(parents_split) == 1

    later = utc_clock() + timedelta(days=31)
    purge_store(store.uri, signer=load_signing_key(keys.private), clock=lambda: later)
    assert hits(contents(store)) == []
