"""Foreign checkpoints: tensors come in, code does not."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from salun_core.errors import ModelError, SalunError, UsageError
from salun_core.models.importing import read_checkpoint, read_class_names

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

STATE = {"conv.weight": torch.randn(2, 3), "conv.bias": torch.ones(2, dtype=torch.bfloat16)}


def prefixed(prefix, state=STATE):
    return {f"{prefix}{name}": value for name, value in state.items()}


def same(found, expected=STATE):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(tmp_path, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path).state)


def test_safetensors_are_read(tmp_path):
    save_file(prefixed("module."), tmp_path / "model.safetensors")
    assert same(read_checkpoint(tmp_path / "model.safetensors").state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "args": ["a", 1.0]},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"net": state, "acc": 93.1},
    ],
)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."]
)
def test_wrappers_and_shared_prefixes_are_removed(tmp_path, wrap, prefix):
    torch.save(wrap(prefixed(prefix, {"w": torch.ones(2), "b": torch.zeros(1)})), tmp_path / "m.pt")
    assert set(read_checkpoint(tmp_path / "m.pt").state) == {"w", "b"}


def test_a_prefix_that_is_not_shared_stays(tmp_path):
    torch.save({"module.w": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "m.pt")
    assert set(read_checkpoint(tmp_path / "m.pt").state) == {"module.w", "b"}


class Trap:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("nested", [lambda trap: trap, lambda trap: {"state_dict": {**STATE, "x": trap}}])
@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_runs_no_code(tmp_path, nested, write):
    document, path = nested(Trap(f"touch {tmp_path}/escaped")), tmp_path / "m.pt"
    if write == "pickle":
        path.write_bytes(pickle.dumps(document))
    else:
        torch.save(document, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ModelError, match="more than tensors"):
        read_checkpoint(path)
    assert not (tmp_path / "escaped").exists()
    if write == "pickle":  # the trap is a real one
        pickle.loads(path.read_bytes())
        assert (tmp_path / "escaped").exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"save only its state_dict"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({}, "holds no state_dict"),
        ([torch.ones(2)], "it is a list"),
        (torch.ones(2), "it is a Tensor"),
        ({"w": torch.ones(2), "epoch": 3}, "such as 'epoch'"),
        ({"state_dict": {"w": [1, 2]}}, "such as 'w'"),
    ],
)
def test_files_with_something_else_are_refused(tmp_path, document, why):
    torch.save(document, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=why):
        read_checkpoint(tmp_path / "m.pt")


def test_paths_that_are_not_checkpoints_are_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert read_checkpoint(tmp_path / "empty.safetensors").state == {}
    with pytest.raises(UsageError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UsageError, match=r"its suffix is '\.h5'"):
        read_checkpoint(tmp_path / "m.h5")
    with pytest.raises(UsageError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_give_only_salun_errors(tmp_path, zipped):
    path = tmp_path / "m.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            read_checkpoint(path)
        except SalunError:
            refused += 1
    assert refused > 50


def test_an_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("../../escaped", "x")
    with pytest.raises(ModelError):
        read_checkpoint(tmp_path / "m.pt")


def test_a_small_archive_that_unpacks_to_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    plain, path = tmp_path / "plain.pt", tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(torch, "load", None)  # it must not come that far
    with pytest.raises(ModelError, match=r"bytes would unpack to 4,000,\d+, and torch.save does not compress"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_repeat_one_value_are_refused(tmp_path, zipped):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="its tensors would take 4,398,046,511,104 bytes"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".th", ".bin"])
def test_empty_and_cut_files_are_named_as_such(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    path.touch()
    with pytest.raises(ModelError, match="the file is empty"):
        read_checkpoint(path)
    whole = tmp_path / f"whole{suffix}"
    save_file(STATE, whole) if suffix == ".safetensors" else torch.save(STATE, whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(SalunError, match="damaged"):
        read_checkpoint(path)


def test_the_advice_for_a_hostile_file_is_not_to_run_it(tmp_path):
    torch.save({"x": Trap("true")}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"more than tensors: \w+\.system, which was not run") as caught:
        read_checkpoint(tmp_path / "m.pt")
    assert "weights_only" not in str(caught.value)


def test_a_file_with_several_models_is_read_by_key(tmp_path):
    path, other = tmp_path / "m.pt", {name: value + 1 for name, value in STATE.items()}
    torch.save({"model": STATE, "model_ema": other, "epoch": 3}, path)
    with pytest.raises(ModelError, match="several models: under model and model_ema"):
        read_checkpoint(path)
    assert same(read_checkpoint(path, "model_ema").state, other)
    with pytest.raises(UsageError, match=r"no key 'emas' with tensors: it has model, model_ema, epoch"):
        read_checkpoint(path, "emas")
    torch.save({"ema": {"state_dict": STATE}, "optimizer": {"state": {}}}, path)
    assert read_checkpoint(path).wrapper == "ema.state_dict"


def test_a_folder_is_read_by_its_only_file_of_weights(tmp_path):
    with pytest.raises(UsageError, match="holds no model: it has neither a checkpoint"):
        read_checkpoint(tmp_path)
    torch.save(STATE, tmp_path / "last.ckpt")
    assert same(read_checkpoint(tmp_path).state)
    torch.save(STATE, tmp_path / "best.ckpt")
    with pytest.raises(UsageError, match=r"holds 2 checkpoints: best\.ckpt, last\.ckpt"):
        read_checkpoint(tmp_path)
    torch.save(prefixed("net."), tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).prefix == "net."


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("c.txt", "dog\n\n cat \n", ["dog", "cat"]),
        ("c.json", '["dog", "cat"]', ["dog", "cat"]),
        ("c.json", '{"id2label": {"1": "cat", "0": "dog"}}', ["dog", "cat"]),
        ("c.json", '{"10": "k", "2": "c", "0": "a"}', ["a", "c", "k"]),
    ],
)
def test_class_names_are_read_in_the_order_of_their_ids(tmp_path, name, text, names):
    (tmp_path / name).write_text(text)
    assert read_class_names(str(tmp_path / name)) == names
    assert read_class_names(", ".join(names)) == names


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("c.txt", b"dog\ndog\n", "a name occurs twice"),
        ("c.txt", b"", "it is empty"),
        ("c.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("c.json", b'{"a": "b"}', "not a list of names"),
        ("c.json", b"{", "c.json"),
    ],
)
def test_faulty_class_names_are_refused(tmp_path, name, data, why):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SalunError, match=why):
        read_class_names(str(tmp_path / name))
