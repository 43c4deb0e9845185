import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.registry.lookup import ancestry, lines, read_head, read_version, resolve
from salun_core.registry.manifest import Lineage, VersionManifest
from salun_core.registry.versions import fetch_version, publish, publish_head, stage_version
from salun_core.storage import keys as names
from salun_core.storage.blobs import put_blob
from salun_core.storage.s3 import S3Store
from tests.support.folder_model import UNET, contents, write_folder


@pytest.fixture
def model(tmp_path):
    """Two files of a model; the content differs from call to call."""

    def make(text="weights"):
        folder = tmp_path / f"model-{text}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(text.encode() * 1000)
        (folder / "model.json").write_text(json.dumps({"text": text}))
        return {path.name: path for path in folder.iterdir()}

    return make


def overwrite(store, key, data):
    """Change a stored object behind our back, as a failing disk or an intruder would."""
    store._client.put_object(Bucket="salun", Key=f"{store.uri.removeprefix('s3://salun/')}/{key}", Body=data)


def first(store, model, line="mnist", text="first"):
    return publish(store, {"line": line, "method": "training", "lineage": {"trained_on": 100}}, model(text))[0]


def child_of(head, run, **more):
    return {"line": head.line, "parent": head.version, "method": "salun", "run": run, **more}


def test_a_staged_version_is_invisible_until_published(store, model, tmp_path):
    files = model()
    digest, manifest = stage_version(store, {"line": "mnist", "method": "training"}, files)
    assert digest == sha256_bytes(canonical_json(manifest.model_dump(mode="json"))) == manifest.digest
    assert read_head(store, "mnist") is None
    assert lines(store) == []
    head = publish_head(store, "mnist", digest, None, "run-1")
    assert (head.version, head.sequence, head.run) == (digest, 1, "run-1")
    assert read_head(store, "mnist")[0] == head
    assert read_version(store, "mnist", digest) == manifest
    fetched = fetch_version(store, "mnist", digest, tmp_path / "out")
    assert fetched == manifest
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        name: path.read_bytes() for name, path in files.items()
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_lineage_grows_and_adds_up_its_debt(store, model):
    head = first(store, model)
    start = read_version(store, "mnist", head.version).lineage
    after = start.after_run(5)
    second, _ = publish(store, child_of(head, "run-2", forget_count=5, lineage=after.model_dump()), model("second"))
    third, _ = publish(
        store, child_of(second, "run-3", lineage=after.after_run(3).model_dump(), forget_count=3), model("third")
    )
    past = ancestry(store, "mnist")
    assert [version.digest for version in past] == [third.version, second.version, head.version]
    assert [version.manifest.parent for version in past] == [second.version, head.version, None]
    assert (head.sequence, second.sequence, third.sequence) == (1, 2, 3)
    debt = past[0].manifest.lineage
    assert (debt.runs_since_training, debt.forgotten_since_training, debt.debt) == (2, 8, 0.08)
    assert Lineage().debt == 0.0


def test_publishing_twice_moves_head_once(store, model):
    head = first(store, model)
    assert publish_head(store, "mnist", head.version, None, "again") == head
    digest, _ = stage_version(store, child_of(head, "run-2"), model("second"))
    second = publish_head(store, "mnist", digest, head.version, "run-2")
    assert publish_head(store, "mnist", digest, head.version, "run-2") == second
    assert read_head(store, "mnist")[0].sequence == 2


def test_a_stale_parent_is_refused(store, model):
    head = first(store, model)
    late, _ = stage_version(store, child_of(head, "late"), model("late"))
    second, _ = publish(store, child_of(head, "early"), model("early"))
    with pytest.raises(ConflictError, match="stale parent") as caught:
        publish_head(store, "mnist", late, head.version, "late")
    assert caught.value.exit_code == 4
    assert read_head(store, "mnist")[0] == second
    with pytest.raises(ConflictError, match="stale parent"):  # nor may a line be begun twice
        publish(store, {"line": "mnist", "method": "training"}, model("rival"))
    with pytest.raises(ConflictError, match="stale parent"):  # nor be brought back to what it was
        publish_head(store, "mnist", head.version, None, None)
    with pytest.raises(ConflictError, match="HEAD of other is nothing"):
        publish(store, child_of(head.model_copy(update={"line": "other"}), "run"), model("other"))


class Meddled(S3Store):
    """A store in which something happens just before HEAD is written."""

    def __init__(self, store, before):
        super().__init__("salun", store.uri.removeprefix("s3://salun/"))
        self._before = before

    def put_if(self, key, data, etag):
        self._before()
        return super().put_if(key, data, etag)

    def put_new(self, key, data):
        if key.endswith("HEAD.json"):
            self._before()
        return super().put_new(key, data)


def test_a_head_that_moves_before_the_swap_is_a_conflict(store, model):
    head = first(store, model)
    rival, _ = stage_version(store, child_of(head, "rival"), model("rival"))
    mine, _ = stage_version(store, child_of(head, "mine"), model("mine"))
    meddled = Meddled(store, lambda: publish_head(store, "mnist", rival, head.version, "rival"))
    with pytest.raises(ConflictError, match="stale parent"):
        publish_head(meddled, "mnist", mine, head.version, "mine")
    assert read_head(store, "mnist")[0].version == rival


def test_a_line_that_begins_before_the_create_is_a_conflict(store, model):
    mine, _ = stage_version(store, {"line": "mnist", "method": "training"}, model("mine"))
    meddled = Meddled(store, lambda: first(store, model, text="rival"))
    with pytest.raises(ConflictError, match="stale parent"):
        publish_head(meddled, "mnist", mine, None, None)


def test_a_second_process_may_publish_the_same_version(store, model):
    head = first(store, model)
    mine, _ = stage_version(store, child_of(head, "run"), model("mine"))
    meddled = Meddled(store, lambda: publish_head(store, "mnist", mine, head.version, "run"))
    published = publish_head(meddled, "mnist", mine, head.version, "run")
    assert published == read_head(store, "mnist")[0]

    def overtake():
        twin = publish_head(store, "mnist", later, published.version, "run-2")
        publish(store, child_of(twin, "run-3"), model("child"))

    later, _ = stage_version(store, child_of(published, "run-2"), model("later"))
    third = publish_head(Meddled(store, overtake), "mnist", later, published.version, "run-2")
    assert third.version == later
    assert [version.digest for version in ancestry(store, "mnist")][1:] == [later, mine, head.version]


def test_one_of_eight_children_of_a_parent_wins(real_store, model):
    store = real_store
    head = first(store, model)
    staged = [stage_version(store, child_of(head, f"run-{n}"), model(f"child-{n}"))[0] for n in range(8)]
    barrier = threading.Barrier(8)

    def attempt(digest):
        barrier.wait()
        try:
            return publish_head(store, "mnist", digest, head.version, None)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, staged))
    losers = [outcome for outcome in outcomes if isinstance(outcome, ConflictError)]
    winners = [outcome for outcome in outcomes if outcome not in losers]
    assert all("stale parent" in str(error) for error in losers)
    assert winners == [read_head(store, "mnist")[0]]
    assert len(ancestry(store, "mnist")) == 2


def test_a_version_is_published_with_its_own_parent_and_all_its_files(store, model):
    head = first(store, model)
    digest, manifest = stage_version(store, child_of(head, "run-2"), model("second"))
    with pytest.raises(UsageError, match="was not made from"):
        publish_head(store, "mnist", digest, None, "run-2")
    with pytest.raises(UsageError, match="no such version"):
        publish_head(store, "mnist", "0" * 64, head.version, "run-2")
    store.delete(names.blob_key(manifest.files["model.json"].sha256))
    with pytest.raises(IntegrityError, match=r"model\.json .* is missing"):
        publish_head(store, "mnist", digest, head.version, "run-2")
    assert read_head(store, "mnist")[0] == head


@pytest.mark.parametrize(
    "name", ["../evil", "a/../b", "a//b", "a/b/c/d/e", "..", ".hidden", "a/.b", "/etc/passwd", "a\\b", "", "x" * 200]
)
def test_a_traversal_name_is_refused_before_anything_is_sent(store, model, name):
    path = model()["model.json"]
    with pytest.raises(UsageError):
        stage_version(store, {"line": "mnist", "method": "training"}, {name: path})
    assert list(store.list("")) == []


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a/b/c/d/e", ".."])
def test_a_traversal_name_in_a_forged_manifest_writes_nothing(store, tmp_path, name):
    blob = tmp_path / "blob"
    blob.write_bytes(b"evil")
    entry = put_blob(store, blob)
    forged = {
        "format": "salun.version/v1",
        "line": "mnist",
        "created_at": "2026-01-01T00:00:00+00:00",
        "method": "x",
        "files": {name: {"sha256": entry.sha256, "size": entry.size}},
    }
    data = canonical_json(forged)
    store.put_new(names.version_key("mnist", sha256_bytes(data)), data)
    with pytest.raises(IntegrityError, match="plain file name"):
        fetch_version(store, "mnist", sha256_bytes(data), tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["blob"]


DIFFUSION = {"line": "sd", "method": "train"}


def test_a_version_with_folders_is_fetched_complete(store, tmp_path):
    files = write_folder(tmp_path / "model")
    head, manifest = publish(store, DIFFUSION, files)
    assert manifest.files.keys() == files.keys()
    assert VersionManifest.model_validate_json(manifest.canonical()) == manifest
    out = tmp_path / "deep" / "out"
    assert fetch_version(store, "sd", head.version, out) == manifest
    assert contents(out) == contents(tmp_path / "model")
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}
    stamp = (out / UNET).stat().st_mtime_ns
    fetch_version(store, "sd", head.version, out)  # there already: verified, not sent again
    assert (out / UNET).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: (out / UNET).write_bytes(b"changed"),
        lambda out: (out / "unet" / "config.json").unlink(),
        lambda out: (out / "unet" / "more.json").write_text("{}"),
        lambda out: (out / "empty").mkdir(),
        lambda out: (out / "unet" / "link").symlink_to("config.json"),
        lambda out: ((out / "unet").rename(out.with_name("kept")), (out / "unet").symlink_to(out.with_name("kept"))),
        lambda out: (
            (out / "model.json").rename(out.with_name("kept")),
            (out / "model.json").symlink_to(out.with_name("kept")),
        ),
    ],
)
def test_a_folder_with_other_files_is_refused(store, tmp_path, spoil):
    head, _ = publish(store, DIFFUSION, write_folder(tmp_path / "model"))
    fetch_version(store, "sd", head.version, tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        fetch_version(store, "sd", head.version, tmp_path / "out")


def test_a_version_with_folders_appears_complete_or_not_at_all(store, tmp_path):
    head, manifest = publish(store, DIFFUSION, write_folder(tmp_path / "model"))
    for name in (UNET, "tokenizer/vocab.json"):
        key = names.blob_key(manifest.files[name].sha256)
        good = store.get(key).data
        overwrite(store, key, flipped(good))
        with pytest.raises(IntegrityError):
            fetch_version(store, "sd", head.version, tmp_path / "out")
        overwrite(store, key, good)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_name_that_is_a_file_and_a_folder_is_refused(store, tmp_path):
    files = write_folder(tmp_path / "model")
    with pytest.raises(UsageError, match="'unet' is a file and a folder at once"):
        stage_version(store, DIFFUSION, {**files, "unet": files["model.json"]})
    assert list(store.list("")) == []
    entry = {"sha256": "0" * 64, "size": 1}
    forged = {"line": "sd", "created_at": "2026-01-01T00:00:00+00:00", "method": "x", "format": "salun.version/v1"}
    data = canonical_json({**forged, "files": {"unet": entry, "unet/config.json": entry}})
    store.put_new(names.version_key("sd", sha256_bytes(data)), data)
    with pytest.raises(IntegrityError, match="a file and a folder at once"):
        fetch_version(store, "sd", sha256_bytes(data), tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "x"},
        {"line": "../x", "method": "x"},
        {"line": "mnist", "method": "x", "parent": "abc"},
        {"line": "mnist", "method": "x", "created_at": "yesterday"},
        {"line": "mnist", "method": "x", "created_at": "2026-01-01T00:00:00+02:00"},
        {"line": "mnist", "method": "x", "forget_count": -1},
        {"line": "mnist", "method": "x", "run": "../x"},
        {"line": "mnist", "method": "x", "extra": 1},
    ],
)
def test_wrong_fields_are_refused_before_anything_is_sent(store, model, fields):
    with pytest.raises(UsageError):
        stage_version(store, fields, model())
    assert list(store.list("")) == []


def test_a_version_without_files_is_refused(store):
    with pytest.raises(UsageError, match="files"):
        stage_version(store, {"line": "mnist", "method": "x"}, {})


def flipped(data, where=10):
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


def test_every_flipped_or_cut_object_is_refused(store, model, tmp_path):
    head = first(store, model)
    manifest = read_version(store, "mnist", head.version)
    keys = [names.blob_key(entry.sha256) for entry in manifest.files.values()]
    keys.append(names.version_key("mnist", head.version))
    for key in keys:
        good = store.get(key).data
        for bad in (flipped(good), good[:-1], good + b" ", b""):
            overwrite(store, key, bad)
            with pytest.raises(IntegrityError):
                fetch_version(store, "mnist", head.version, tmp_path / "out")
        overwrite(store, key, good)
    assert [path.name for path in tmp_path.iterdir()] == ["model-first"]
    fetch_version(store, "mnist", head.version, tmp_path / "out")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"format":"salun.head/v1"}', b'{"format":"salun.head/v2"}'],
)
def test_a_damaged_head_is_refused(store, data):
    overwrite(store, names.head_key("mnist"), data)
    with pytest.raises(IntegrityError):
        read_head(store, "mnist")


def test_documents_of_another_line_are_refused(store, model):
    head = first(store, model)
    overwrite(store, names.head_key("other"), store.get(names.head_key("mnist")).data)
    with pytest.raises(IntegrityError, match="belongs to line 'mnist'"):
        read_head(store, "other")
    key = names.version_key("mnist", head.version)
    overwrite(store, names.version_key("other", head.version), store.get(key).data)
    with pytest.raises(IntegrityError, match="belongs to line 'mnist'"):
        read_version(store, "other", head.version)


def test_a_broken_lineage_is_reported(store, model):
    head = first(store, model)
    publish(store, child_of(head, "run-2"), model("second"))
    store.delete(names.version_key("mnist", head.version))
    with pytest.raises(IntegrityError, match="lineage of mnist is broken"):
        ancestry(store, "mnist")


def test_references_are_resolved(store, model):
    head = first(store, model)
    staged, _ = stage_version(store, child_of(head, "run-2"), model("second"))
    assert resolve(store, "mnist") == resolve(store, "mnist@HEAD") == ("mnist", head.version)
    assert resolve(store, f"mnist@{head.version[:6]}") == ("mnist", head.version)
    assert resolve(store, f"mnist@{staged}") == ("mnist", staged)
    for reference, text in [
        ("mnits", "did you mean 'mnist'"),
        (f"mnits@{head.version[:8]}", "did you mean 'mnist'"),
        ("mnist@000000", "the line has no such version. To fix it: choose one that `salun model history mnist` shows"),
        (f"mnist@{head.version[:5]}", "6 to 64"),
        ("mnist@latest", "try mnist@HEAD"),
        ("mnist@../../x", "try mnist@HEAD"),
        ("../x", "not a valid id"),
    ]:
        with pytest.raises(UsageError) as caught:
            resolve(store, reference)
        assert text in str(caught.value)


@pytest.mark.parametrize("reference", ["mnist", "mnist@000000"])
def test_a_store_without_lines_leads_to_the_first_one(store, reference):
    with pytest.raises(UsageError, match="the store has no model line yet. To fix it: begin it: salun model import"):
        resolve(store, reference)


def test_an_ambiguous_prefix_is_refused(store):
    for tail in "01":
        store.put_new(names.version_key("mnist", "abcdef" + tail * 58), b"{}")
    with pytest.raises(UsageError, match="ambiguous"):
        resolve(store, "mnist@abcdef")


def test_fetching_into_an_existing_folder(store, model, tmp_path):
    head = first(store, model)
    folder = tmp_path / "out"
    folder.mkdir()
    fetch_version(store, "mnist", head.version, folder)
    stamp = (folder / "model.json").stat().st_mtime_ns
    fetch_version(store, "mnist", head.version, folder)  # there already: verified, not sent again
    assert (folder / "model.json").stat().st_mtime_ns == stamp
    (folder / "model.json").write_text("changed")
    with pytest.raises(UsageError, match="not empty"):
        fetch_version(store, "mnist", head.version, folder)
    assert (folder / "model.json").read_text() == "changed"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError):
        fetch_version(store, "mnist", head.version, file)
    assert file.read_text() == "mine"


def test_the_manifest_round_trips_and_keeps_its_digest():
    fields = {
        "line": "mnist",
        "created_at": "2026-01-01T00:00:00+00:00",
        "method": "salun",
        "files": {"model.json": {"sha256": "0" * 64, "size": 3}},
    }
    manifest = VersionManifest.model_validate(fields)
    assert VersionManifest.model_validate_json(manifest.canonical()) == manifest
    assert manifest.digest == "195af624fe18d382a44aa20d744a33f99634438bfe632acab2863e547457e801"


class Fragile(S3Store):
    """A store whose process is killed before one of its writes."""

    def __init__(self, prefix, step):
        super().__init__("salun", prefix)
        self._left = step

    def _kill(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def upload(self, path, key):
        self._kill()
        super().upload(path, key)

    def put_new(self, key, data):
        self._kill()
        return super().put_new(key, data)

    def put_if(self, key, data, etag):
        self._kill()
        return super().put_if(key, data, etag)


def publish_and_die(prefix, fields, files, step):
    publish(Fragile(prefix, step), fields, files)


def test_a_kill_after_any_write_leaves_nothing_visible(real_store, model):
    """Steps: two blobs, the manifest, HEAD; the last run is not killed and finishes the work."""
    store, prefix = real_store, real_store.uri.removeprefix("s3://salun/")
    head = first(store, model)

    def run(text, step):
        given = (prefix, child_of(head, "run-2"), model(text), step)
        child = multiprocessing.get_context("fork").Process(target=publish_and_die, args=given)
        child.start()
        child.join(60)
        return child.exitcode

    for step in range(1, 5):
        assert run(f"killed-{step}", step) == -signal.SIGKILL
        assert read_head(store, "mnist")[0] == head
        assert [version.digest for version in ancestry(store, "mnist")] == [head.version]
    assert run("finished", 0) == 0
    after = ancestry(store, "mnist")
    assert [version.manifest.run for version in after] == ["run-2", None]
    assert after[0].digest == read_head(store, "mnist")[0].version
