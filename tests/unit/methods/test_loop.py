"""The loop: batch norm, schedules, clipping, precision, divergence."""

import math

import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import ModelError
from salun_core.methods.classification import FileCheckpoint, UnlearnConfig, unlearn
from salun_core.methods.classification.training import train_classifier
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        self.flat = nn.BatchNorm1d(4)
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, self.norm.training, len(images)))
        return self.head(self.flat(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))))


def sets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (10, 26)
    ]


def run(method="finetune", **config):
    torch.manual_seed(0)
    model = Net()
    extra = {key: config.pop(key) for key in ("mask", "checkpoint", "on_epoch") if key in config}
    forget, retain = sets()
    settings = {"epochs": 2, "batch_size": 8, "device": "cpu", "augment": False, **config}
    return model, unlearn(model, method, forget=forget, retain=retain, config=settings, **extra)


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def test_frozen_batch_norm_keeps_its_statistics_bit_for_bit():
    model, result = run(batch_norm="freeze")
    assert all(torch.equal(value, buffers(result.model)[name]) for name, value in buffers(model).items())
    assert not torch.equal(model.norm.weight, result.model.norm.weight)  # its scale is a weight and learns
    assert {(training, norm) for training, norm, _ in result.model.seen[1:]} == {(True, False)}


def test_updated_batch_norm_follows_the_data():
    model, result = run(batch_norm="update")
    before, after = buffers(model), buffers(result.model)
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert not torch.equal(before["flat.running_var"], after["flat.running_var"])
    assert int(after["norm.num_batches_tracked"]) == 2 * math.ceil(26 / 8)


def test_a_mask_does_not_stop_updates_of_statistics():
    torch.manual_seed(0)
    shapes = {name: p.shape for name, p in Net().named_parameters()}
    mask = SaliencyMask.random(shapes, 0.3, 0)
    for policy, moved in (("freeze", False), ("update", True)):
        model, result = run("salun", mask=mask, batch_norm=policy)
        assert torch.equal(model.norm.running_mean, result.model.norm.running_mean) != moved
        for name, parameter in result.model.named_parameters():
            old = dict(model.named_parameters())[name].detach().view(torch.int32)
            assert torch.equal(parameter.detach().view(torch.int32)[~mask.tensor(name)], old[~mask.tensor(name)])


def test_every_image_is_seen_once_an_epoch():
    _, result = run(epochs=3)
    assert [size for _, _, size in result.model.seen[1:]] == [8, 8, 8, 2] * 3
    assert result.passes == 78


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("constant", 0.0, 1.0),
        ("constant", 0.99, 1.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
        ("step", 0.0, 1.0),
        ("step", 0.4999, 1.0),
        ("step", 0.5, 0.1),
        ("step", 0.75, 0.01),
        ("step", 1.0, 0.01),
    ],
)
def test_learning_rates(schedule, progress, factor):
    assert UnlearnConfig(learning_rate=0.2, schedule=schedule).rate_at(progress) == pytest.approx(0.2 * factor)


def test_history_holds_the_learning_rate_at_the_start_of_each_epoch():
    _, result = run(epochs=4, schedule="step", learning_rate=0.1)
    assert [record.learning_rate for record in result.history] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert [record.epoch for record in result.history] == [1, 2, 3, 4]


def test_the_callback_gets_each_epoch():
    seen = []
    _, result = run(on_epoch=seen.append)
    assert seen == result.history


def test_a_clipped_gradient_moves_weights_by_no_more_than_its_norm():
    model, result = run(epochs=1, batch_size=64, momentum=0, weight_decay=0, learning_rate=1.0, gradient_clip=1e-3)
    moved = torch.cat(
        [(new - old).detach().flatten() for old, new in zip(model.parameters(), result.model.parameters(), strict=True)]
    )
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_forward_passes_leave_float32_weights():
    _, plain = run()
    _, result = run(precision="bf16")
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert model_digest(result.model) != model_digest(plain.model)
    for left, right in zip(result.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("optimizer", "nesterov"), [("sgd", True), ("adam", False), ("adamw", False)])
def test_optimisers_learn(optimizer, nesterov):
    _, result = run(optimizer=optimizer, nesterov=nesterov, epochs=6, learning_rate=0.02)
    assert result.history[-1].losses["retain"] < result.history[0].losses["retain"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    kept = []
    with pytest.raises(ModelError, match="not finite"):
        run(
            "gradient_ascent",
            epochs=400,
            learning_rate=1e4,
            checkpoint=store,
            on_epoch=lambda record: kept.append(store.load()),
        )
    assert kept
    assert store.load() == kept[-1]
    from safetensors.torch import load

    state = load(kept[-1])
    assert all(bool(torch.isfinite(v).all()) for name, v in state.items() if name.startswith("model/"))


def test_weights_that_are_not_finite_after_the_last_step_stop_the_run(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    with pytest.raises(ModelError, match="weight is not finite"):
        run(epochs=1, batch_size=64, learning_rate=1e6, weight_decay=3e38, checkpoint=store)
    assert store.load() is None


def test_training_starts_from_the_seed_and_resumes(tmp_path):
    images = ImageSet.of(sets()[1])
    config = UnlearnConfig(epochs=3, batch_norm="update", batch_size=8, device="cpu", seed=4)
    torch.manual_seed(1)
    first, history = train_classifier("resnet8", images, 3, config)
    torch.manual_seed(2)
    second, _ = train_classifier("resnet8", images, 3, config, FileCheckpoint(tmp_path / "state"))
    done = []
    third, again = train_classifier("resnet8", images, 3, config, FileCheckpoint(tmp_path / "state"), done.append)
    assert model_digest(first) == model_digest(second) == model_digest(third)
    assert len(history) == len(again) == 3
    assert done == []
    other, _ = train_classifier("resnet8", images, 3, config.model_copy(update={"seed": 5}))
    assert model_digest(other) != model_digest(first)
