"""`salun purge`, `salun model hold` and `salun model release`, on a line of two tiny versions."""

import json

import pytest
import typer

from salun_core.cli.app import app
from salun_core.registry.versions import publish
from salun_core.retention.rules import RetentionRules


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
    assert len(named) == 5
    assert {name: options[name].default for name in named} == {name: fields[name].default for name in named}
