"""The plan of what must go, on made-up stores: no bytes, no clock."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from salun_core.errors import IntegrityError
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.requests.schema import Outcome, Status
from salun_core.retention.inventory import RequestSummary, RunSummary, StoreInventory
from salun_core.retention.rules import DeletionKind, RetentionRules, plan, still_trained_on
from salun_core.storage import keys as names
from salun_core.storage.erase import StoredKey, Upload
from salun_core.sweeps.runs import RunStatus
from tests.support.folder_model import TEXT, UNET, VAE

T0 = datetime(2026, 1, 1, tzinfo=UTC)
EXACT = RetentionRules(every_hours=0)


def day(number):
    return T0 + timedelta(days=number)


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


class World:
    """A store that is put together version by version, run by run."""

    def __init__(self):
        self.keys, self.heads, self.manifests = [], {}, {}
        self.unreturned = frozenset()
        self.holders, self.runs, self.requests, self.uploads = {}, {}, {}, []

    def put(self, key, at=0.0, size=10, live=True, old=0):
        self.keys.append(StoredKey(key, size, day(at), live, old))

    def version(self, at, parent=None, weights=None, line="faces", run=None, head=True, split=None, more=None):
        weights = weights or f"weights {line} {at}"
        split = split or f"split of {weights}"
        texts = {"model.safetensors": weights, "split.parquet": split, "evidence.json": f"evidence {at}"}
        texts |= more or {}
        texts = {name: text for name, text in texts.items() if text}
        entries = {name: {"sha256": sha(text), "size": 10} for name, text in texts.items()}
        fields = {"line": line, "parent": parent, "created_at": day(at).isoformat(), "files": entries, "run": run}
        manifest = VersionManifest(method="salun", **fields)
        digest = manifest.digest
        self.manifests[line, digest] = manifest
        self.put(names.version_key(line, digest), at)
        known = {item.key for item in self.keys}
        for text in texts.values():
            if names.blob_key(sha(text)) not in known:
                self.put(names.blob_key(sha(text)), at)
        if head:
            self.move(line, digest, at)
        return digest

    def move(self, line, digest, at):
        sequence = self.heads[line].sequence + 1 if line in self.heads else 1
        self.heads[line] = Head(line=line, version=digest, sequence=sequence, published_at=day(at).isoformat())

    def run(self, name, at, status=RunStatus.PUBLISHED, parent=None, members=(), line="faces"):
        self.runs[name] = RunSummary(line, parent, tuple(members), status, day(at))

    def inventory(self):
        names_ = ("keys", "heads", "manifests", "holders", "unreturned", "runs", "requests", "uploads")
        return StoreInventory(**{name: getattr(self, name) for name in names_})

    def plan(self, at, rules=EXACT):
        return plan(self.inventory(), rules, day(at))

    def gone(self, at, *kinds, rules=EXACT):
        return {key for item in self.plan(at, rules).deletions if not kinds or item.kind in kinds for key in item.keys}


@pytest.fixture
def world():
    return World()


def blob(text):
    return names.blob_key(sha(text))


def both(weights):
    return {blob(weights), blob(f"split of {weights}")}


def test_superseded_weights_are_deleted_after_thirty_days_and_head_stays(world):
    first = world.version(0)
    second = world.version(5, first)
    world.version(40, second)
    assert world.gone(34.9) == set()
    assert world.gone(35) == both("weights faces 0")
    assert world.gone(69.9) == both("weights faces 0")
    assert world.gone(70) == both("weights faces 0") | both("weights faces 5")
    (item,) = world.plan(35).deletions
    assert (item.line, item.version, item.files) == ("faces", first, ("model.safetensors", "split.parquet"))
    assert item.size == 20
    assert "superseded since 2026-01-06" in item.reason


def folder(unet, text="text"):
    """The files of a diffusion model whose UNet and text encoder are these, in place of a classifier's."""
    more = {UNET: unet, TEXT: text, VAE: "vae", "model_index.json": "index", "unet/config.json": "config"}
    return {"more": {"model.safetensors": None, **more}, "split": "split"}


def test_only_unneeded_weights_of_a_superseded_folder_are_deleted(world):
    first = world.version(0, **folder("unet 0"))
    second = world.version(5, first, **folder("unet 5"))
    world.version(10, second, **folder("unet 5", "text 10"))
    assert world.gone(34.9) == set()
    (item,) = world.plan(35).deletions
    assert (item.version, item.files, item.keys) == (first, (UNET,), (blob("unet 0"),))
    assert world.plan(35).shared == []
    (_, item) = sorted(world.plan(40).deletions, key=lambda item: item.version == second)
    assert (item.version, item.files, item.keys) == (second, (TEXT,), (blob("text"),))


def test_a_folder_stays_while_all_its_weights_are_used(world):
    first = world.version(0, **folder("unet"))
    world.version(5, first, more={**folder("unet")["more"], "model.json": "another card"}, split="split 5")
    assert world.gone(100) == set()
    assert world.plan(100).shared == [f"faces@{first}"]


def test_files_that_expire_before_the_next_purge_are_deleted_now(world):
    world.version(5, world.version(0))
    assert world.gone(34.4, rules=RetentionRules()) == set()
    assert world.gone(34.5, rules=RetentionRules()) == both("weights faces 0")
    assert world.gone(6, rules=RetentionRules(weights_days=1, every_hours=0)) == both("weights faces 0")


@pytest.mark.parametrize("rule", [{"mask_days": 31}, {"weights_days": 31}, {"scratch_hours": 25}, {"orphan_hours": 0}])
def test_limits_cannot_be_raised(rule):
    with pytest.raises(ValidationError):
        RetentionRules(**rule)


def test_a_held_version_keeps_all_files(world):
    first = world.version(0)
    world.version(5, first)
    world.put(names.version_hold_key("faces", first), 6)
    assert world.gone(100) == set()
    assert world.plan(100).held == [f"faces@{first}"]
    world.keys[-1] = replace(world.keys[-1], live=False)  # released: only its S3 versions are left
    assert world.gone(100) == both("weights faces 0") | {names.version_hold_key("faces", first)}


def test_files_needed_by_any_line_stay(world):
    world.version(5, world.version(0, weights="same"))
    other = world.version(0, line="cars", weights="same")
    assert world.gone(100) == set()
    assert len(world.plan(100).shared) == 1
    world.version(50, other, line="cars")
    assert world.gone(79.9) == set()
    assert world.gone(80) == both("same")


def test_a_shared_list_of_samples_stays(world):
    world.version(5, world.version(0, split="same"), split="same")
    assert world.gone(100) == {blob("weights faces 0")}
    assert world.plan(100).deletions[0].files == ("model.safetensors",)


def test_a_purged_version_is_skipped_unless_its_files_came_back(world):
    first = world.version(0)
    world.version(5, first)
    world.put(names.version_disposal_key("faces", first), 36)
    world.keys = [item for item in world.keys if item.key not in both("weights faces 0")]
    assert world.plan(100).deletions == []
    world.put(blob("weights faces 0"), 90)
    assert world.gone(100, DeletionKind.ORPHAN) == {blob("weights faces 0")}


def test_unpublished_versions_are_deleted_with_their_manifest(world):
    first = world.version(0)
    staged = world.version(5, first, run="run-1", head=False)
    manifest = names.version_key("faces", staged)
    every = {*both("weights faces 5"), blob("evidence 5"), manifest}
    assert world.gone(5.9) == set()
    assert world.gone(6) == every
    assert world.plan(6).deletions[0].keys[-1] == manifest
    world.run("run-1", 5.5, RunStatus.EVALUATING)
    assert world.gone(6) == set()  # it may still be published
    assert world.gone(6.5) == every
    world.holders["faces"] = "run-1"
    assert world.gone(60) == set()


def test_after_a_rollback_the_abandoned_branch_is_superseded(world):
    first = world.version(0)
    second = world.version(5, first)
    third = world.version(6, second, run="run-3")
    world.version(7, second, run="run-stale", head=False)
    world.run("run-3", 6)
    world.run("run-stale", 7, RunStatus.STALE_PARENT)
    world.move("faces", first, 10)
    assert names.version_key("faces", third) not in world.gone(100)
    assert len(world.gone(9, DeletionKind.STAGED)) == 4
    assert world.gone(9, DeletionKind.STAGED) > both("weights faces 7")
    assert world.gone(39.9, DeletionKind.WEIGHTS) == set()
    assert world.gone(40, DeletionKind.WEIGHTS) == both("weights faces 5") | both("weights faces 6")
    world.version(30, first)  # the fork's next version fixes the time
    assert world.gone(59.9, DeletionKind.WEIGHTS) == set()
    assert world.gone(60, DeletionKind.WEIGHTS) == both("weights faces 5") | both("weights faces 6") | both(
        "weights faces 0"
    )


def test_a_broken_lineage_stops_the_plan(world):
    first = world.version(0)
    world.version(5, first)
    del world.manifests["faces", first]
    with pytest.raises(IntegrityError, match="lineage of faces is broken"):
        world.plan(100)


def test_old_orphans_and_hidden_copies_are_deleted(world):
    world.version(0)
    world.put(blob("young"), 9.5)
    world.put(blob("old"), 1)
    world.put(blob("hidden"), 1, live=False)
    copy = names.trash_key(sha("weights faces 0"), "left-by-a-killed-purge")
    world.put(copy, 1, live=False)
    world.put("probe/123/stale", 1)
    assert world.gone(10) == {blob("old"), blob("hidden"), copy, "probe/123/stale"}


def test_a_copy_in_the_trash_is_deleted_when_its_purge_is_over_and_the_file_is_stored(world):
    world.version(0)
    copy = names.trash_key(sha("weights faces 0"), "left-by-a-killed-purge")
    world.put(copy, 5)
    assert world.gone(5.9) == set()  # its purge may still work
    assert world.gone(6.1) == {copy}
    world.keys = [item for item in world.keys if item.key != blob("weights faces 0")]
    assert world.gone(6.1) == set()


def test_the_only_copy_of_a_needed_file_stays(world):
    world.version(0)
    world.keys = [replace(item, live=False) if item.key == blob("weights faces 0") else item for item in world.keys]
    assert world.gone(100) == set()


def test_forget_data_and_masks_of_finished_runs_are_deleted(world):
    world.put("scratch/run-1/forget.json", 1)
    world.put("scratch/run-1/deep/er", 1, live=False)
    world.put("runs/run-1/mask.safetensors", 1)
    world.put("runs/run-1/report.html", 1)
    world.requests["r"] = RequestSummary("faces", Status.IN_PROGRESS, day(1), "run-1")
    world.run("run-1", 1, RunStatus.PUBLISHED, members=["r"])
    assert world.gone(1.9) == set()  # published, and not settled yet
    assert world.gone(1.6, rules=RetentionRules()) == set()
    world.requests["r"] = RequestSummary("faces", Status.COMPLETED, day(1.5), "run-1", Outcome.UNLEARNED, redacted=True)
    assert world.gone(2.4) == set()
    assert world.gone(2.5) == {"scratch/run-1/forget.json", "scratch/run-1/deep/er"}
    assert world.gone(31.4) == {"scratch/run-1/forget.json", "scratch/run-1/deep/er"}
    assert "runs/run-1/mask.safetensors" in world.gone(31.5, DeletionKind.MASK)
    assert "runs/run-1/report.html" not in world.gone(1000)


def test_a_run_that_may_still_work_keeps_its_forget_data(world):
    world.put("scratch/run-1/forget.json", 1)
    world.run("run-1", 1, RunStatus.UNLEARNING)
    assert world.gone(1.9) == set()
    assert world.gone(2) == {"scratch/run-1/forget.json"}  # a day without a sign of life
    world.holders["faces"] = "run-1"
    assert world.gone(20) == set()


@pytest.mark.parametrize("logged", [True, False])
def test_a_run_that_waits_for_a_node_keeps_its_forget_data(world, logged):
    """Nobody renews its lease meanwhile; it is the run's own until it is given back or taken."""
    world.put("scratch/run-1/forget.json", 1)
    if logged:
        world.run("run-1", 1, RunStatus.UNLEARNING)
    world.unreturned = frozenset({"run-1"})
    assert world.gone(7.9) == set()
    assert world.gone(8) == {"scratch/run-1/forget.json"}


def test_forget_data_of_an_unknown_run_is_deleted_one_day_after_the_last_write(world):
    world.put("scratch/run-x/a", 1)
    world.put("scratch/run-x/b", 2)
    assert world.gone(2.9) == set()
    assert world.gone(3) == {"scratch/run-x/a", "scratch/run-x/b"}


def test_scratch_files_of_a_run_without_a_record_are_deleted_one_day_after_its_newest_file(world):
    files = {
        f"scratch/run-x/{name}" for name in ("model.safetensors", "mask.safetensors", "split.parquet", "forget.json")
    }
    for at, key in enumerate(sorted(files)):
        world.put(key, 1 + at / 10)  # the newest one is of 1.3
    world.put("runs/run-x/outcome.json", 1)
    world.run("run-x", 1, status=None)  # known by its outcome alone
    assert world.gone(2.29, DeletionKind.SCRATCH) == set()
    assert world.gone(2.3, DeletionKind.SCRATCH) == files
    world.run("run-x", 2, status=None)  # a later step wrote the outcome again, and no file
    assert world.gone(2.9, DeletionKind.SCRATCH) == set()
    assert world.gone(3, DeletionKind.SCRATCH) == files
    world.holders["faces"] = "run-x"
    assert world.gone(30) == set()


def test_outcomes_of_idle_sweeps_are_deleted_after_seven_days_and_others_stay(world):
    made = world.version(0, run="made")
    for run in ("idle", "claimed", "refused", "made", "at-work"):
        world.put(f"runs/{run}/outcome.json", 1)
    world.put("runs/claimed/run.json", 1)
    world.put("runs/refused/decision.json", 1)
    world.holders["voices"] = "at-work"
    assert made
    assert world.gone(7.9) == set()
    assert world.gone(8) == world.gone(1000, DeletionKind.OUTCOME) == {"runs/idle/outcome.json"}
    (item,) = world.plan(8).deletions
    assert (item.kind, item.run, item.reason) == (
        DeletionKind.OUTCOME,
        "idle",
        "ended at 2026-01-02 00:00 and claimed nothing",
    )
    assert world.gone(4, rules=RetentionRules(outcome_days=3, every_hours=0)) == {"runs/idle/outcome.json"}


def test_unknown_keys_are_listed_and_stay(world):
    known = {
        "leases/faces.json",
        names.index_key("queued", "faces", 1, 2, "r"),
        "certificates/r.json",
        f"work/{sha('w')}.json",
    }
    unknown = ["photo.jpg", "blobs/sha256/short", "scratch/UP/x", "lines/faces/versions/x/y"]
    for key in [*known, *unknown]:
        world.put(key)
    found = world.plan(1000)
    assert found.deletions == []
    assert sorted(found.unknown) == sorted(unknown)


def test_old_unfinished_uploads_are_deleted(world):
    world.uploads = [(Upload("blobs/sha256/x", "u", day(1)), 7)]
    assert world.plan(1.9).deletions == []
    (item,) = world.plan(2).deletions
    assert (item.kind, item.size, item.upload.id) == (DeletionKind.UPLOAD, 7, "u")


def request(world, name, status, at=6.0, run="run-2", redacted=False, hashed=False, old=0, **more):
    outcome = more.get("outcome", Outcome.UNLEARNED) if status is Status.COMPLETED else None
    world.requests[name] = RequestSummary("faces", status, day(at), run, outcome, redacted, hashed)
    world.put(names.request_key(name), at, old=old)


def targets(world, at=10):
    return {item.request: item.keep_hashes for item in world.plan(at).deletions if item.kind is DeletionKind.REQUEST}


def test_targets_of_settled_requests_are_planned_for_redaction(world):
    world.version(5, world.version(0), run="run-2")
    request(world, "done", Status.COMPLETED)
    request(world, "gone", Status.CANCELLED, run=None)
    request(world, "no", Status.REJECTED, run=None)
    request(world, "dead", Status.FAILED)
    request(world, "waits", Status.QUEUED)
    request(world, "clean", Status.COMPLETED, redacted=True, hashed=True)
    request(world, "old", Status.COMPLETED, redacted=True, hashed=True, old=1)
    assert targets(world) == {"done": True, "gone": False, "no": False, "old": True}


def test_hashes_are_deleted_when_no_version_was_trained_on_the_data(world):
    first = world.version(0)
    second = world.version(5, first, run="run-2")
    world.version(7, second, run="run-3")
    request(world, "a", Status.COMPLETED, redacted=True, hashed=True)
    request(world, "b", Status.COMPLETED, at=8, run="run-3", redacted=True, hashed=True)
    nothing = Outcome.NOTHING_TO_ERASE
    request(world, "c", Status.COMPLETED, at=8, run="run-3", redacted=True, hashed=True, outcome=nothing)
    assert targets(world) == {}
    world.put(names.version_disposal_key("faces", first), 36)
    assert targets(world) == {"a": False}
    world.put(names.version_disposal_key("faces", second), 38)
    assert targets(world) == {"a": False, "b": False, "c": False}
    assert not still_trained_on(world.inventory(), "b")
    request(world, "lost", Status.COMPLETED, run="run-unknown", redacted=True, hashed=True)
    assert "lost" not in targets(world)


@given(st.data())
def test_no_plan_deletes_a_file_of_a_needed_version(data):
    """Random lineages with shared weights, holds, branches and rollbacks."""
    world = World()
    digests = []
    for at in range(data.draw(st.integers(1, 7))):
        parent = data.draw(st.sampled_from(digests)) if digests else None
        weights = data.draw(st.sampled_from(["a", "b", f"own {at}"]))
        split = data.draw(st.sampled_from(["x", f"split {at}"]))
        head = not digests or data.draw(st.booleans())
        digests.append(world.version(at * 10, parent, weights=weights, split=split, head=head))
    if data.draw(st.booleans()):
        world.move("faces", data.draw(st.sampled_from(digests)), 75)
    held = data.draw(st.sets(st.sampled_from(digests)))
    for digest in held:
        world.put(names.version_hold_key("faces", digest), 80)
    gone = world.gone(data.draw(st.integers(75, 200)))
    for digest in {*held, world.heads["faces"].version}:
        files = world.manifests["faces", digest].files.values()
        assert gone.isdisjoint(names.blob_key(entry.sha256) for entry in files)
        assert names.version_key("faces", digest) not in gone
