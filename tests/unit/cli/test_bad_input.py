"""Every bad input gives one clear line and its exit code, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from salun_core.config import load
from salun_core.data.split import SPLIT, read_split
from salun_core.gate import GateDecision
from salun_core.models import load_model

pytestmark = pytest.mark.slow


def one_line(result, code):
    """Assert the exit code and that there is one clear line; return it."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert "To fix it: " in lines[0]
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture
def elsewhere(tmp_path_factory):
    """A folder for inputs, so that the working folder stays empty."""
    return tmp_path_factory.mktemp("inputs")


def _forget(folder, document):
    path = folder / "forget.json"
    path.write_text(json.dumps(document))
    return path


def _image_folder(folder, classes=3, size=8, count=12):
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class-{label}").mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class-{label}" / f"{number}.png")
    return folder


@pytest.mark.usefixtures("untouched")
class TestModelsAndData:
    def test_a_checkpoint_of_another_architecture_names_the_keys(self, salun, world):
        weights = world.base / "model.safetensors"
        line = one_line(salun("model", "import", weights, "--arch", "resnet14", "--data", "digits", "--out", "new"), 1)
        assert "missing 30 of 92: stages.* (30)" in line
        assert "the names are those of resnet8 (salun)" in line

    def test_a_checkpoint_that_is_none(self, salun, elsewhere):
        (elsewhere / "c.pt").write_bytes(b"no checkpoint")
        args = ("--arch", "resnet8", "--data", "digits", "--out", "new")
        assert "c.pt" in one_line(salun("model", "import", elsewhere / "c.pt", *args), 1)

    def test_a_checkpoint_of_another_class_count(self, salun, world, elsewhere):
        data = _image_folder(elsewhere / "data")
        weights = world.base / "model.safetensors"
        line = one_line(salun("model", "import", weights, "--arch", "resnet8", "--data", data, "--out", "new"), 1)
        assert "it has 10 outputs, the data have 3 classes" in line

    def test_data_of_another_class_count(self, salun, world, elsewhere):
        other = elsewhere / "other"
        shutil.copytree(world.base, other)
        card = json.loads((other / "model.json").read_text())
        card["classes"] = card["classes"][:9]
        (other / "model.json").write_text(json.dumps(card))
        weights = load_file(other / "model.safetensors")
        weights |= {name: weights[name][:9].copy() for name in ("fc.weight", "fc.bias")}
        save_file(weights, other / "model.safetensors")
        line = one_line(salun("mask", "--model", other, "--forget", world.forget_json, "--out", "m"), 1)
        assert "the data have 10 classes, the model 9" in line

    def test_images_of_another_size(self, salun, world, elsewhere):
        (elsewhere / "other").mkdir()
        other = elsewhere / "other" / "base"
        shutil.copytree(world.base, other)
        card = json.loads((other / "model.json").read_text())
        card["data"]["size"] = 16
        (other / "model.json").write_text(json.dumps(card))
        line = one_line(salun("mask", "--model", other, "--forget", world.forget_json, "--out", "m"), 1)
        assert "they are 1 x 16 x 16, the model takes 1 x 8 x 8" in line

    def test_images_of_mixed_sizes(self, salun, elsewhere):
        data = _image_folder(elsewhere / "data")
        Image.new("L", (9, 8)).save(data / "class-0" / "0.png")
        assert "has another size" in one_line(salun("train", "--data", data, "--arch", "resnet8", "--out", "new"), 1)

    def test_a_corrupt_image(self, salun, elsewhere):
        data = _image_folder(elsewhere / "data")
        (data / "class-1" / "3.png").write_bytes((data / "class-1" / "3.png").read_bytes()[:40])
        line = one_line(salun("train", "--data", data, "--arch", "resnet8", "--out", "new"), 1)
        assert "image class-1/3.png is corrupt" in line

    def test_data_that_are_not_the_models(self, salun, world, elsewhere):
        data = _image_folder(elsewhere / "data")
        args = ("--model", world.base, "--data", data, "--forget", world.forget_json, "--out", "m")
        assert "do not match the split manifest" in one_line(salun("mask", *args), 5)

    @pytest.mark.parametrize("verb", ["train", "model"])
    def test_data_that_are_not_there(self, salun, world, verb):
        first = ("train",) if verb == "train" else ("model", "import", world.base / "model.safetensors")
        one_line(salun(*first, "--data", "no/where", "--arch", "resnet8", "--out", "new"), 2)

    def test_a_model_that_is_not_there(self, salun, world):
        assert "no/model" in one_line(
            salun("mask", "--model", "no/model", "--forget", world.forget_json, "--out", "m"), 2
        )

    def test_an_architecture_with_a_typo(self, salun):
        line = one_line(salun("train", "--data", "digits", "--arch", "resnt8", "--out", "new", "--dry-run"), 2)
        assert "did you mean 'resnet8'?" in line


@pytest.mark.usefixtures("untouched")
class TestForgetTargets:
    @pytest.mark.parametrize(
        ("document", "code", "told"),
        [
            ({"kind": "samples", "ids": ["000001", "no-such-id"]}, 2, "1 of 2 ids are not in the data"),
            ({"kind": "class", "class_id": 12}, 2, "there is no class 12"),
            ({"kind": "clas", "class_id": 1}, 2, "did you mean 'class'?"),
            ({"kind": "subject", "subject_ref": "p-1"}, 2, "no subjects"),
            ({"kind": "concept", "prompts": ["a"], "anchor_prompt": "b"}, 2, "cannot forget a concept"),
            ([], 2, "names nothing"),
            ([{"kind": "class", "class_id": label} for label in range(10)], 1, "whole training data"),
        ],
    )
    def test_targets(self, salun, world, elsewhere, document, code, told):
        forget = _forget(elsewhere, document)
        assert told in one_line(salun("mask", "--model", world.base, "--forget", forget, "--out", "m"), code)

    def test_a_set_that_is_empty_in_training(self, salun, world, elsewhere):
        test_id = next(iter(load_model(world.base).split.test))
        forget = _forget(elsewhere, {"kind": "samples", "ids": [test_id]})
        line = one_line(salun("mask", "--model", world.base, "--forget", forget, "--out", "m"), 1)
        assert "forget set is empty" in line

    def test_an_unreadable_file(self, salun, world, elsewhere):
        (elsewhere / "f.yaml").write_text("kind: [")
        args = ("--model", world.base, "--forget", elsewhere / "f.yaml", "--out", "m")
        assert "neither YAML nor JSON" in one_line(salun("mask", *args), 2)


@pytest.mark.usefixtures("untouched")
class TestSettings:
    @pytest.mark.parametrize("density", ["0", "-0.1", "1.01", "nan"])
    def test_a_density_outside_its_range(self, salun, world, density):
        args = ("--model", world.base, "--forget", world.forget_json, "--out", "m", "--density", density)
        assert "density: Input should be" in one_line(salun("mask", *args), 2)

    def test_an_unknown_method(self, salun, world):
        args = ("--model", world.base, "--forget", world.forget_json, "--out", "new", "--method", "salum")
        assert "did you mean 'salun'?" in one_line(salun("unlearn", *args), 2)

    def test_salun_without_a_mask(self, salun, world):
        args = ("--model", world.base, "--forget", world.forget_json, "--out", "new")
        assert "needs a mask" in one_line(salun("unlearn", *args), 2)

    def test_all_faults_of_a_configuration_at_once(self, salun, world, elsewhere):
        (elsewhere / "c.yaml").write_text("epoch: 3\nlearning_rate: -1\nbatch_norm: frozen\n")
        args = ("--model", world.base, "--forget", world.forget_json, "--out", "new", "--mask", world.mask_st)
        line = one_line(salun("unlearn", *args, "--config", elsewhere / "c.yaml"), 2)
        assert "(3 faults)" in line
        assert "did you mean 'epochs'?" in line
        assert "learning_rate" in line
        assert "batch_norm" in line

    def test_all_faults_of_a_run_at_once(self, salun, elsewhere):
        (elsewhere / "run.yaml").write_text("model_lin: digits\ndensity: 2\nstore_uri: s3://salun\n")
        line = one_line(salun("run", "--config", elsewhere / "run.yaml"), 2)
        assert "did you mean 'model_line'?" in line
        assert "density" in line
        assert "forget_manifest_uri" in line

    def test_a_policy_with_a_typo(self, salun, world):
        args = ("--evidence", world.evidence_json, "--out", "d", "--policy", "clasifier")
        assert "did you mean 'classifier'?" in one_line(salun("gate", *args), 2)

    def test_a_setting_that_is_none(self, salun, world):
        args = ("--model", world.base, "--forget", world.forget_json, "--out", "new", "--set", "epochs")
        assert "KEY=VALUE" in one_line(salun("unlearn", *args), 2)

    @pytest.mark.parametrize(
        ("args", "near"),
        [(("msk",), "mask"), (("model", "histroy"), "history"), (("mask", "--modle", "x"), "--model")],
    )
    def test_a_verb_or_option_with_a_typo(self, salun, args, near):
        result = salun(*args)
        assert result.exit_code == 2
        assert near in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("untouched")
class TestIntegrity:
    def test_weights_that_were_tampered_with(self, salun, world, elsewhere):
        other = elsewhere / "base"
        shutil.copytree(world.base, other)
        data = bytearray((other / "model.safetensors").read_bytes())
        (other / "model.safetensors").write_bytes(bytes(data[:-100]))
        args = ("--model", other, "--forget", world.forget_json, "--out", "m")
        assert "damaged" in one_line(salun("mask", *args), 5)

    def test_weights_of_which_a_bit_was_changed_are_not_the_masks(self, salun, world, elsewhere):
        other = elsewhere / "base"
        shutil.copytree(world.base, other)
        data = bytearray((other / "model.safetensors").read_bytes())
        data[-2] ^= 1
        (other / "model.safetensors").write_bytes(bytes(data))
        args = ("--model", other, "--forget", world.forget_json, "--mask", world.mask_st, "--out", "new")
        one_line(salun("unlearn", *args), 5)

    def test_a_mask_that_was_tampered_with(self, salun, world, elsewhere):
        data = bytearray(world.mask_st.read_bytes())
        data[-2] ^= 1
        (elsewhere / "mask").write_bytes(bytes(data))
        args = ("--model", world.base, "--forget", world.forget_json, "--mask", elsewhere / "mask", "--out", "new")
        assert "mask file is damaged" in one_line(salun("unlearn", *args), 5)

    def test_a_mask_of_another_forget_set(self, salun, world, elsewhere):
        forget = _forget(elsewhere, {"kind": "class", "class_id": 4})
        args = ("--model", world.base, "--forget", forget, "--mask", world.mask_st, "--out", "new")
        one_line(salun("unlearn", *args), 5)

    def test_a_split_that_was_changed(self, salun, world, elsewhere):
        other = elsewhere / "base"
        shutil.copytree(world.base, other)
        split = read_split(other)
        split.without([min(split.train)]).write(other / SPLIT)
        one_line(salun("mask", "--model", other, "--forget", world.forget_json, "--out", "m"), 5)


class TestGate:
    def test_a_refusal_is_exit_3_and_its_decision_is_written(self, salun, world, tmp_path):
        policy = {"name": "strict", "rules": [{"metric": "RA", "op": ">=", "value": 1.1, "reason": "more than all"}]}
        (tmp_path / "policy.yaml").write_text(json.dumps(policy))
        result = salun("gate", "--evidence", world.evidence_json, "--policy", "policy.yaml", "--out", "decision.json")
        assert result.exit_code == 3
        assert "- more than all (RA " in result.stdout
        assert (result.stdout + result.stderr).count("more than all") == 1
        assert "Cause: the model lost what it had to keep (damaged)" in result.stdout
        assert "next: search for a setting that passes: --tune" in result.stdout
        assert "the decision is in decision.json" in result.stderr
        assert json.loads((tmp_path / "decision.json").read_text())["passed"] is False
        assert "REFUSED" in result.stdout

    def test_an_evaluation_says_that_the_gate_would_refuse(self, salun, world):
        paths = ("--before", world.base, "--after", world.base, "--out", "e.json", "--report", "r.html")
        result = salun("evaluate", *paths, "--forget", world.forget_json)
        assert result.exit_code == 0, result.stderr
        assert "the policy classifier would refuse this model:" in result.stdout
        assert "- the model did not change (model changed: required > 0 weights)." in result.stdout
        assert "(not_forgotten)" in result.stdout

    def test_evidence_of_another_model_is_refused(self, salun, world, tmp_path):
        result = salun("gate", "--evidence", world.evidence_json, "--after", world.base, "--out", "decision.json")
        assert result.exit_code == 3
        assert "measured on another after" in result.stdout
        assert "the gate refused the model: 1 of " in result.stderr

    def test_a_refused_run_leaves_the_line_alone(self, salun, world, store, tmp_path):
        from salun_core.registry.lookup import read_head
        from salun_core.tasks import register_model

        version = register_model(store, "digits", world.base, "import", 1)
        settings = ("--set", "model_line=digits", "--set", f"forget_manifest_uri={world.forget_json}")
        nothing = ("--set", "method=finetune", "--set", "method_config={epochs: 1, learning_rate: 1.0e-9}")
        result = salun("run", *settings, *nothing, "--store", store.uri, "--work-dir", "work")
        assert result.exit_code == 3, result.stderr
        assert read_head(store, "digits")[0].version == version
        decision = load(GateDecision, tmp_path / "work" / "decision.json")
        assert not decision.passed
        assert "UA_class" in result.stdout.split("REFUSED by policy classifier")[0]  # the table of metrics
        for refusal in decision.refusals:
            assert (result.stdout + result.stderr).count(refusal.text) == 1
        assert f"next: {decision.next}" in result.stdout
        assert "decision  work/decision.json" in result.stdout
        assert f"Error: the gate refused the model: {decision.counts}." in result.stderr
        assert "the decision is in work/decision.json; nothing was published" in result.stderr


class TestStore:
    @pytest.fixture
    def line(self, world, store):
        from salun_core.tasks import register_model

        register_model(store, "digits", world.base, "import", 1)
        return store

    @pytest.mark.usefixtures("untouched")
    def test_a_store_that_is_down(self, salun, world, s3_server, monkeypatch):
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        args = ("--model", "digits", "--store", "s3://salun", "--forget", world.forget_json, "--out", "m")
        assert "no answer from http://127.0.0.1:9" in one_line(salun("mask", *args), 1)

    @pytest.mark.usefixtures("untouched")
    @pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_credentials(self, salun, world, real_store, monkeypatch, name):
        monkeypatch.setenv(name, "wrong")
        args = ("--model", "digits", "--store", real_store.uri, "--forget", world.forget_json, "--out", "m")
        assert "AWS_SECRET_ACCESS_KEY" in one_line(salun("mask", *args), 1)

    def test_doctor_says_that_the_store_is_down(self, salun, s3_server, monkeypatch):
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        result = salun("doctor", "--store", "s3://salun")
        assert result.exit_code == 1
        assert "failed: store" in result.stdout

    @pytest.mark.usefixtures("untouched")
    def test_no_store_is_named(self, salun, world):
        args = ("--model", "digits", "--forget", world.forget_json, "--out", "m")
        assert "SALUN_STORE_URI" in one_line(salun("mask", *args), 2)

    @pytest.mark.usefixtures("untouched")
    def test_a_line_with_a_typo(self, salun, line):
        assert "did you mean 'digits'?" in one_line(salun("model", "history", "digts", "--store", line.uri), 2)

    @pytest.mark.usefixtures("untouched")
    def test_a_line_that_exists_is_not_begun_again(self, salun, line):
        args = ("--data", "digits", "--arch", "resnet8", "--out", "new", "--line", "digits", "--store", line.uri)
        assert "exists already" in one_line(salun("train", *args), 4)

    def test_a_head_that_moved_is_exit_4(self, salun, world, line, monkeypatch):
        """While a run evaluates, another publishes; the run must not publish over it."""
        from salun_core.registry.lookup import read_head
        from salun_core.registry.versions import publish
        from salun_core.steps import run as steps

        def overtaken(*args, **kwargs):
            parent = read_head(line, "digits")[0].version
            fields = {"line": "digits", "parent": parent, "method": "salun"}
            publish(line, fields, {"model.safetensors": world.after / "model.safetensors"})
            return original(*args, **kwargs)

        original = steps.evaluate
        monkeypatch.setattr(steps, "evaluate", overtaken)
        settings = ("--set", "model_line=digits", "--set", f"forget_manifest_uri={world.forget_json}")
        result = salun("run", *settings, "--store", line.uri)
        assert result.exit_code == 4
        assert "stale parent" in result.stderr
        assert read_head(line, "digits")[0].sequence == 2


@pytest.fixture
def small_disk(tmp_path_factory):
    """A disk of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path_factory.mktemp("small")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "salun-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("untouched")
class TestFullDisk:
    @pytest.fixture(autouse=True)
    def _filled(self, small_disk):
        (small_disk / "filler").write_bytes(b"x" * 60 * 1024)
        yield
        assert [path.name for path in small_disk.iterdir()] == ["filler"]

    def test_a_mask(self, salun, world, small_disk):
        args = ("--model", world.base, "--forget", world.forget_json, "--out", small_disk / "m.st")
        assert "No space left on device" in one_line(salun("mask", *args), 1)

    def test_a_model(self, salun, world, small_disk):
        args = ("--model", world.base, "--forget", world.forget_json, "--method", "finetune", "--set", "epochs=1")
        result = salun("unlearn", *args, "--out", small_disk / "new")
        assert result.exit_code == 1
        assert "No space left on device" in result.stderr.splitlines()[-1]

    def test_evidence(self, salun, world, small_disk):
        args = ("--before", world.base, "--after", world.after, "--forget", world.forget_json)
        out = ("--out", small_disk / "e.json", "--report", small_disk / "r.html")
        assert "No space left on device" in one_line(salun("evaluate", *args, *out), 1)

    def test_a_report(self, salun, world, small_disk):
        args = ("--evidence", world.evidence_json, "--out", small_disk / "r.html")
        assert "No space left on device" in one_line(salun("report", *args), 1)


def test_an_internal_error_is_one_line(salun, monkeypatch):
    from salun_core import doctor as checks

    monkeypatch.setattr(checks, "run_checks", lambda *args: 1 / 0)
    result = salun("doctor")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: internal error (ZeroDivisionError: division by zero)")
    assert "--debug" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_is_exit_130(salun, monkeypatch):
    from salun_core import doctor as checks

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "run_checks", interrupted)
    assert salun("doctor").exit_code == 130
