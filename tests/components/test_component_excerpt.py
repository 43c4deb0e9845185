"""Runs on data with a row index: steps that need the forget set alone read its rows, and not the whole split."""

import io
import json
import secrets

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from salun_core.data import DataSpec
from salun_core.data.split import SPLIT, read_split
from salun_core.digest import digest_json, hmac_file
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.recipe import Recipe
from salun_core.pods import steps
from salun_core.pods.pod import Pod
from salun_core.pods.reference import Kind, read_reference, write_reference
from salun_core.registry.lookup import read_version, require_head
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from salun_core.steps.outcome import read_outcome
from salun_core.storage import open_store
from salun_core.storage.keys import scratch_key
from salun_core.storage.s3 import S3Store
from salun_core.tasks import register_model
from salun_core.tasks.classification.training import train_model
from salun_core.tasks.line import OpenLine

pytestmark = pytest.mark.s3
LINE, ROWS, FORGOTTEN = "large", 120, 4
QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier of 120 images, which are streamed as if they were many."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    images = []
    for _ in range(ROWS):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "BMP")
        images.append(file.getvalue())
    table = pyarrow.table({"image": images, "label": [row % 3 for row in range(ROWS)]})
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(table, folder / "data" / "all.parquet", row_group_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALUN_IMAGE_MEMORY", "0")
        config = UnlearnConfig(epochs=1, learning_rate=0.1, batch_size=64, device="cpu")
        train_model(DataSpec(source=str(folder / "data")), "resnet8", config, folder / "model")
    return folder / "model"


class Run:
    """A run whose steps are done as pods do them."""

    def __init__(self, model, folder):
        store = open_store(f"s3://salun/{secrets.token_hex(8)}")
        self.split, self.folder = read_split(model), folder
        register_model(store, LINE, model, "train", len(self.split.train))
        self.forgotten = sorted(self.split.train)[:FORGOTTEN]
        target = {"kind": "samples", "ids": self.forgotten}
        self.file("forget").write_text(json.dumps(target))
        rule = {"metric": "RA", "op": ">=", "value": 0, "reason": "every model is published"}
        self.file("policy.json").write_text(json.dumps({"name": "any", "rules": [rule]}))
        self.pod = Pod(store.uri, LINE, "run-1")

    def file(self, name):
        return self.folder / name

    def keep(self, name, reference):
        write_reference(reference, self.file(name))
        return reference

    def fetch(self):
        form = {"store_uri": self.pod.store_uri, "model_line": LINE, "method_config": QUICK}
        form["forget_manifest_uri"] = str(self.file("forget"))
        return self.keep("fetch", steps.fetch_model(self.pod, form)[0])

    def mask(self):
        return self.keep("mask", steps.compute_mask(self.pod, str(self.file("fetch")), "salun", 0.5, QUICK))

    def unlearn(self):
        return self.keep("after", steps.unlearn(self.pod, str(self.file("mask")), "salun", QUICK, 0))

    def evaluate(self):
        return self.keep("evidence", steps.evaluate(self.pod, str(self.file("after")), str(self.file("x.html")))[0])

    def publish(self):
        files = [str(self.file(name)) for name in ("evidence", "policy.json", "x.html", "x.md")]
        return steps.gate_publish(self.pod, *files)

    def made_mask(self):
        reference = read_reference(self.file("mask")).find(Kind.MASK)
        return SaliencyMask.load(self.pod.scratch.get(reference, self.folder / secrets.token_hex(4)) / steps.MASK_FILE)

    def inputs(self):
        """Return the files of the first step."""
        return self.pod.scratch.get(read_reference(self.file("fetch")), self.folder / secrets.token_hex(4))

    def forge(self, folder):
        """Replace the files of the first step, as somebody could who can write to both stores."""
        key, reference = self.pod.store.get(scratch_key("run-1", "digest.key")).data, read_reference(self.file("fetch"))
        place = reference.uri.partition("scratch/run-1/")[2]
        files = {path.name: path for path in folder.iterdir()}
        for name, path in files.items():
            self.pod.store.delete(scratch_key("run-1", f"{place}/{name}"))
            self.pod.store.upload(path, scratch_key("run-1", f"{place}/{name}"))
        changed = {
            name: reference.files[name].model_copy(update={"hmac": hmac_file(path, key), "size": path.stat().st_size})
            for name, path in files.items()
        }
        write_reference(reference.model_copy(update={"files": changed}), self.file("fetch"))

    @property
    def outcome(self):
        return read_outcome(self.pod.store, "run-1")


@pytest.fixture
def run(s3_server, model, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_IMAGE_MEMORY", "0")
    return Run(model, tmp_path)


def whole_mask(run, model):
    """Return the mask of a process that has the whole split."""
    context = RunContext(model, str(run.file("forget")))
    return compute_mask(context, Recipe(method_config=json.loads(QUICK)), run.file("alone"))


def test_each_step_reads_what_it_needs_of_the_split(run, model, monkeypatch):
    read = []
    for name in ("download", "get"):
        function = getattr(S3Store, name)
        monkeypatch.setattr(
            S3Store,
            name,
            lambda store, key, *rest, function=function: read.append(key) or function(store, key, *rest),
        )
    version = require_head(run.pod.store, LINE)
    entry = read_version(run.pod.store, LINE, version.version).files[SPLIT]
    counts = {}
    for step in (run.fetch, run.mask, run.unlearn, run.evaluate, run.publish):
        read.clear()
        assert step().kind is not Kind.NOTHING, run.outcome
        counts[step.__name__] = [sum(key.endswith(name) for key in read) for name in (entry.sha256, f"/{SPLIT}")]
    assert counts == {"fetch": [1, 0], "mask": [0, 0], "unlearn": [1, 0], "evaluate": [1, 0], "publish": [0, 1]}

    rows = pyarrow.parquet.read_table(run.inputs() / steps.EXCERPT_FILE)
    assert rows.column("id").to_pylist() == run.forgotten
    assert run.made_mask() == whole_mask(run, model)
    child = require_head(run.pod.store, LINE).version
    assert child != version.version
    kept = OpenLine(run.pod.store, LINE, child).split
    assert kept.digest == run.split.without(run.forgotten).digest
    assert dict(kept.train) == {name: run.split.train[name] for name in run.split.train if name not in run.forgotten}


def test_steps_read_the_whole_split_without_an_excerpt(run, model):
    run.fetch()
    folder = run.inputs()
    (folder / steps.EXCERPT_FILE).unlink()
    document = json.loads((folder / steps.INPUTS_FILE).read_text())
    del document["split"]
    (folder / steps.INPUTS_FILE).write_text(json.dumps(document))
    run.forge(folder)
    run.mask()
    assert run.made_mask() == whole_mask(run, model)
    assert "forget_rows_digest" not in run.made_mask().facts
    assert run.unlearn().kind is Kind.MODEL


def test_a_changed_excerpt_is_refused(run):
    reference = run.fetch()
    key = f"{reference.uri.removeprefix(run.pod.store.uri).lstrip('/')}/{steps.EXCERPT_FILE}"
    data = bytearray(run.pod.store.get(key).data)
    data[40] ^= 1
    run.pod.store.delete(key)
    run.pod.store.put_new(key, bytes(data))
    assert run.mask().kind is Kind.NOTHING
    assert (run.outcome.state, "forget.parquet of the run" in run.outcome.text) == ("damaged", True)


def test_a_forged_excerpt_of_other_rows_is_refused(run):
    run.fetch()
    folder = run.inputs()
    run.split.excerpt(sorted(run.split.train)[1 : FORGOTTEN + 1]).write(folder / steps.EXCERPT_FILE)
    run.forge(folder)
    assert run.mask().kind is Kind.NOTHING
    assert "not those of its forget set" in run.outcome.text


def test_a_mask_of_other_images_is_refused_by_the_step_that_has_the_whole_split(run):
    """The forged rows have the right ids, and the places, labels and digests of other images."""
    run.fetch()
    folder = run.inputs()
    path, other = folder / steps.EXCERPT_FILE, folder / "other"
    run.split.excerpt(sorted(run.split.train)[FORGOTTEN : 2 * FORGOTTEN]).write(other)
    rows = pyarrow.parquet.read_table(other)
    ids = pyarrow.parquet.read_table(path).column("id")
    schema = rows.schema
    other.unlink()
    pyarrow.parquet.write_table(rows.set_column(0, schema.field("id"), ids).cast(schema), path)
    run.forge(folder)
    assert run.mask().kind is Kind.MASK
    assert run.unlearn().kind is Kind.NOTHING
    assert (run.outcome.state, "rows that the mask was made of" in run.outcome.text) == ("damaged", True)


@pytest.mark.parametrize("field", ["digest", "kept_digest"])
def test_forged_digests_of_the_split_are_refused(run, field):
    run.fetch()
    folder = run.inputs()
    document = json.loads((folder / steps.INPUTS_FILE).read_text())
    document["split"][field] = digest_json("another")
    (folder / steps.INPUTS_FILE).write_text(json.dumps(document))
    run.forge(folder)
    if run.mask().kind is Kind.MASK:
        assert run.unlearn().kind is Kind.NOTHING
    assert run.outcome.state == "damaged"


def test_the_gate_refuses_a_split_that_names_forgotten_samples(run, model):
    """Whoever forges the digest of the kept split after the evaluation still cannot bring rows back."""
    for step in (run.fetch, run.mask, run.unlearn, run.evaluate):
        step()
    folder = run.inputs()
    document = json.loads((folder / steps.INPUTS_FILE).read_text())
    evidence = read_reference(run.file("evidence"))
    document["split"]["kept_digest"] = run.split.digest
    (folder / steps.INPUTS_FILE).write_text(json.dumps(document))
    run.forge(folder)
    forged = read_reference(run.file("fetch"))

    def changed(reference):
        if reference.kind is Kind.INPUTS:
            return forged
        made_from = [changed(item) for item in reference.made_from]
        update = {"made_from": made_from}
        if reference.kind is Kind.MODEL:
            after = run.pod.scratch.get(reference, run.folder / "after-forged")
            card = json.loads((after / "model.json").read_text())
            (after / "model.json").write_text(json.dumps({**card, "split_digest": run.split.digest}))
            run.split.write(after / SPLIT)
            return run.pod.scratch.put(Kind.MODEL, after, made_from)
        return reference.model_copy(update=update)

    write_reference(changed(evidence), run.file("evidence"))
    assert run.publish().kind is Kind.NOTHING
    assert "names forgotten samples" in run.outcome.text


def test_an_excerpt_says_no_more_than_it_has(run):
    excerpt = run.split.excerpt(run.forgotten)
    assert excerpt.digest == run.split.digest
    assert excerpt.without(run.forgotten).digest == run.split.without(run.forgotten).digest
    assert excerpt.rows_digest(run.forgotten) == run.split.rows_digest(run.forgotten)
    for refused in (lambda: excerpt.ids("train"), lambda: excerpt.excerpt([]), lambda: excerpt.without(["x"])):
        with pytest.raises(steps.SalunError):
            refused()
