"""Real SIGKILLs in mid-training: what is resumed ends in the same bits as what was never broken."""

import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.errors import ConflictError, IntegrityError, StoreError
from salun_core.methods.checkpoint import _digest as checkpoint_digest
from salun_core.methods.classification import FileCheckpoint, unlearn
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask

STEPS_AN_EPOCH = {"salun": 5, "random_label": 5, "finetune": 4, "retrain": 4}


class Net(nn.Module):
    """Convolutions in channels-last layout, batch norm, dropout; counts its training steps."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, stride=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 4)
        self.die_at = None
        self.steps = 0

    def forward(self, images):
        if self.training:
            self.steps += 1
            if self.steps == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        hidden = self.conv2(torch.relu(self.norm(self.conv1(images))))
        return self.head(self.drop(torch.relu(hidden).mean(dim=(2, 3))))


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 9, 9), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    ids = [f"{seed}-{index}" for index in range(count)]
    return ImageSet(pixels, labels, Normalisation((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)), "crop-flip", ids)


def start(method, checkpoint=None, die_at=None, on_epoch=None, **config):
    torch.manual_seed(0)
    model = Net()
    mask = SaliencyMask.random({name: p.shape for name, p in model.named_parameters()}, 0.5, 0)
    model.die_at = die_at
    settings = {
        "epochs": 4,
        "batch_size": 8,
        "batch_norm": "update",
        "learning_rate": 0.02,
        "schedule": "cosine",
        "device": "cpu",
        **config,
    }
    return unlearn(
        model,
        method,
        forget=images(8, 1),
        retain=images(30, 2),
        config=settings,
        mask=mask if method == "salun" else None,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )


class DyingStore(FileCheckpoint):
    """Dies at the n-th save, before or after the file is there."""

    count = 0

    def save(self, data):
        type(self).count += 1
        if type(self).count == 2:
            (self.path.parent / ".checkpoint-half").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().save(data)


def killed(target, *args):
    """Run in a process of its own, which must die of SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def break_off(method, path, die_at, config):
    torch.set_num_threads(1)
    start(method, FileCheckpoint(path), die_at, **config)


def break_off_in_save(method, path, config):
    torch.set_num_threads(1)
    start(method, DyingStore(path), **config)


CASES = [
    ("salun", {}),
    ("salun", {"optimizer": "adamw", "learning_rate": 0.002}),
    ("random_label", {"order": "mixed", "nesterov": True}),
    ("finetune", {"optimizer": "adam", "learning_rate": 0.002, "gradient_clip": 1.0}),
    ("finetune", {"momentum": 0.0}),
    ("retrain", {"learning_rate": 0.05}),
]


@pytest.mark.parametrize(("method", "config"), CASES)
def test_a_killed_run_ends_in_the_same_bits(tmp_path, method, config):
    whole = start(method, **config)
    path = tmp_path / "state.safetensors"
    for kill, step in enumerate((2, 7, 6, 3)):  # steps of the process that dies; each goes on from the last checkpoint
        killed(break_off, method, path, step, config)
        assert path.exists() == (kill > 0)
    fresh = []
    resumed = start(method, FileCheckpoint(path), on_epoch=fresh.append, **config)
    assert 0 < len(fresh) < 4
    assert [record.epoch for record in resumed.history] == [1, 2, 3, 4]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert model_digest(resumed.model) == model_digest(whole.model)
    assert [r.losses for r in resumed.history] == [r.losses for r in whole.history]


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path):
    whole = start("salun")
    path = tmp_path / "state.safetensors"
    killed(break_off_in_save, "salun", path, {})
    resumed = start("salun", FileCheckpoint(path))
    assert model_digest(resumed.model) == model_digest(whole.model)


def test_a_finished_run_is_not_repeated(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    first, fresh = start("salun", store), []
    again = start("salun", store, on_epoch=fresh.append)
    assert fresh == []
    assert model_digest(again.model) == model_digest(first.model)
    assert again.history == first.history


@pytest.mark.parametrize(
    "config", [{"seed": 1}, {"epochs": 5}, {"learning_rate": 0.03}, {"order": "mixed"}, {"optimizer": "adam"}]
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, config):
    store = FileCheckpoint(tmp_path / "state")
    start("salun", store)
    with pytest.raises(ConflictError, match="another run") as caught:
        start("salun", store, **config)
    assert caught.value.exit_code == 4


def test_a_checkpoint_of_another_method_model_mask_or_data_is_refused(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    given = dict(forget=images(8, 1), retain=images(30, 2))
    settings = {"epochs": 1, "device": "cpu"}
    torch.manual_seed(0)
    model = Net()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    mask = SaliencyMask.random(shapes, 0.5, 0)

    def go(model=model, method="salun", mask=mask, **sets):
        return unlearn(model, method, **{**given, **sets}, config=settings, mask=mask, checkpoint=store)

    go()
    go()  # the same again is welcome
    plain = [ImageSet(item.images, item.labels, item.normalisation, item.augment) for item in given.values()]
    others = [
        {"model": Net()},
        {"mask": SaliencyMask.random(shapes, 0.5, 1)},
        {"method": "random_label", "mask": None},
        {"forget": images(8, 3)},
        {"retain": images(31, 2)},
        {"retain": given["retain"].select(range(29, -1, -1))},
        {"forget": plain[0]},
    ]
    for other in others:
        with pytest.raises(ConflictError):
            go(**other)


def test_without_ids_the_pixels_identify_a_run(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    labels = torch.arange(8) % 4
    first, second = (torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.manual_seed(0)
    model = Net()
    settings = {"epochs": 1, "device": "cpu"}
    unlearn(model, "finetune", forget=(first, labels), retain=(first, labels), config=settings, checkpoint=store)
    with pytest.raises(ConflictError):
        unlearn(model, "finetune", forget=(first, labels), retain=(second, labels), config=settings, checkpoint=store)


def damaged_forms(data):
    yield "empty", b""
    yield "text", b"not a checkpoint"
    yield "half", data[: len(data) // 2]
    yield "longer", data + b"\0"
    yield "other tensors", save({"x": torch.zeros(3)})
    step = max(1, len(data) // 150)
    for place in range(0, len(data), step):
        yield f"byte {place}", data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def test_damaged_checkpoints_are_refused(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    start("salun", store, epochs=1)
    data = store.load()
    for form, bad in damaged_forms(data):
        store.path.write_bytes(bad)
        with pytest.raises(IntegrityError) as caught:
            start("salun", store, epochs=1)
        assert caught.value.exit_code == 5, form
    store.path.write_bytes(data)
    start("salun", store, epochs=1)


def test_a_checkpoint_without_its_digest_is_refused(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    start("salun", store, epochs=1)
    tensors = load(store.load())
    del tensors["digest"]
    store.path.write_bytes(save(tensors))
    with pytest.raises(IntegrityError):
        start("salun", store, epochs=1)


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        start("finetune", FileCheckpoint(tmp_path / "file" / "state"), epochs=1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        FileCheckpoint(tmp_path / "folder").save(b"x")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    start("salun", store, epochs=1)
    tensors = load(store.load())
    header = bytes(tensors["header"].numpy()).replace(b"salun.checkpoint/v1", b"salun.checkpoint/v9")
    tensors["header"] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    del tensors["digest"]
    store.path.write_bytes(save({**tensors, "digest": checkpoint_digest(tensors)}))
    with pytest.raises(IntegrityError, match="another format"):
        start("salun", store, epochs=1)
