"""`salun model export`: files that other programs read without salun, with what they need to feed the model."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import tempfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from salun_core.errors import ModelError, StoreError, StoreUnreachableError, UsageError
from salun_core.models import load_model
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import save_model
from salun_core.models.export import ONNX_PACKAGES, export_model
from salun_core.storage.s3 import S3Store
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test
from tests.support.folder_model import contents, write_folder

MISSING = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
NEEDS_ONNX = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; the extra `export` has them"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of an untrained ResNet-8 for three classes of colour images."""
    from salun_core.data import DataSpec
    from salun_core.data.split import SplitManifest
    from salun_core.models import build_classifier

    torch.manual_seed(0)
    split = SplitManifest(dataset_digest="0" * 64, train={}, validation={}, test={})
    card = ModelCard(
        architecture="resnet8",
        classes=["cat", "dog", "élan"],
        channels=3,
        height=16,
        width=16,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.2, 0.3],
        data=DataSpec(source="photos"),
        dataset_digest="0" * 64,
        split_digest=split.digest,
    )
    path = tmp_path_factory.mktemp("export") / "model"
    save_model(path, build_classifier("resnet8", 3, 3, 16), card, split)
    return path


def pixels():
    return torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def logits(folder):
    model = load_model(folder)
    with torch.no_grad():
        return model.model(model.normalisation.apply(pixels()))


def fed(facts):
    """Feed the pixels as the file says, without salun."""
    mean, std = (torch.tensor(facts[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (pixels().float() * facts["scale"] - mean) / std


def test_the_torch_file_holds_plain_values_and_the_same_network(folder, tmp_path):
    from salun_core.models import build_classifier

    export_model(folder, "torch", tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert found["classes"] == ["cat", "dog", "élan"]
    assert found["preprocessing"]["size"] == [16, 16]
    network = build_classifier(found["architecture"], len(found["classes"]), 3, 16).eval()
    network.load_state_dict(found["state_dict"])
    with torch.no_grad():
        assert torch.allclose(network(fed(found["preprocessing"])), logits(folder), atol=1e-4)


def test_the_safetensors_file_has_its_facts_as_metadata(folder, tmp_path):
    export_model(folder, "safetensors", tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["classes"]) == ["cat", "dog", "élan"]
    assert json.loads(facts["preprocessing"])["mean"] == [0.5, 0.4, 0.3]
    expected = load_model(folder).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "m.safetensors").items())


def test_the_exported_program_runs_without_salun_for_any_batch(folder, tmp_path):
    done = export_model(folder, "torch-export", tmp_path / "m.pt2")
    assert done["largest_difference"] < 1e-3
    extra = {"salun.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    facts = json.loads(extra["salun.json"])
    assert facts["classes"] == ["cat", "dog", "élan"]
    with torch.no_grad():
        assert torch.allclose(program(fed(facts["preprocessing"])), logits(folder), atol=1e-4)
        assert program(fed(facts["preprocessing"])[:1]).shape == (1, 3)


@NEEDS_ONNX
def test_the_onnx_file_gives_the_same_logits_in_onnxruntime(folder, tmp_path, recwarn):
    import onnxruntime

    done = export_model(folder, "onnx", tmp_path / "m.onnx")
    assert [warning for warning in recwarn if warning.category is FutureWarning] == []
    assert done["largest_difference"] < 1e-3
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["cat", "dog", "élan"]
    images = fed(json.loads(facts["preprocessing"])).numpy()
    found = torch.from_numpy(session.run(None, {"image": images})[0])
    assert torch.allclose(found, logits(folder), atol=1e-3)


def test_onnx_without_its_packages_names_the_command(folder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ONNX_PACKAGES else find(name))
    refused = invoke("model", "export", folder, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "pip install 'salun[export]'" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_computes_something_else_is_not_written(folder, tmp_path, monkeypatch):
    load = torch.export.load

    def other(source):
        program = load(source)
        with torch.no_grad():
            program.state_dict["fc.bias"].add_(1.0)
        return program

    monkeypatch.setattr(torch.export, "load", other)
    with pytest.raises(ModelError, match="computes something else"):
        export_model(folder, "torch-export", tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_diffusion_folder_is_exported_without_split_and_evidence(tmp_path):
    write_folder(tmp_path / "model")
    card = {"task": "text-to-image", "classes": ["cat"], "prompt": "a {label}", "channels": 3, "height": 8, "width": 8}
    (tmp_path / "model" / "model.json").write_text(json.dumps(card))
    export_model(tmp_path / "model", "diffusers", tmp_path / "out")
    found, made = contents(tmp_path / "out"), contents(tmp_path / "model")
    assert json.loads(found.pop("salun.json"))["classes"] == ["cat"]
    assert found == {name: data for name, data in made.items() if name not in {"split.parquet", "model.json"}}
    with pytest.raises(UsageError, match="choose: diffusers"):
        export_model(tmp_path / "model", "onnx", tmp_path / "m.onnx")


def test_a_wrong_format_and_a_folder_without_a_model_are_one_line(folder, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'safetensors'"):
        export_model(folder, "safetensor", tmp_path / "m")
    with pytest.raises(UsageError, match="cannot be exported to diffusers"):
        export_model(folder, "diffusers", tmp_path / "m")
    (tmp_path / "empty").mkdir()
    refused = invoke("model", "export", tmp_path / "empty", "--to", "torch", "--out", tmp_path / "m")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    refused = invoke("model", "export", "no-such-line", "--to", "torch", "--out", tmp_path / "m", "--store", "")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_timm_builds_the_folder_that_was_written_for_it(tmp_path, folder):
    import timm

    from salun_core.data import DataSpec
    from salun_core.data.split import SplitManifest
    from salun_core.models import build_classifier

    split = SplitManifest(dataset_digest="0" * 64, train={}, validation={}, test={})
    own = load_model(folder).card
    card = own.model_copy(update={"architecture": "timm:resnet10t", "data": DataSpec(source="photos")})
    save_model(tmp_path / "model", build_classifier("timm:resnet10t", 3, 3, 16), card, split)
    written = invoke("model", "export", tmp_path / "model", "--to", "timm", "--out", tmp_path / "t")
    assert written.exit_code == 0
    assert sorted(os.listdir(tmp_path / "t")) == ["config.json", "model.safetensors"]
    network = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    model = load_model(tmp_path / "model")
    images = model.normalisation.apply(pixels())
    with torch.no_grad():
        torch.testing.assert_close(network(images), model.model(images))
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["label_names"] == card.classes
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["input_size"]) == (card.mean, [3, 16, 16])
    refused = invoke("model", "export", folder, "--to", "timm", "--out", tmp_path / "other")
    assert (refused.exit_code, (tmp_path / "other").exists()) == (2, False)
    assert "timm does not have this architecture" in refused.stderr


def test_a_full_disk_keeps_the_old_file(folder, tmp_path):
    (tmp_path / "m.pt").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StoreError, match="free some space"):
            export_model(folder, "torch", tmp_path / "m.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(name, (tmp_path / name).read_bytes()) for name in os.listdir(tmp_path)] == [("m.pt", b"old")]


@pytest.fixture
def line(store, folder, tmp_path, monkeypatch):
    """The address of a store whose line `photos` has the model; temporary files are in the test's own folder."""
    from salun_core.registry.versions import publish

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    publish(store, {"line": "photos", "method": "import"}, {path.name: path for path in folder.iterdir()})
    return store.uri


def test_a_lost_connection_leaves_nothing(line, tmp_path, monkeypatch):
    def lost(*_args, **_options):
        raise StoreUnreachableError("cannot download x", "no answer", "check the network")

    monkeypatch.setattr(S3Store, "download", lost)
    refused = invoke("model", "export", "photos", "--to", "torch", "--out", tmp_path / "m.pt", "--store", line)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "no answer" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["torch", pytest.param("onnx", marks=NEEDS_ONNX)])
def test_a_full_disk_of_temporary_files_is_named(line, folder, tmp_path, to):
    source = ("photos", "--store", line) if to == "torch" else (folder,)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        refused = invoke("model", "export", *source, "--to", to, "--out", tmp_path / "m.file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path}: File too large. To fix it: free some space there, or set TMPDIR" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_not_exported(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(io.BytesIO(b"cut").read())
    refused = invoke("model", "export", tmp_path / "model", "--to", "torch", "--out", tmp_path / "m.pt")
    assert refused.exit_code == 5
    assert "salun model pull LINE --out DIR" in refused.stderr
    assert not (tmp_path / "m.pt").exists()
