"""The demo with its steps in one process; tests/e2e runs it with the compiled pipeline."""

from __future__ import annotations

import fcntl
import functools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from examples.demo import classifier
from examples.demo.__main__ import app
from examples.demo.classifier import SAMPLES, demo_spec, demo_targets, with_writers
from examples.demo.stage import demo_store
from salun_core.data import DataSpec, load_data
from salun_core.data.forget_set import resolve_forget
from salun_core.data.targets import ClassTarget, SubjectTarget
from salun_core.registry.lookup import ancestry, lines
from salun_core.requests.ledger import Ledger
from salun_core.storage import open_store
from salun_core.times import utc_clock
from tests.support.commands import _settings_restored  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def _in_process(monkeypatch, s3_server):  # s3_server: skipped where no server is installed
    monkeypatch.setattr("examples.demo.stage.has_kfp", lambda: False)


@pytest.fixture
def demo(_settings_restored, tmp_path, monkeypatch):  # noqa: F811
    """Runs the demo in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def _states(work):
    """Return the requests of a demo's store with where they stand, and its lines with their methods."""
    with demo_store(work, None, fresh=False) as uri:
        store = open_store(uri)
        requests = {state.request.id: state.status.value for state in Ledger(store, utc_clock).list()}
        methods = {line: [item.manifest.method for item in ancestry(store, line)] for line in lines(store)}
        scratch = [entry.key for entry in store.list("scratch/")]
    return requests, methods, scratch


def digits(folder, count):
    """Return the data spec of some of the digits."""
    path = folder / f"digits-{count}.yaml"
    path.write_text(json.dumps({"source": "digits", "train_limit": count, "test_limit": count // 2}))
    return path


NAMES = ("samples-a", "samples-b", "class", "person", "nothing")


def test_the_demo_erases_in_one_batch_certifies_each_and_a_second_one_that_is_refused_adds_a_line(
    demo, tmp_path, monkeypatch
):
    work = tmp_path / "work"
    first = demo("--work-dir", work, "--data", digits(tmp_path, 700), "--json")
    assert first.exit_code == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["passed"]
    assert told["metrics"]["RA"]["before"] >= 0.99
    assert told["metrics"]["UA_class"]["after"] >= 0.95
    assert told["metrics"]["gap"]["after"] < told["metrics"]["gap"]["before"]
    assert sorted(told["files"]) == ["decision.json", "evidence.json", "metrics.txt", "report.html"]
    assert all((work / name).stat().st_size for name in told["files"])
    outcomes = {name: item["outcome"] for name, item in told["requests"].items()}
    assert outcomes == {f"demo-{name}": "unlearned" for name in NAMES} | {"demo-nothing": "nothing_to_erase"}
    assert all(Path(item["certificate"]).is_file() for item in told["requests"].values())
    assert "would bring back" in told["rollback"]
    assert 'salun_requests{status="completed"} 5.0' in (work / "metrics.txt").read_text()
    assert not (work / "s3.env").exists()

    policy = {"name": "strict", "rules": [{"metric": "RA", "op": ">=", "value": 1.1, "reason": "more than all"}]}
    (tmp_path / "policy.yaml").write_text(json.dumps(policy))
    strict = functools.partial(classifier.DeletionSweepForm, policy_uri=str(tmp_path / "policy.yaml"))
    monkeypatch.setattr(classifier, "DeletionSweepForm", strict)
    again = demo("--work-dir", work, "--keep", "--data", digits(tmp_path, 200), "--epochs", "1")
    assert again.exit_code == 3, again.stderr
    assert "REFUSED: more than all (RA " in again.stdout
    requests, methods, scratch = _states(work)
    assert {requests.pop(f"demo-{name}") for name in NAMES} == {"completed"}
    assert requests == {f"demo-2-{name}": "queued" for name in NAMES} | {"demo-2-nothing": "completed"}
    assert methods == {"demo": ["salun_adaptive", "train"], "demo-2": ["train"]}
    assert scratch == []


def test_a_failed_run_queues_the_requests_again(demo, tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("salun_core.steps.sweep.run_steps", broken)
    result = demo("--work-dir", "work", "--data", digits(tmp_path, 200), "--epochs", "1")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    requests = _states(tmp_path / "work")[0]
    assert {status for name, status in requests.items() if name != "demo-nothing"} == {"queued"}


def test_a_folder_of_something_else_is_left_alone(demo, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = demo("--work-dir", tmp_path)
    assert result.exit_code == 2
    assert "holds something else" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_that_runs_is_left_alone(demo, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    with (work / ".salun-demo").open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        result = demo("--work-dir", work)
    assert result.exit_code == 2
    assert "another demo runs there" in result.stderr


def test_data_that_are_not_there_start_nothing(demo, tmp_path):
    assert demo("--data", "no/where").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_other_data_are_cut_to_a_size_that_takes_minutes(tmp_path):
    (tmp_path / "spec.yaml").write_text("source: images\nsize: 48\n")
    spec = demo_spec(str(tmp_path / "spec.yaml"))
    assert (spec.size, spec.train_limit, spec.test_limit) == (48, 2000, 1000)
    assert demo_spec(None) == DataSpec(source="digits")


def test_of_two_classes_none_is_forgotten_as_a_whole(tmp_path):
    import numpy as np
    from PIL import Image

    for label in ("left", "right"):
        (tmp_path / label).mkdir()
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    targets = demo_targets(load_data(DataSpec(source=str(tmp_path))))
    named = [sample for name in NAMES[:4] for sample in targets[name].ids]
    assert len(named) == len(set(named))


def test_of_digits_a_class_a_person_and_samples_of_others_are_forgotten(tmp_path):
    data = load_data(with_writers(DataSpec(source="digits"), tmp_path))
    targets = demo_targets(data)
    assert targets["class"] == ClassTarget(dataset_digest=data.split.dataset_digest, class_id="3")
    labels = {data.table.labels[data.table.position[sample]] for sample in targets["samples-a"].ids}
    assert len(targets["samples-a"].ids) == SAMPLES
    assert 3 not in labels
    assert isinstance(targets["person"], SubjectTarget)
    assert resolve_forget([targets["person"]], data.table, data.split).ids


def test_there_is_nothing_to_serve_before_a_demo(demo, tmp_path):
    result = demo("--serve", "--work-dir", "work")
    assert result.exit_code == 2
    assert "run `salun demo` first" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--diffusion", "--kind", "ddpm", "--data", "digits")])
def test_a_dry_run_writes_nothing(demo, tmp_path, options):
    shown = demo(*options, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    assert "wrote nothing" in shown.stdout
    assert list(tmp_path.iterdir()) == []
