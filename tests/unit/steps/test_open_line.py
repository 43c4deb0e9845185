"""HEAD and what it names are read once before a claim, and again only where another run may have moved HEAD."""

import pytest

from salun_core.certificates.keys import create_key
from salun_core.data.targets import ConceptTarget
from salun_core.errors import UsageError
from salun_core.pods.pod import Pod
from salun_core.pods.steps import claim
from salun_core.registry.lookup import read_version, require_head
from salun_core.registry.versions import publish_head, stage_version
from salun_core.requests.ledger import Ledger
from salun_core.storage.keys import blob_key, head_key, run_key, version_key
from salun_core.storage.s3 import S3Store
from salun_core.sweeps import claim as claims
from salun_core.tasks import task_named
from salun_core.tasks.line import OpenLine
from salun_core.times import utc_clock
from tests.support.card_line import begin_text_to_image

LINE = "pictures"


@pytest.fixture
def line(store, tmp_path, monkeypatch):
    """A line of a text-to-image model that has one request; its data need not be read."""
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))
    begin_text_to_image(store, LINE)
    Ledger(store, utc_clock).submit("r-1", LINE, ConceptTarget(prompts=["a cat"], anchor_prompt="a dog"))
    return store


@pytest.fixture
def reads(line, monkeypatch):
    """How often each part of the line was read, by its key."""
    head = require_head(line, LINE).version
    files = read_version(line, LINE, head).files
    parts = {head_key(LINE): "HEAD", version_key(LINE, head): "manifest"}
    parts |= {blob_key(files[name].sha256): name for name in files}
    count, get = dict.fromkeys(parts.values(), 0), S3Store.get

    def counting(store, key):
        if key in parts:
            count[parts[key]] += 1
        return get(store, key)

    monkeypatch.setattr(S3Store, "get", counting)
    return count


def claimed(store, tmp_path, run="run-1"):
    given = {"store_uri": store.uri, "model_line": LINE, "min_requests": 1}
    return claim(Pod(store.uri, LINE, run), given, str(tmp_path / "summary.md"))


def test_before_a_claim_head_is_read_twice_and_what_it_names_once(line, reads, tmp_path):
    assert claimed(line, tmp_path).requests == 1
    # HEAD: for the check of the parameters, and under the lease, since another run may have published in between.
    assert reads == {"HEAD": 2, "manifest": 1, "model.json": 1, "split.parquet": 1}


def test_a_claim_works_on_the_head_that_it_finds_under_the_lease(line, tmp_path, monkeypatch):
    hold, moved = claims.hold_line, []

    def hold_late(store, name, run, seconds):
        """Take the lease after another run has published."""
        parent = require_head(store, LINE).version
        files = {}
        for name_of, entry in read_version(store, LINE, parent).files.items():
            files[name_of] = tmp_path / name_of
            store.download(blob_key(entry.sha256), files[name_of])
        version, _ = stage_version(store, {"line": LINE, "parent": parent, "run": "run-0", "method": "salun"}, files)
        publish_head(store, LINE, version, parent, "run-0")
        moved.append(version)
        return hold(store, name, run, seconds)

    monkeypatch.setattr(claims, "hold_line", hold_late)
    assert claimed(line, tmp_path).requests == 1
    record = line.get(run_key("run-1", "run.json")).data.decode()
    assert moved[0] in record


def test_who_needs_head_alone_reads_head_alone(line, reads):
    opened = OpenLine(line, LINE)
    assert opened.head.version == opened.digest
    assert reads == {"HEAD": 1, "manifest": 0, "model.json": 0, "split.parquet": 0}
    assert opened.task is task_named("text-to-image")
    assert opened.at(opened.digest) is opened.again() is opened
    assert reads == {"HEAD": 2, "manifest": 1, "model.json": 1, "split.parquet": 0}


def test_a_line_without_head_has_no_version(store):
    nothing = OpenLine(store, "nothing")
    assert nothing.head is None
    with pytest.raises(UsageError, match="model line nothing has no HEAD"):
        _ = nothing.card
    with pytest.raises(UsageError, match="no such version"):
        _ = nothing.at("a" * 64).card
