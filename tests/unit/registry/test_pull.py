"""`salun model pull`: a version as a folder, with cuts, full disks and rivals."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from salun_core.errors import ConflictError, IntegrityError, StoreError, StoreUnreachableError, UsageError
from salun_core.registry.holds import VersionDisposal, record_disposal
from salun_core.registry.pull import pull
from salun_core.registry.versions import publish
from salun_core.storage.keys import blob_key
from salun_core.storage.s3 import S3Store
from salun_core.times import utc_now
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test
from tests.support.fault_proxy import LOST, FaultProxy
from tests.support.folder_model import UNET, contents, write_folder
from tests.unit.certificates.test_tampering import FIXTURE
from tests.unit.storage.test_s3 import impatient, prefix_of, upstream

FIELDS = {"line": "sd", "method": "train"}


@pytest.fixture
def published(store, tmp_path):
    return publish_child(store, tmp_path)


def publish_child(store, tmp_path):
    """A line with a child; returns (digest, manifest, folder of its files)."""
    before, after = write_folder(tmp_path / "made" / "before"), write_folder(tmp_path / "made" / "after", 4000)
    head, _ = publish(store, FIELDS, before)
    child = {"line": "sd", "method": "salun", "parent": head.version}
    head, manifest = publish(store, child, after)
    return head.version, manifest, tmp_path / "made" / "after"


class Failing(S3Store):
    """A store whose downloads fail after some files."""

    def __init__(self, store, after, error):
        super().__init__("salun", prefix_of(store))
        self.left, self.error, self.keys = after, error, []

    def download(self, key, path, on_bytes=None):
        if self.left == 0:
            raise self.error
        self.left -= 1
        self.keys.append(key)
        super().download(key, path, on_bytes)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_version_arrives_whole(real_store, tmp_path):
    store = real_store
    digest, manifest, made = publish_child(store, tmp_path)
    seen = []
    done = pull(store, "sd", digest, tmp_path / "deep" / "out", lambda *counts: seen.append(counts))
    assert contents(tmp_path / "deep" / "out") == contents(made)
    assert (done.fetched, done.present, done.size) == (len(manifest.files), 0, seen[-1][0])
    assert names(tmp_path / "deep") == ["out"]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(entry.size for entry in manifest.files.values())


def test_a_second_pull_fetches_nothing(store, published, tmp_path):
    digest, manifest, _ = published
    pull(store, "sd", digest, tmp_path / "out")
    idle = Failing(store, 0, AssertionError("a download"))
    done = pull(idle, "sd", digest, tmp_path / "out")
    assert (done.fetched, done.present) == (0, len(manifest.files))


def test_a_file_that_was_deleted_is_fetched_alone(store, published, tmp_path):
    digest, manifest, made = published
    pull(store, "sd", digest, tmp_path / "out")
    (tmp_path / "out" / "model.json").unlink()
    watched = Failing(store, 99, None)
    assert pull(watched, "sd", digest, tmp_path / "out").fetched == 1
    assert watched.keys == [blob_key(manifest.files["model.json"].sha256)]
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_a_lost_connection_leaves_no_destination_and_the_next_call_continues(store, published, tmp_path, after):
    digest, manifest, made = published
    broken = Failing(store, after, StoreUnreachableError("cannot download x", "no answer", "check the network"))
    with pytest.raises(StoreUnreachableError, match="run the same command again: it continues"):
        pull(broken, "sd", digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = [name for name in contents(tmp_path / ".out.pull" / digest[:12])]
    assert all("unverified" not in name and ".part" not in name for name in kept)
    done = pull(store, "sd", digest, tmp_path / "out")
    assert done.present == len(kept)
    assert contents(tmp_path / "out") == contents(made)
    assert names(tmp_path) == ["made", "out"]


def test_a_real_cut_is_one_error(real_store, tmp_path):
    store = real_store
    digest, *_ = publish_child(store, tmp_path)

    def fault(line):
        return LOST if "blobs" in line and line.startswith("GET") and "list-type" not in line else None

    with FaultProxy(upstream(store), fault) as proxy:
        broken = S3Store("salun", prefix_of(store), client=impatient(proxy.endpoint))
        with pytest.raises(StoreUnreachableError, match="again: it continues"):
            pull(broken, "sd", digest, tmp_path / "out")
        assert proxy.faults > 0
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_what_the_next_call_cleans(store, published, tmp_path):
    digest, manifest, made = published
    work = tmp_path / ".out.pull" / digest[:12]
    shutil.copytree(made, work)
    (work / UNET).write_bytes(b"half")
    (work / "unet" / ".model.safetensors.0123.unverified").write_bytes(b"half")
    (work / ".x").mkdir()
    (work / ".x" / "left").write_bytes(b"half")
    (work / "model.json").unlink()
    (work / "model.json").symlink_to("/etc/hostname")
    done = pull(store, "sd", digest, tmp_path / "out")
    assert (done.fetched, done.present) == (2, len(manifest.files) - 2)
    assert contents(tmp_path / "out") == contents(made)
    assert not (tmp_path / "out" / "model.json").is_symlink()


def test_a_full_disk_is_one_error_and_the_next_call_continues(store, tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(3 << 20))
    (tmp_path / "model.json").write_text("{}")
    files = {"model.json": tmp_path / "model.json", "model.safetensors": tmp_path / "big"}
    head, _ = publish(store, FIELDS, files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreError, match="free some space"):
            pull(store, "sd", head.version, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert pull(store, "sd", head.version, tmp_path / "out").present == 1


@pytest.mark.parametrize("name", ["model.json", UNET])
def test_a_damaged_blob_never_gets_its_name(store, published, tmp_path, name):
    digest, manifest, _ = published
    stored = next(key for key in (entry.key for entry in store.list("")) if manifest.files[name].sha256 in key)
    folder = prefix_of(store)
    store._client.put_object(Bucket="salun", Key=f"{folder}/{stored}", Body=b"x" * manifest.files[name].size)
    with pytest.raises(IntegrityError):
        pull(store, "sd", digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert name not in contents(tmp_path / ".out.pull" / digest[:12])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda out: (out / UNET).write_bytes(b"mine"), f"{UNET} differs"),
        (lambda out: (out / "notes.txt").write_text("mine"), "'notes.txt' is not one of its files"),
        (lambda out: (out / "link").symlink_to("model.json"), "'link' is not one of its files"),
    ],
)
def test_a_folder_with_other_files_is_left_alone(store, published, tmp_path, spoil, why):
    digest, _, made = published
    shutil.copytree(made, tmp_path / "out")
    spoil(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=why):
        pull(store, "sd", digest, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["made", "out"]


def test_an_empty_folder_is_filled_and_a_file_refused(store, published, tmp_path, monkeypatch):
    digest, _, made = published
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    pull(store, "sd", digest, tmp_path.__class__("."))
    assert contents(tmp_path / "empty") == contents(made)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder"):
        pull(store, "sd", digest, tmp_path / "file")


def test_a_purged_version_names_the_way_out(store, published, tmp_path):
    digest, *_ = published
    fields = {"line": "sd", "version": digest, "files": [UNET], "size": 1, "by": "purge", "reason": "superseded"}
    record_disposal(store, VersionDisposal(**fields, at=utc_now()))
    with pytest.raises(UsageError, match="salun model history sd"):
        pull(store, "sd", digest, tmp_path / "out")
    assert names(tmp_path) == ["made"]


def test_a_rival_is_refused_while_the_first_is_at_work(store, published, tmp_path):
    digest, _, made = published
    inside, go = threading.Event(), threading.Event()

    class Slow(S3Store):
        def download(self, key, path, on_bytes=None):
            inside.set()
            go.wait(30)
            super().download(key, path, on_bytes)

    first = threading.Thread(target=pull, args=(Slow("salun", prefix_of(store)), "sd", digest, tmp_path / "out"))
    first.start()
    inside.wait(30)
    try:
        with pytest.raises(ConflictError, match="another command is fetching a version"):
            pull(store, "sd", digest, tmp_path / "out")
    finally:
        go.set()
        first.join()
    assert contents(tmp_path / "out") == contents(made)
    assert names(tmp_path) == ["made", "out"]


def _race(uri, digest, out, barrier, results):
    from salun_core.storage import open_store

    barrier.wait()
    try:
        pull(open_store(uri), "sd", digest, out)
        results.put("whole")
    except ConflictError:
        results.put("refused")


def test_racing_processes_end_in_one_right_folder(real_store, tmp_path):
    store = real_store
    digest, _, made = publish_child(store, tmp_path)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    racers = [
        context.Process(target=_race, args=(store.uri, digest, tmp_path / "out", barrier, results)) for _ in range(4)
    ]
    for racer in racers:
        racer.start()
    ends = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert "whole" in ends
    assert set(ends) <= {"whole", "refused"}
    assert contents(tmp_path / "out") == contents(made)
    assert names(tmp_path) == ["made", "out"]


def test_another_version_meanwhile_is_refused(store, published, tmp_path):
    digest, manifest, made = published
    refused = []

    class Overtaken(S3Store):
        def download(self, key, path, on_bytes=None):
            if not refused:
                with pytest.raises(ConflictError, match="fetching a version into it") as caught:
                    pull(store, "sd", manifest.parent, tmp_path / "out")
                refused.append(caught.value)
            super().download(key, path, on_bytes)

    pull(Overtaken("salun", prefix_of(store)), "sd", digest, tmp_path / "out")
    assert len(refused) == 1
    assert contents(tmp_path / "out") == contents(made)
    with pytest.raises(UsageError, match="holds other files than sd@"):
        pull(store, "sd", manifest.parent, tmp_path / "out")


def test_the_command_prints_facts_and_is_quiet_when_piped(store, published, tmp_path):
    digest, manifest, made = published
    args = ("model", "pull", f"sd@{digest[:8]}", "--out", tmp_path / "out", "--store", store.uri)
    result = invoke(*args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    assert (facts["version"], facts["fetched_files"]) == (digest, len(manifest.files))
    assert json.loads(invoke(*args, "--json").stdout)["files_already_there"] == len(manifest.files)
    assert contents(tmp_path / "out") == contents(made)
    unknown = invoke("model", "pull", "sdd", "--out", tmp_path / "other", "--store", store.uri)
    assert unknown.exit_code == 2
    assert "did you mean 'sd'?" in unknown.stderr


def test_verify_takes_what_pull_wrote_and_names_the_command_when_a_file_differs(store, tmp_path):
    files = {path.name: path for path in (FIXTURE / "model").iterdir()}
    publish(store, {"line": "faces", "method": "train"}, files)
    assert invoke("model", "pull", "faces", "--out", tmp_path / "out", "--store", store.uri).exit_code == 0
    args = ("verify", FIXTURE / "certificate.json", "--key", FIXTURE / "salun.pub", "--model", tmp_path / "out")
    verified = invoke(*args)
    assert verified.exit_code == 0, verified.stderr
    assert "all 3 files of" in verified.stdout
    for spoil in (
        lambda: (tmp_path / "out" / "split.parquet").write_text("{}"),
        lambda: (tmp_path / "out" / "empty").mkdir(),
        lambda: shutil.rmtree(tmp_path / "out"),
    ):
        spoil()
        refused = invoke(*args)
        assert refused.exit_code in (2, 5)
        assert "salun model pull faces@d9147cc9ced9 --out DIR" in refused.stderr


def test_a_killed_command_is_continued_by_the_next_one(real_store, tmp_path, salun_path):
    store = real_store
    files = {"model.safetensors": tmp_path / "big", "model.json": tmp_path / "small"}
    (tmp_path / "big").write_bytes(os.urandom(48 << 20))
    (tmp_path / "small").write_text("{}")
    head, _ = publish(store, FIELDS, files)
    args = ["model", "pull", "sd", "--out", "out", "--store", store.uri]
    process = subprocess.Popen([sys.executable, "-m", "salun_core.cli", *args], cwd=tmp_path)
    work = tmp_path / ".out.pull" / head.version[:12]
    deadline = time.monotonic() + 60
    while process.poll() is None and not (work.exists() and any(work.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = subprocess.run([salun_path, *args], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "big").read_bytes()
    assert names(tmp_path) == ["big", "out", "small"]


def test_a_terminal_sees_the_progress(real_store, tmp_path, salun_path):
    store = real_store
    digest, *_ = publish_child(store, tmp_path)
    controller, terminal = pty.openpty()
    command = [salun_path, "model", "pull", "sd", "--out", "out", "--store", store.uri]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=terminal, env=environ)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while data := os.read(controller, 65536):
            shown += data
    os.close(controller)
    assert process.wait() == 0
    assert f"sd@{digest[:12]}".encode() in shown
    assert b"Traceback" not in shown
