"""Filing is checked against the model line and its data, and shown, before anything is stored."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from salun_core.cli.app import app
from salun_core.data import DataSpec, load_data
from salun_core.errors import IntegrityError, UsageError
from salun_core.methods.classification import UnlearnConfig
from salun_core.registry.lookup import read_head
from salun_core.requests.filing import file_requests, match_requests
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Review, Status, Submission
from salun_core.tasks import register_model
from salun_core.tasks.classification.training import train_model
from salun_core.times import utc_clock


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    """A model of images in folders that are called 1, 2 and 3; two persons made the images."""
    root = tmp_path_factory.mktemp("signs")
    rows = ["file_name,person"]
    rng = np.random.default_rng(0)
    for folder, count in (("1", 12), ("2", 20), ("3", 16)):
        (root / "data" / folder).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / folder / f"{number:02d}.png")
            rows.append(f"{folder}/{number:02d}.png,{'ann' if number < 3 else 'bob'}")
    (root / "people.csv").write_text("\n".join(rows) + "\n")
    spec = DataSpec(source=str(root / "data"), metadata=str(root / "people.csv"), subject_column="person")
    config = UnlearnConfig(epochs=1, learning_rate=0.1, schedule="cosine", batch_norm="update", device="cpu")
    train_model(spec, "resnet8", config, root / "model")
    return dataclasses.make_dataclass("Signs", ["root", "data"])(root, load_data(spec))


@pytest.fixture
def line(store, signs, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    return begin(store, signs)


def begin(store, signs):
    register_model(store, "signs", signs.root / "model", "train", len(signs.data.split.train))
    return store


@pytest.fixture
def invoke():
    return lambda *args, input=None: CliRunner().invoke(app, ["request", *args], input=input)


@pytest.fixture
def submit(invoke, line):
    return lambda *args: invoke("submit", "--id", "r-1", "--line", "signs", *args)


def filed(store):
    return [state.request.id for state in Ledger(store, utc_clock).list()]


def item(target, name="r-1", line="signs"):
    return Submission(id=name, model_line=line, target=target)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--id", "r 9", "--class-name", "1"], "request 'r 9' is not a valid id.*did you mean 'r-9'"),
        (["--class-name", "1"], "the request has no id.*give --id"),
        (["--id", "r-9"], "names nothing to forget.*give --class-name"),
    ],
)
def test_incomplete_options_are_named_as_options(invoke, line, args, why):
    import re

    result = invoke("submit", "--line", "signs", *args)
    assert result.exit_code == 2, result.output
    assert re.search(why, result.stderr), result.stderr
    assert filed(line) == []


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--class", "1"], "class 1 is ambiguous"),  # the folder 1, and the index of the folder 2
        (["--class", "99"], "there is no class 99"),
        (["--class-name", "four"], "unknown class 'four'"),
        (["--line", "sings", "--class-name", "1"], "unknown model line 'sings'.*did you mean 'signs'"),
        (["--concept", "a cat", "--anchor", "a dog"], "a classifier cannot forget a concept"),
        (["--concept", "a cat"], "a concept needs an anchor"),
        (["--class-name", "1", "--seed", "3"], "--seed does not fit"),
        (["--random", "1.5"], "--random 1.5 is not a share: it must be above 0"),
        (["--samples", "1/00.png", "--random", "0.5"], "--samples and --random cannot be used together"),
    ],
)
def test_what_does_not_fit_the_line_is_refused_and_nothing_is_filed(submit, line, args, why):
    import re

    result = submit(*args)
    assert result.exit_code == 2, result.output
    assert re.search(why, result.stderr), result.stderr
    assert filed(line) == []


def test_what_was_matched_is_shown_by_class_samples_training_and_persons(submit, line, signs):
    train = signs.data.split.train
    trained = sum(sample.startswith("1/") for sample in train)
    shown = [line.split() for line in submit("--class-name", "1").stdout.splitlines()]
    assert shown[0] == ["id", "line", "names", "samples", "in", "training", "subjects", "note"]
    assert shown[2] == ["r-1", "signs", "class", "0:", "1", "12", str(trained), "2"]
    (receipt,) = json.loads(submit("--class-name", "1", "--json").stdout)
    match = receipt["match"]
    assert (match["class_name"], match["class_index"], match["samples"], match["in_training"]) == ("1", 0, 12, trained)
    assert (match["subjects"], match["unknown"], match["version"]) == (2, 0, read_head(line, "signs")[0].version)
    (person,) = json.loads(submit_as(line, "r-2", {"kind": "subject", "subject_ref": "ann"}).stdout)
    assert (person["match"]["samples"], person["match"]["subjects"]) == (9, 1)
    assert "ann" not in json.dumps(person)


def submit_as(store, name, target):
    document = json.dumps({"id": name, "model_line": "signs", "target": target})
    return CliRunner().invoke(app, ["request", "submit", "-", "--json", "--store", store.uri], input=document)


def test_an_unknown_id_is_held_at_once_and_shown(submit, line, signs, invoke):
    known = sorted(signs.data.split.train)[0]
    result = submit("--samples", f"{known},/home/ann/1.png")
    assert (result.exit_code, "1 not in the data: held for review" in result.stdout) == (0, True)
    last = Ledger(line, utc_clock).state("r-1").last
    assert (last.to_status, last.outcome) == (Status.ON_HOLD, Review.UNMATCHED)
    assert last.reason == "one name is not in the data; of what it names, 1 are in training"
    assert "on_hold: unmatched" in invoke("list").stdout
    assert "event 3" in invoke("release", "r-1", "--known-only", "--reason", "a typing error").stdout
    again = submit("--samples", f"{known},/home/ann/1.png")
    assert again.exit_code == 0
    assert Ledger(line, utc_clock).status("r-1") is Status.QUEUED  # filing again does not undo the decision


def test_ids_that_were_not_trained_on_are_named_so(submit, signs):
    result = submit("--samples", signs.data.split.ids("test")[0])
    assert "nothing to erase" in result.stdout


def test_a_file_is_filed_whole_or_not_at_all(invoke, line, tmp_path):
    path = tmp_path / "requests.json"
    entries = [{"id": f"r-{n}", "model_line": "signs", "target": {"kind": "class", "class_id": n}} for n in (0, 1, 2)]
    entries.append({**entries[0], "id": "r-9", "model_line": "faces"})
    path.write_text(json.dumps(entries))
    result = invoke("submit", str(path))
    assert result.exit_code == 2
    assert "3 of 4 requests do not fit their model line: r-1: class 1 is ambiguous" in result.stderr
    assert "r-9: unknown model line 'faces'" in result.stderr
    assert "nothing was filed" in result.stderr
    assert filed(line) == []


def test_in_python_a_refused_confirmation_files_nothing(line):
    seen = []
    submissions = [item({"kind": "class", "class_index": 2})]
    done, matches = file_requests(line, submissions, "ana", confirm=lambda found: bool(seen.extend(found)))
    assert (list(done.receipts), seen, filed(line)) == ([], matches, [])
    assert (matches[0].class_name, matches[0].samples) == ("3", 16)
    done, _ = file_requests(line, submissions, "ana")
    assert (done.receipts[0].id, filed(line)) == ("r-1", ["r-1"])


def test_without_the_data_the_line_and_the_class_are_checked_and_the_rest_is_named_unchecked(line, signs, tmp_path):
    moved = signs.root / "elsewhere"
    (signs.root / "data").rename(moved)
    try:
        (found,) = match_requests(line, [item({"kind": "class", "class_name": "2"})])
        assert (found.class_index, found.samples) == (1, None)
        assert "this machine cannot read the data" in found.unchecked
        ids = sorted(signs.data.split.train)[:2]
        (found,) = match_requests(line, [item({"kind": "samples", "ids": [*ids, "no-such"]})])
        assert (found.in_training, found.unknown) == (2, 0)
        with pytest.raises(UsageError, match="ambiguous"):
            match_requests(line, [item({"kind": "class", "class_id": 1})])
        with pytest.raises(IntegrityError):
            match_requests(line, [item({"kind": "class", "class_name": "1", "dataset_digest": "0" * 64})])
        with pytest.raises(Exception, match="data"):
            match_requests(line, [item({"kind": "class", "class_name": "2"})], check_data=True)
    finally:
        moved.rename(signs.root / "data")
    (found,) = match_requests(line, [item({"kind": "class", "class_name": "2"})], check_data=False)
    assert found.unchecked == "--no-check-data"


def test_all_of_the_training_data_is_refused(line, signs):
    with pytest.raises(UsageError, match="all of the training data"):
        match_requests(line, [item({"kind": "samples", "ids": sorted(signs.data.split.train)})])


def test_a_random_share_is_filed_by_fraction_and_seed(submit, line, signs):
    (receipt,) = json.loads(submit("--random", "0.25", "--seed", "7", "--json").stdout)
    assert receipt["match"]["in_training"] == round(0.25 * len(signs.data.split.train))
    target = Ledger(line, utc_clock).get("r-1").target
    assert target.model_dump() == {"kind": "random", "fraction": 0.25, "seed": 7}


def _on_terminal(salun, store, answer, *args):
    """Run `salun request submit` on a real pseudo-terminal, and type an answer."""
    command = [salun, "request", "submit", "--id", "r-1", "--line", "signs", *args]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "--store", store.uri], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    return process.wait(60), shown.decode()


def test_a_terminal_is_asked_before_anything_is_stored(real_store, signs, salun_path):
    line = begin(real_store, signs)
    code, shown = _on_terminal(salun_path, line, "n\n", "--class-name", "2")
    assert (code, "File 1 request? [y/N]" in shown, "nothing was filed" in shown) == (1, True, True), shown
    assert shown.index("class 1: 2") < shown.index("File 1 request?")
    assert filed(line) == []
    code, shown = _on_terminal(salun_path, line, "y\n", "--class-name", "2")
    assert (code, filed(line)) == (0, ["r-1"]), shown
    code, shown = _on_terminal(salun_path, line, "", "--class-name", "2", "--yes")
    assert (code, "[y/N]" in shown) == (0, False), shown
