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
from salun_core.models.importing import read_checkpoint

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
