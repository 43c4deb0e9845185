"""Offloading changes where tensors are, and no bit of them."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from salun_core.device_memory import LiveBytes, TrainingMemory
from salun_core.errors import StoreError
from salun_core.methods.diffusion import diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.saliency import denoising_scores
from salun_core.methods.offload import OffloadedOptimizer, Shelf, offloaded, put_away
from salun_core.saliency import SaliencyMask, masked_optimizer
from tests.support.tiny_diffusion import LENGTH, WIDTH, lab, shapes_of

OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=0.1, weight_decay=0.1),
    "adamw": lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.1),
}
QUICK = {"steps": 4, "epochs": 2, "batch_size": 4, "device": "cpu"}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return model.to(memory_format=torch.channels_last)


def trained(name, place, steps=3, state=None):
    model = network()
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    optimizer = masked_optimizer(OPTIMIZERS[name](model.parameters()), model, SaliencyMask.random(shapes, 0.3, 7))
    optimizer = offloaded(optimizer, place)
    if state:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6, generator=generator)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def bits(state):
    return [(key, name, value) for key, entries in state["state"].items() for name, value in entries.items()]


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_state_have_the_same_bits_as_without(name, place):
    (plain, reference), (model, optimizer) = trained(name, "none"), trained(name, place)
    assert isinstance(optimizer, OffloadedOptimizer)
    assert not optimizer.state
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted, found)
    wanted, found = reference.state_dict(), optimizer.state_dict()
    assert wanted["param_groups"] == found["param_groups"]
    for one, other in zip(bits(wanted), bits(found), strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2]) if isinstance(one[2], torch.Tensor) else one[2] == other[2]
        assert not isinstance(one[2], torch.Tensor) or one[2].stride() == other[2].stride()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_loaded_state_goes_on_where_it_was(place):
    model, optimizer = trained("adamw", place)
    state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    again, _ = trained("adamw", place, 2, state)
    wanted, _ = trained("adamw", "none", 2, state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shelf_on_disk_returns_bits_and_layout_and_writes_in_place(dtype):
    shelf, cpu = Shelf("disk"), torch.device("cpu")
    first = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    second, empty = torch.randn(7).to(dtype), torch.empty(0, dtype=dtype)
    for _ in range(2):
        for key, value in (("first", first), ("second", second), ("empty", empty)):
            shelf.put(key, value)
    assert os.fstat(shelf._file).st_size == first.nbytes + second.nbytes
    for key, value in (("first", first), ("second", second), ("empty", empty)):
        found = shelf.get(key, cpu)
        assert torch.equal(found, value)
        assert found.stride() == value.stride()


def test_a_file_that_was_cut_is_an_error():
    shelf = Shelf("disk")
    shelf.put("weights", torch.ones(100))
    os.ftruncate(shelf._file, 40)
    with pytest.raises(StoreError, match="ends early"):
        shelf.get("weights", torch.device("cpu"))


def test_a_folder_that_cannot_be_written_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(StoreError, match="TMPDIR"):
        Shelf("disk")


@pytest.mark.parametrize("place", ["none", "cpu", "disk"])
def test_weights_that_were_put_away_come_back_after_an_error(place):
    model, wanted = network(), network()
    left = []

    def fail():
        with put_away(model, place):
            left.append(sum(value.numel() for value in model.parameters()))
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert left == [271 if place == "none" else 0]
    for found, value in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, value)
        assert found.stride() == value.stride()


@pytest.fixture(scope="module")
def text():
    pytest.importorskip("diffusers")
    denoiser, sets = lab("text")
    return denoiser, sets, SaliencyMask.random(shapes_of(denoiser), 0.5, 3)


def run(text, **changes):
    denoiser, sets, mask = text
    return unlearn_denoiser(denoiser, sets, "salun", config={**QUICK, **changes}, mask=mask).model


@pytest.mark.parametrize("changes", [{"offload": "cpu"}, {"offload": "disk", "gradient_checkpointing": True}])
def test_a_denoiser_forgets_with_the_same_bits_and_the_original_comes_back(text, changes):
    denoiser, _, mask = text
    before = copy.deepcopy(denoiser.network.state_dict())
    wanted, found = run(text).state_dict(), dict(run(text, **changes).named_parameters())
    for name, value in denoiser.network.named_parameters():
        assert torch.equal(value, before[name]), name
        assert torch.equal(found[name], wanted[name]), name
        frozen = ~mask.tensor(name)
        assert torch.equal(found[name][frozen].view(torch.int32), value[frozen].view(torch.int32)), name
        assert found[name].grad is None


def test_scores_have_the_same_bits_with_gradient_checkpointing(text):
    denoiser, sets, _ = text
    plain, again = (
        denoising_scores(denoiser, sets, diffusion_config("salun", {"gradient_checkpointing": on, "batch_size": 4}))
        for on in (False, True)
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not denoiser.network.is_gradient_checkpointing


def denoising(network, count):
    noisy, times = torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64)
    return network(noisy, times, torch.zeros(count, LENGTH, WIDTH), return_dict=False)[0].square().mean()


@pytest.fixture(scope="module")
def memory(text):
    return TrainingMemory.of(text[0].network, denoising, "float32")


@pytest.mark.parametrize("changes", [{}, {"offload": "disk"}])
def test_the_memory_of_a_run_is_as_predicted(text, memory, changes):
    predicted = memory.step(2 * QUICK["batch_size"], "adam", offload="offload" in changes)
    with LiveBytes(text[0].network.parameters()) as counted:
        run(text, **changes)
    original = 0 if "offload" in changes else 4 * memory.parameters  # it was there before
    assert predicted == pytest.approx(counted.peak + original, rel=0.15)
