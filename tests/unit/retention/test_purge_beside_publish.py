"""A purge and a publish at once: whichever of the two stalls, and wherever, HEAD keeps all its files.

The store is in memory: these tests send thousands of requests, and none of them looks at what S3 is.
"""

import secrets
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from salun_core.errors import ConflictError, IntegrityError
from salun_core.registry.holds import hold_version, read_disposal
from salun_core.registry.lookup import read_head, read_version
from salun_core.registry.versions import fetch_version, publish_head, stage_version
from salun_core.requests.gauges import GaugeReader
from salun_core.retention.purge import purge
from salun_core.retention.rules import RetentionRules
from salun_core.storage import keys as names
from salun_core.storage import open_store
from salun_core.storage.erase import erase, stored_keys
from salun_core.storage.leases import acquire, release
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.rollback import rollback

START = datetime.now(UTC).replace(microsecond=0)
WEIGHTS, EVIDENCE = "model.safetensors", "evidence.json"


def at(**delta):
    return lambda: START + timedelta(**delta)


class KilledError(BaseException):
    """Ends a call as a kill would: nothing may catch it."""


class Line:
    """A model line whose next version was staged by a run that died; the run's next attempt makes the same bytes."""

    def __init__(self, server, folder: Path) -> None:
        self.server = server
        self.store = open_store(f"s3://salun/{secrets.token_hex(6)}")
        self.folder, self.number, self.head = folder, 0, None
        self.publish()

    def _files(self, number):
        folder = self.folder / str(number)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            weights = np.arange(2_000, dtype=np.float32)
            weights[: 20 * number] += 0.5
            save_file({"w": weights}, folder / WEIGHTS)
            (folder / EVIDENCE).write_text(f"evidence {number}")
        return {name: folder / name for name in (WEIGHTS, EVIDENCE)}

    @property
    def files(self):
        """The files of the version that is next."""
        return self._files(self.number)

    def stage(self, minute, store=None):
        fields = {"line": "faces", "method": "salun", "parent": self.head, "run": f"run-{self.number}"}
        fields["created_at"] = (START - timedelta(days=2) + timedelta(hours=self.number, minutes=minute)).isoformat()
        return stage_version(store or self.store, fields, self.files)[0]

    def publish(self, store=None):
        """Do what an attempt does, from its first upload to its last check."""
        store = store or self.store
        self.published = self.stage(30, store)
        publish_head(store, "faces", self.published, self.head, "run-9", self.files)
        self.head, self.number = self.published, self.number + 1

    def purge(self, store=None, **options):
        rules = RetentionRules(weights_days=options.pop("weights_days", 0))
        return purge(store or self.store, rules, clock=at(hours=40), **options)

    def check_whole(self, folder):
        """HEAD is what was published last, a reader gets its bytes, and nothing is left of the purge."""
        assert read_head(self.store, "faces")[0].version == self.published
        fetch_version(self.store, "faces", self.published, folder)
        last = self._files(self.number - 1)
        assert {name: (folder / name).read_bytes() for name in last} == {
            name: path.read_bytes() for name, path in last.items()
        }
        assert stored_keys(self.store, "trash/") == []


@pytest.fixture
def line(memory_s3, tmp_path):
    return Line(memory_s3, tmp_path / "line")


@contextmanager
def watched(line, meanwhile=None, moment=""):
    """Yield a store with a client of its own, and what was sent by it; `meanwhile` is called once, before `moment`.

    A moment is an operation of S3 and the folder of its key, such as `DeleteObject blobs`, and which of them it is.
    """
    client, sent = line.server.client(), []
    bucket, _, prefix = line.store.uri.removeprefix("s3://").partition("/")

    def seen(params, model, **_):
        place = params["query_string"].get("prefix") or params["url_path"]
        name = f"{model.name} {place.partition(f'{prefix}/')[2].partition('/')[0]}"
        sent.append(f"{name} {sum(item.rpartition(' ')[0] == name for item in sent)}")
        if sent[-1] == moment:
            meanwhile()

    client.meta.events.register("before-call.s3", seen)
    yield S3Store(bucket, prefix, client=client), sent


def moments(line, act):
    """Return each moment of an undisturbed call, one of a kind: the first and the last of each operation and folder."""
    with watched(line) as (store, sent):
        act(store)
    reads = ("GetObject", "HeadObject", "ListMultipartUploads")  # the next request changes or lists something
    kinds = {item.rpartition(" ")[0] for item in sent if not item.startswith(reads)}
    of = {kind: [item for item in sent if item.rpartition(" ")[0] == kind] for kind in kinds}
    return sorted({item for items in of.values() for item in (items[0], items[-1])})


def test_a_publish_passes_a_purge_that_stalls_anywhere(line, tmp_path):
    """Before each request of the purge, the run's next attempt goes from its first upload to its last check."""
    line.stage(0)
    found = moments(line, line.purge)
    assert {"CopyObject trash 0", "DeleteObject blobs 0", "DeleteObject lines 0"} <= {*found}
    line.publish()
    waited = 0
    for number, moment in enumerate(found):
        line.stage(0)
        with watched(line, line.publish, moment) as (store, _):
            before = line.number
            waited += len(line.purge(store).skipped)
            if line.number == before:  # the moment did not come: a purge that finds less sends less
                line.publish()
        line.check_whole(tmp_path / f"head-{number}")
    assert waited


def test_a_purge_passes_a_publish_that_stalls_anywhere(line, tmp_path):
    """Before each request of the attempt, a whole purge goes by; the attempt's version may be taken for abandoned."""
    line.publish()
    line.stage(0)
    found = moments(line, line.publish)
    assert {"PutObject lines 0", "PutObject lines 1"} <= {*found}
    for number, moment in enumerate(found):
        line.stage(0)
        with watched(line, line.purge, moment) as (store, _):
            line.publish(store)
        line.check_whole(tmp_path / f"head-{number}")


@pytest.mark.parametrize("moment", ["CopyObject trash 0", "DeleteObject blobs 0", "ListObjectsV2 lines 2"])
def test_a_file_that_a_killed_purge_took_comes_back(moment, line, tmp_path):
    """The purge dies between its copy, its deletion and its second look, while HEAD comes to need the file."""
    line.stage(0)

    def publish_and_die():
        line.publish()
        raise KilledError

    with watched(line, publish_and_die, moment) as (store, _), pytest.raises(KilledError):
        line.purge(store)
    line.purge()
    line.purge()
    fetch_version(line.store, "faces", line.published, tmp_path / "head")
    copies = stored_keys(line.store, "trash/")
    assert copies == []


def test_staged_files_and_orphans_wait_while_a_run_holds_a_line(line):
    line.stage(0)
    orphan = names.blob_key("a" * 64)
    line.store.put_new(orphan, b"orphan")
    acquire(line.store, "other", "run-at-work", 600)
    before = {item.key for item in stored_keys(line.store)}
    report = line.purge()
    assert {item.kind.value for item in report.skipped} == {"unpublished version", "orphan"}
    assert {item.key for item in stored_keys(line.store)} == before
    release(line.store, "other", "run-at-work")
    assert line.purge().skipped == []
    assert line.store.get(orphan) is None


def test_old_garbage_does_not_wait_for_ever(line):
    """In a large store some run is always at work."""
    orphan = names.blob_key("a" * 64)
    line.store.put_new(orphan, b"orphan")
    acquire(line.store, "other", "run-at-work", 600)
    purge(line.store, clock=at(days=8))
    assert line.store.get(orphan) is None


def test_superseded_weights_stay_while_head_lacks_a_file(line):
    first = line.head
    line.publish()
    digest = read_version(line.store, "faces", line.head).files[EVIDENCE].sha256
    erase(line.store, names.blob_key(digest))
    report = line.purge()
    assert report.damaged == ["faces"]
    assert [item.version for item in report.skipped] == [first]
    assert read_disposal(line.store, "faces", first) is None


@pytest.mark.parametrize("moment", ["CopyObject trash 0", "DeleteObject blobs 0", "DeleteObject trash 0"])
def test_a_hold_passes_a_purge_that_stalls(moment, line, tmp_path):
    """Either the hold is refused, or the weights stay."""
    first = line.head
    line.publish()
    held = []

    def hold():
        try:
            held.append(hold_version(line.store, "faces", first, "ana", "audit", at()))
        except ConflictError as error:
            assert "may be deleting it" in str(error)  # noqa: PT017 - both ends are right, one is checked here

    with watched(line, hold, moment) as (store, _):
        line.purge(store)
    if held:
        fetch_version(line.store, "faces", first, tmp_path / "held")
    else:
        assert line.store.get(names.version_hold_key("faces", first)) is None


@pytest.mark.parametrize("moment", ["CopyObject trash 0", "DeleteObject blobs 0", "DeleteObject trash 0"])
def test_a_rollback_passes_a_purge_that_stalls(moment, line, tmp_path):
    """Either HEAD stays where it is, or the version that it goes back to has its weights."""
    first = line.head
    line.publish()

    def back():
        try:
            rollback(line.store.uri, f"faces@{first}", "ana", "it is worse", clock=at())
        except IntegrityError as error:
            assert "was purged or is missing" in str(error)  # noqa: PT017 - both ends are right, one is checked here

    with watched(line, back, moment) as (store, _):
        line.purge(store)
    head = read_head(line.store, "faces")[0].version
    assert head in {first, line.published}
    fetch_version(line.store, "faces", head, tmp_path / "head")


def test_a_rollback_suspended_before_its_swap_finds_the_loss(line, tmp_path):
    first = line.head
    line.publish()

    def lose():
        erase(line.store, names.blob_key(read_version(line.store, "faces", first).files[WEIGHTS].sha256))

    with watched(line, lose, "PutObject lines 1") as (store, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr("salun_core.sweeps.rollback.open_store", lambda _: store)
        with pytest.raises(IntegrityError, match="was purged or is missing"):
            rollback(line.store.uri, f"faces@{first}", "ana", "it is worse", clock=at())
    assert read_head(line.store, "faces")[0].version == line.published


def test_the_exporter_counts_a_line_whose_head_lacks_a_file(line):
    reader = GaugeReader(line.store, at(), rarely=timedelta(0))
    assert reader.take().unreadable == 0
    line.publish()
    assert reader.take().unreadable == 0
    erase(line.store, names.blob_key(read_version(line.store, "faces", line.head).files[WEIGHTS].sha256))
    assert reader.take().unreadable == 1
