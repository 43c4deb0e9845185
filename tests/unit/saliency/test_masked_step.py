"""Frozen weights keep their bits; salient weights go exactly where torch's own optimiser takes them."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from salun_core.errors import ModelError, UsageError
from salun_core.saliency import SaliencyMask, masked_optimizer

INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
SGD_SETTINGS = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in itertools.product([0, 0.9], [0, 0.5, 1.5], [0, 0.05], [False, True], [False, True])
    if not n or (m and not d)
]
ADAM_SETTINGS = [
    {"amsgrad": a, "weight_decay": w, "maximize": x}
    for a, w, x in itertools.product([False, True], [0, 0.3], [False, True])
]
CASES = [
    *((SGD, {"lr": 0.1, **settings}) for settings in SGD_SETTINGS),
    *((Adam, {"lr": 0.01, **settings}) for settings in ADAM_SETTINGS),
    *((AdamW, {"lr": 0.01, **settings}) for settings in ADAM_SETTINGS),
]
CLOSE, ROUGH = {"rtol": 1e-5, "atol": 1e-7}, {"rtol": 0.02, "atol": 0.02}
VARIANTS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
FEW = [  # no option, all that go together, and those that exclude each other
    (SGD, {"lr": 0.1, **SGD_SETTINGS[0]}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.05, "nesterov": False, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0.05, "nesterov": True, "maximize": True}),
    *((kind, {"lr": 0.01, **settings}) for kind in (Adam, AdamW) for settings in (ADAM_SETTINGS[0], ADAM_SETTINGS[-1])),
]


def ways(*dtypes, variants):
    """All settings with torch's plain loop and numbers of 32 bits; a few of them with each other kernel and type."""
    for variant, dtype in itertools.product(variants, dtypes or [torch.float32]):
        plain = dtype == torch.float32 and variant == VARIANTS[0]
        for kind, settings in CASES if plain else FEW:
            words = [kind.__name__, *(f"{key}{value}" for key, value in settings.items() if value)]
            name = "-".join([*words, *(key for key, value in variant.items() if value), str(dtype)[6:]])
            yield pytest.param(kind, settings, variant, *([dtype] if dtypes else []), id=name)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))) * self.scale


def build(dtype=torch.float32, channels_last=False):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        special = [-0.0, 0.0, 1e-45, -1e-45, 1.1e-38, -1.1e-38, 3e38, -3e38, 1.0]
        for parameter in model.parameters():
            parameter.view(-1)[: len(special)] = torch.tensor(special)[: parameter.numel()]
    model = model.to(dtype)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def bits(tensor):
    return tensor.detach().contiguous().view(INTEGER[tensor.dtype]).clone()


def all_bits(model):
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def mask_of(model, density=0.5, seed=3):
    return SaliencyMask.random({name: p.shape for name, p in model.named_parameters()}, density, seed)


def give_grads(model, step, poison=None):
    """Random gradients, some zero; outside the mask NaN and infinity where `poison` is given."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        grad = torch.where(torch.rand(parameter.shape, generator=generator) < 0.2, torch.zeros_like(grad), grad)
        if poison is not None:
            bad = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])[torch.arange(grad.numel()) % 4]
            grad = torch.where(poison.tensor(name), grad, bad.reshape(grad.shape).to(grad.dtype))
        parameter.grad = grad.contiguous(memory_format=torch.preserve_format)


def assert_frozen(model, before, mask):
    for name, parameter in model.named_parameters():
        frozen = ~mask.tensor(name)
        assert torch.equal(bits(parameter)[frozen], before[name][frozen]), name


def some_moved(model, before):
    return any(not torch.equal(bits(parameter), before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("kind", "settings", "variant"), ways(variants=VARIANTS))
def test_weights_outside_the_mask_keep_their_bits(kind, settings, variant):
    for dtype, channels_last in [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]:
        model = build(dtype, channels_last)
        mask, before = mask_of(model), all_bits(model)
        optimizer = masked_optimizer(kind(model.parameters(), **settings, **variant), model, mask)
        for step in range(8):
            give_grads(model, step, poison=mask)
            optimizer.step()
        assert_frozen(model, before, mask)
        assert some_moved(model, before)


def masked_by_hand(model, optimizer, mask, step, poison):
    """Mask the gradient, let torch step, put the frozen weights back: the slow way that is surely right."""
    give_grads(model, step, poison)
    tensors = mask.tensors()
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.where(tensors[name], parameter.grad, torch.zeros_like(parameter.grad))
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.where(tensors[name], parameter, kept[name]))


@pytest.mark.parametrize(
    ("kind", "settings", "variant", "dtype"),
    ways(torch.float32, torch.bfloat16, torch.float64, variants=VARIANTS[:2]),
)
def test_salient_weights_equal_those_of_mask_and_restore(kind, settings, variant, dtype):
    ours, theirs = build(dtype), build(dtype)
    mask = mask_of(ours, 0.4)
    optimizer = masked_optimizer(kind(ours.parameters(), **settings, **variant), ours, mask)
    plain = kind(theirs.parameters(), **settings, **variant)
    for step in range(6):
        give_grads(ours, step, poison=mask)
        optimizer.step()
        masked_by_hand(theirs, plain, mask, step, poison=mask)
    assert all(torch.equal(value, all_bits(theirs)[name]) for name, value in all_bits(ours).items())


@pytest.mark.parametrize(
    ("kind", "settings", "variant", "dtype"), ways(torch.float32, torch.bfloat16, variants=VARIANTS)
)
def test_a_full_mask_equals_the_optimizer_of_torch(kind, settings, variant, dtype):
    ours, theirs = build(dtype), build(dtype)
    mask = SaliencyMask.full({name: p.shape for name, p in ours.named_parameters()})
    optimizer = masked_optimizer(kind(ours.parameters(), **settings, **variant), ours, mask)
    plain = kind(theirs.parameters(), **settings, **variant)
    for step in range(6):
        for model, stepping in ((ours, optimizer), (theirs, plain)):
            give_grads(model, step)
            stepping.step()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if "fused" in variant and settings["weight_decay"]:  # the fused kernels round the decay otherwise
            torch.testing.assert_close(left, right, **(CLOSE if dtype == torch.float32 else ROUGH))
        else:
            assert torch.equal(bits(left), bits(right)), name


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_rate_in_a_tensor_steps_as_torch_does(kind):
    ours, theirs = build(), build()
    settings = {"weight_decay": 0.1, "foreach": False}
    mask = mask_of(ours)
    optimizer = masked_optimizer(kind(ours.parameters(), lr=torch.tensor(0.013), **settings), ours, mask)
    plain = kind(theirs.parameters(), lr=torch.tensor(0.013), **settings)
    for step in range(4):
        give_grads(ours, step)
        optimizer.step()
        masked_by_hand(theirs, plain, mask, step, None)
    assert all(torch.equal(value, all_bits(theirs)[name]) for name, value in all_bits(ours).items())


def train_a_little(model, optimizer, steps, scaler=None, after=None, start=0):
    for step in range(start, start + steps):
        images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), torch.arange(6) % 4)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if after:
            after()


def plain_model():
    torch.manual_seed(5)
    return Net()


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_state_of_an_unmasked_optimiser_cannot_unfreeze(kind):
    model = plain_model()
    options = {"lr": 0.05, "weight_decay": 0.1, **({"momentum": 0.9} if kind is SGD else {"amsgrad": True})}
    other = kind(model.parameters(), **options)
    train_a_little(model, other, 3)
    mask, before = mask_of(model), all_bits(model)
    optimizer = masked_optimizer(kind(model.parameters(), **{**options, "weight_decay": 0}), model, mask)
    optimizer.load_state_dict(other.state_dict())
    train_a_little(model, optimizer, 3, start=3)
    assert_frozen(model, before, mask)
    assert optimizer.param_groups[0]["masked_weight_decay"] == 0.1
    optimizer.load_state_dict(other.state_dict())  # once more after steps
    train_a_little(model, optimizer, 2, start=6)
    assert_frozen(model, before, mask)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_moments_made_before_the_mask_do_not_move_frozen_weights(kind):
    model = plain_model()
    optimizer = kind(model.parameters(), lr=0.05, **({"momentum": 0.9} if kind is SGD else {}))
    train_a_little(model, optimizer, 3)
    mask, before = mask_of(model), all_bits(model)
    masked_optimizer(optimizer, model, mask)
    train_a_little(model, optimizer, 3, start=3)
    assert_frozen(model, before, mask)


def test_a_masked_optimizer_resumes_exactly_from_its_state():
    def fresh():
        model = plain_model()
        return model, mask_of(model)

    def optimizer_of(model, mask):
        return masked_optimizer(SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), model, mask)

    whole, mask = fresh()
    train_a_little(whole, optimizer_of(whole, mask), 6)
    first, _ = fresh()
    optimizer = optimizer_of(first, mask)
    train_a_little(first, optimizer, 3)
    second, _ = fresh()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second, mask)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_a_little(second, resumed, 3, start=3)
    assert all(torch.equal(value, all_bits(whole)[name]) for name, value in all_bits(second).items())


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_weight_decay_set_after_the_mask_acts_inside_it_only(kind):
    model = plain_model()
    mask, before = mask_of(model), all_bits(model)
    optimizer = masked_optimizer(kind(model.parameters(), lr=0.1), model, mask)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    train_a_little(model, optimizer, 3)
    assert_frozen(model, before, mask)
    assert optimizer.param_groups[0]["masked_weight_decay"] == 0.5


def test_learning_rate_schedules_work():
    ours, theirs = plain_model(), plain_model()
    mask = SaliencyMask.full({name: p.shape for name, p in ours.named_parameters()})
    optimizer = masked_optimizer(SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), ours, mask)
    plain = SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    rates = []
    for model, stepping in ((ours, optimizer), (theirs, plain)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepping, 5)
        train_a_little(
            model, stepping, 5, after=lambda s=schedule, o=stepping: (rates.append(o.param_groups[0]["lr"]), s.step())
        )
    assert rates[:5] == rates[5:]
    assert rates[0] > rates[4]
    assert all(torch.equal(value, all_bits(theirs)[name]) for name, value in all_bits(ours).items())


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_gradient_scaling_works_and_skips_a_step_with_infinite_gradients(kind):
    model = plain_model()
    mask, before = mask_of(model), all_bits(model)
    optimizer = masked_optimizer(kind(model.parameters(), lr=0.1, weight_decay=0.1), model, mask)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train_a_little(model, optimizer, 3, scaler)
    assert_frozen(model, before, mask)
    assert some_moved(model, before)
    held = all_bits(model)
    optimizer.zero_grad()
    scaler.scale(model(torch.full((2, 3, 8, 8), 3e38)).sum() * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1024.0
    assert not some_moved(model, held)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_fused_optimiser_with_a_scaler_is_refused_before_anything_moves(unscale):
    model = plain_model()
    optimizer = masked_optimizer(AdamW(model.parameters(), lr=0.1, fused=True), model, mask_of(model))
    before = all_bits(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, 3, 8, 8)).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(UsageError, match="fused"):
        scaler.step(optimizer)
    assert not some_moved(model, before)


def test_a_moving_average_keeps_frozen_weights():
    model = plain_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    mask, before = mask_of(model), all_bits(model)
    optimizer = masked_optimizer(Adam(model.parameters(), lr=0.05, weight_decay=0.1), model, mask)
    train_a_little(model, optimizer, 6, after=lambda: average.update_parameters(model))
    assert_frozen(model, before, mask)
    assert_frozen(average.module, before, mask)
    assert some_moved(average.module, before)


def test_other_hooks_still_work_with_a_mask():
    model = plain_model()
    seen = []
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: seen.append("before"))
    masked_optimizer(optimizer, model, mask_of(model))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train_a_little(model, optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_groups_with_settings_of_their_own_and_parameters_without_gradient():
    model = plain_model()
    mask, before = mask_of(model), all_bits(model)
    groups = [
        {"params": [model.conv.weight], "weight_decay": 0.5},
        {"params": [model.head.weight, model.scale], "lr": 0.01, "momentum": 0.5},
    ]
    optimizer = masked_optimizer(SGD(groups, lr=0.1), model, mask)
    train_a_little(model, optimizer, 2)
    model.scale.grad = None
    optimizer.step()
    assert_frozen(model, before, mask)
    assert torch.equal(bits(model.conv.bias), before["conv.bias"])  # in no group
    assert [group["masked_weight_decay"] for group in optimizer.param_groups] == [0.5, 0]


@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
def test_a_closure_is_refused(call):
    model = plain_model()
    optimizer = masked_optimizer(SGD(model.parameters(), lr=0.1), model, mask_of(model))
    with pytest.raises(UsageError, match="closure"):
        call(optimizer, lambda: torch.zeros(()))


def test_two_masks_are_refused():
    model = plain_model()
    optimizer = masked_optimizer(SGD(model.parameters(), lr=0.1), model, mask_of(model))
    with pytest.raises(UsageError, match="already has a mask"):
        masked_optimizer(optimizer, model, mask_of(model))


class MySGD(SGD):
    """Who knows what it does in its step."""


@pytest.mark.parametrize("kind", [RMSprop, torch.optim.Adagrad, torch.optim.NAdam, MySGD])
def test_other_optimisers_are_refused(kind):
    model = plain_model()
    with pytest.raises(UsageError, match=f"{kind.__name__} cannot be masked"):
        masked_optimizer(kind(model.parameters(), lr=0.1), model, mask_of(model))


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_without_eps_is_refused(kind):
    model = plain_model()
    with pytest.raises(UsageError, match="eps = 0"):
        masked_optimizer(kind(model.parameters(), lr=0.1, eps=0.0), model, mask_of(model))


def test_the_mask_of_another_model_is_refused():
    model, other = plain_model(), nn.Linear(3, 3)
    for mask in (mask_of(other), mask_of(nn.Sequential(model))):
        with pytest.raises(ModelError, match="does not fit"):
            masked_optimizer(SGD(model.parameters(), lr=0.1), model, mask)


def test_parameters_of_another_model_are_refused():
    model, other = plain_model(), plain_model()
    with pytest.raises(ModelError, match="not the model.s"):
        masked_optimizer(SGD(other.parameters(), lr=0.1), model, mask_of(model))


def test_a_parameter_added_after_the_mask_is_refused():
    model = plain_model()
    added = nn.Parameter(torch.ones(3))
    optimizer = masked_optimizer(SGD(model.parameters(), lr=0.1), model, mask_of(model))
    optimizer.add_param_group({"params": [added]})
    added.grad = torch.ones(3)
    with pytest.raises(UsageError, match="added after the mask"):
        optimizer.step()


def test_a_sparse_gradient_is_refused():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = masked_optimizer(SGD(model.parameters(), lr=0.1), model, mask_of(model))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match="sparse"):
        optimizer.step()


def test_complex_parameters_are_refused():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(UsageError, match="complex64"):
        masked_optimizer(SGD(model.parameters(), lr=0.1), model, mask_of(model))
