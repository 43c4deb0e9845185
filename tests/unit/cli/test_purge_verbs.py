"""`salun purge`, `salun model hold` and `salun model release`, on a line of two tiny versions."""

import json
import re

import pytest
import typer

from salun_core.cli.app import app
from salun_core.registry.versions import publish
from salun_core.retention.rules import RetentionRules
from salun_core.storage import open_store

RUN = "5f0c2b0e-6a4f-4a38-9d0c-7a8f9c1d2e3f"


@pytest.fixture
def versions(store, tmp_path, monkeypatch):
    """The older of two versions of a line, superseded long ago, and the newer."""
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    monkeypatch.setenv("SALUN_ACTOR", "ana")
    monkeypatch.delenv("SALUN_SIGNING_KEY", raising=False)
    made, parent = [], None
    for number in range(2):
        path = tmp_path / "model.safetensors"
        path.write_bytes(bytes([number]) * 1000)
        fields = {"line": "faces", "method": "train", "parent": parent}
        fields["created_at"] = f"2026-01-0{number + 1}T00:00:00+00:00"
        parent = publish(store, fields, {path.name: path})[0].version
        made.append(parent)
    store.put_new("holiday/photo.jpg", b"not ours")
    return made


def test_a_purge_lists_first_and_holds_count(salun, store, versions):
    dry = salun("purge", "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    (key,) = [entry.key for entry in store.list("blobs/") if entry.key in dry.stdout]
    assert "superseded weights" in dry.stdout
    assert dry.stdout.rstrip().endswith("dry run: nothing was deleted\nunknown keys, not deleted: 1")
    held = salun("model", "hold", f"faces@{versions[0][:8]}", "--reason", "audit", "--json")
    assert {"held": f"faces@{versions[0]}", "by": "ana"}.items() <= json.loads(held.stdout).items()
    assert "superseded and held: 1" in salun("purge").stdout
    assert store.get(key) is not None
    assert salun("model", "release", f"faces@{versions[0][:8]}").exit_code == 0
    done = salun("purge", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["erased"] == {"keys": 1, "versions": 1, "bytes": 1000}
    assert report["disposals"][0]["keys"] == [key]
    assert report["unknown"] == ["holiday/photo.jpg"]
    assert store.get(key) is None
    assert "nothing to delete" in salun("purge").stdout


@pytest.fixture
def pipeline_root(store):
    """A pipeline root with what a run of an earlier release left, and a folder of another team."""
    root = open_store(f"{store.uri}-root/v2/artifacts")
    place = f"salun-unlearning/{RUN}/unlearn/0b0c2b0e-6a4f-4a38-9d0c-7a8f9c1d2e3f"
    root.put_new(f"{place}/unlearned/model.safetensors", b"weights")
    root.put_new(f"{place}/unlearned/split.json", b'["face-of-ana"]')
    root.put_new(f"{place}/samples/face-of-ana.png", b"\0")
    root.put_new(f"{place}/mask", b'{"format": "salun.reference/v1"}')
    root.put_new(f"faces/{RUN}/train/model/model.safetensors", b"not ours")
    return root


def test_old_artifacts_are_found_and_the_printed_command_removes_them(salun, versions, pipeline_root):
    found = salun("doctor", "--kfp", pipeline_root.uri)
    assert found.exit_code == 1, found.stderr
    assert "face-of-ana" not in found.output
    assert re.search(rf"salun-unlearning +{RUN} +unlearn +unlearned +model +2 +2 +22\n", found.stdout)
    assert "2 outputs, 1 runs, 3 files, 3 versions, 23 bytes" in found.stdout
    listed = json.loads(salun("doctor", "--kfp", pipeline_root.uri, "--json").stdout)
    assert [(row["output"], row["what"], row["bytes"]) for row in listed["found"]] == [
        ("samples", "binary data", 1),
        ("unlearned", "model", 22),
    ]
    assert listed["total"] == {"outputs": 2, "runs": 1, "files": 3, "versions": 3, "bytes": 23}
    assert f"{listed['command']}\n" in found.stdout
    verb, *options = listed["command"].split()[1:]
    dry = salun(verb, *options, "--dry-run")
    assert dry.stdout.count("pipeline artifact") == 3
    assert "superseded weights" not in dry.stdout
    done = json.loads(salun(verb, *options, "--json").stdout)
    assert done["erased"] == {"keys": 3, "versions": 3, "bytes": 23}
    assert done["active_runs"] == []
    clean = salun("doctor", "--kfp", pipeline_root.uri)
    assert clean.exit_code == 0
    assert clean.stdout.splitlines() == [
        f"{pipeline_root.uri} has no weights, masks or sample ids of ours",
        "1 harmless outputs of ours, 1 objects of others",
    ]
    assert "check that it is Kubeflow's pipeline root" in salun("doctor", "--kfp", f"{pipeline_root.uri}/typo").stdout
    assert json.loads(salun("doctor", "--kfp", pipeline_root.uri, "--json").stdout)["found"] == []
    assert len(list(pipeline_root.list(""))) == 2


def test_old_artifacts_need_a_pipeline_root(salun, versions):
    refused = salun("purge", "--old-artifacts")
    assert refused.exit_code == 2
    assert "give --pipeline-root" in refused.stderr


def test_wrong_words(salun, versions, monkeypatch):
    assert "is not held" in salun("model", "release", "faces").stderr
    assert salun("model", "hold", "faces@000000", "--reason", "x").exit_code == 2
    assert salun("purge", "--weights-days", 31).exit_code == 2
    monkeypatch.delenv("SALUN_STORE_URI")
    assert "SALUN_STORE_URI" in salun("purge").stderr


def test_the_options_have_the_defaults_of_the_rules():
    fields = RetentionRules.model_fields
    options = {item.name: item for item in typer.main.get_command(app).commands["purge"].params}
    named = [name for name in fields if name in options]
    assert len(named) == 6
    assert {name: options[name].default for name in named} == {name: fields[name].default for name in named}
