"""`salun model list`, `show`, `diff` and `history`: on small versions of a line that was rolled back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from salun_core.errors import ConflictError
from salun_core.registry.history import history
from salun_core.registry.lookup import read_head
from salun_core.registry.rollbacks import read_rollback
from salun_core.registry.versions import publish, stage_version
from salun_core.retention.inventory import VersionState, classify_versions, scan_store
from salun_core.sweeps.rollback import rollback
from salun_core.times import utc_clock

CARD = {"task": "classification", "architecture": "resnet8", "classes": ["cat", "dog"]}
CARD |= {"channels": 3, "height": 32, "width": 32}
METRICS = {"UA": {"before": 0.0, "after": 0.9, "n": 40}, "RA": {"before": 1.0, "after": 0.98, "n": 400}}


@pytest.fixture
def line(store, tmp_path, monkeypatch):
    """A line of three versions; returns their digests, the oldest first. Each one changes 10 of the 40 head weights."""
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    rng, digests = np.random.default_rng(0), []
    tensors = {
        "stem.weight": rng.standard_normal((8, 3)).astype(np.float32),
        "head.weight": np.ones((10, 4), np.float32),
        "head.bias": np.zeros(4, np.float32),
    }
    for number in range(3):
        folder = tmp_path / f"v{number}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "model.json").write_text(json.dumps(CARD))
        fields = {"line": "faces", "method": "import", "lineage": {"trained_on": 100}}
        if number:
            (folder / "evidence.json").write_text(json.dumps({"metrics": METRICS}))
            (folder / "decision.json").write_text(json.dumps({"policy": "classifier", "passed": True}))
            lineage = {"trained_on": 100, "runs_since_training": number, "forgotten_since_training": number}
            fields |= {"method": "salun", "parent": digests[-1], "forget_count": 0, "lineage": lineage}
        fields["created_at"] = f"2026-01-0{number + 1}T00:00:00+00:00"
        head, _ = publish(store, fields, {path.name: path for path in folder.iterdir()})
        digests.append(head.version)
        tensors["head.weight"] = tensors["head.weight"].copy()
        tensors["head.weight"][:, number] += 1
    return digests


def read(salun, *args):
    result = salun(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_version_that_was_undone_stays_in_the_history_with_its_reason(salun, store, line):
    rollback(store.uri, f"faces@{line[0]}", "ana", "accuracy fell")
    rows = read(salun, "model", "history", "faces")
    assert [(row["version"], row["state"]) for row in rows] == [
        (line[2], "undone"),
        (line[1], "undone"),
        (line[0], "HEAD"),
    ]
    assert [row["undone"] and row["undone"]["reason"] for row in rows] == ["accuracy fell", "accuracy fell", None]
    assert (rows[0]["undone"]["by"], rows[0]["undone"]["to"]) == ("ana", line[0])
    shown = salun("model", "history", "faces").stdout
    assert f"{line[2][:12]} undone" in shown
    assert f"undone: {line[1][:12]}, 20" in shown
    assert f"by ana, back to {line[0][:12]}: accuracy fell" in shown
    shown = salun("model", "show", f"faces@{line[2]}").stdout
    assert "accuracy fell" in shown


def test_a_new_version_after_a_rollback_stands_above_what_was_undone(salun, store, line, tmp_path):
    rollback(store.uri, f"faces@{line[1]}", "ana", "accuracy fell")
    files = {path.name: path for path in (tmp_path / "v0").iterdir()}
    head, _ = publish(store, {"line": "faces", "method": "salun", "parent": line[1]}, files)
    states = [(row["version"], row["state"]) for row in read(salun, "model", "history", "faces")]
    assert states == [(head.version, "HEAD"), (line[2], "undone"), (line[1], "earlier"), (line[0], "earlier")]


def test_a_rollback_that_failed_leaves_no_undone_version_and_its_record_is_replaced(salun, store, line, monkeypatch):
    def lost(*_args):
        raise ConflictError("HEAD moved")

    with monkeypatch.context() as patch:
        patch.setattr("salun_core.sweeps.rollback.roll_back", lost)
        with pytest.raises(ConflictError):
            rollback(store.uri, f"faces@{line[1]}", "ana", "first try")
    assert read_rollback(store, "faces", line[2]).reason == "first try"
    assert {row["state"] for row in read(salun, "model", "history", "faces")} == {"HEAD", "earlier"}
    rollback(store.uri, f"faces@{line[1]}", "ana", "second try")
    assert read(salun, "model", "history", "faces")[0]["undone"]["reason"] == "second try"


def test_a_staged_version_is_not_history_and_a_rollback_without_record_is(store, line, tmp_path):
    files = {path.name: path for path in (tmp_path / "v0").iterdir()}
    staged, _ = stage_version(store, {"line": "faces", "method": "salun", "parent": line[2], "run": "killed"}, files)
    assert [item.version.digest for item in history(store, "faces", lambda run: None, lambda run: True)] == line[::-1]
    rollback(store.uri, f"faces@{line[1]}", "ana", "accuracy fell")
    seen = history(store, "faces", lambda run: None, lambda run: run == "killed")
    assert [(item.version.digest, item.state) for item in seen][:2] == [(staged, "undone"), (line[2], "undone")]
    assert seen[0].undone is None
    states = {item.digest: item.state for item in classify_versions(scan_store(store, utc_clock()))}
    assert states[line[2]] is VersionState.SUPERSEDED


def test_a_wrong_reason_moves_nothing(store, line):
    with pytest.raises(Exception, match="reason"):
        rollback(store.uri, f"faces@{line[1]}", "ana", "two\nlines")
    assert read_head(store, "faces")[0].version == line[2]


def test_list_shows_each_line(salun, store, line, tmp_path):
    files = {path.name: path for path in (tmp_path / "v0").iterdir()}
    publish(store, {"line": "signs", "method": "train"}, files)
    rows = {row["line"]: row for row in read(salun, "model", "list")}
    assert sorted(rows) == ["faces", "signs"]
    assert (rows["faces"]["versions"], rows["faces"]["head"]["version"]) == (3, line[2])
    shown = salun("model", "list").stdout
    assert "2 in 2 runs" in shown
    assert line[2][:12] in shown


def test_list_of_an_empty_store_says_how_to_begin(salun, store, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    assert read(salun, "model", "list") == []
    assert "salun model import --help" in salun("model", "list").stdout


def test_show_tells_where_a_version_comes_from_and_what_was_measured(salun, line):
    found = read(salun, "model", "show", f"faces@{line[1][:8]}")
    assert (found["state"], found["parent"]) == ("earlier", line[0])
    assert found["gate"] == {"policy": "classifier", "passed": True}
    assert found["metrics"] == METRICS
    shown = salun("model", "show", "faces").stdout
    for text in ("resnet8, 2 classes, images 3 x 32 x 32", "passed policy classifier", "0.9000", f"faces@{line[2]}"):
        assert text in shown
    assert salun("model", "show", "cars").exit_code == 2


def test_diff_counts_changed_weights_by_layer_and_names_the_steps(salun, line):
    found = read(salun, "model", "diff", f"faces@{line[0]}", "faces")
    layers = {item["layer"]: item for item in found["layers"]}
    assert (layers["stem"]["changed"], layers["stem"]["values"]) == (0, 24)
    assert (layers["head"]["changed"], layers["head"]["values"]) == (20, 44)
    assert layers["head"]["relative_change"] == pytest.approx(np.sqrt(20 / 40))
    assert (found["changed"], found["values"]) == (20, 68)
    assert [(step["version"], step["only_in"]) for step in found["steps"]] == [(line[1], "b"), (line[2], "b")]
    assert found["steps"][0]["metrics"] == METRICS
    shown = salun("model", "diff", f"faces@{line[0]}", "faces").stdout
    assert "20 of 68 values differ (29.4%); 1 layer bit-identical" in shown
    assert f"only in faces@{line[2][:12]}: {line[1][:12]} by salun" in shown


def test_diff_compares_folders_without_a_store(salun, line, tmp_path, monkeypatch):
    monkeypatch.delenv("SALUN_STORE_URI")
    found = read(salun, "model", "diff", tmp_path / "v0", tmp_path / "v1")
    assert (found["changed"], found["steps"]) == (10, [])
    refused = salun("model", "diff", tmp_path / "v0", "faces")
    assert refused.exit_code == 2
    assert "give --store" in refused.stderr


def test_diff_of_other_shapes_names_the_tensors(salun, tmp_path):
    for name, width in (("a", 4), ("b", 5)):
        (tmp_path / name).mkdir()
        tensors = {"same.weight": np.ones(3, np.float32), "head.weight": np.ones((2, width), np.float32)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = read(salun, "model", "diff", "a", "b")
    assert (found["only_in_a"], found["only_in_b"], found["values"]) == (["head.weight"], ["head.weight"], 3)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"cut")
    assert salun("model", "diff", "a", "b").exit_code == 5
