import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from salun_core.errors import DataError, ModelError
from salun_core.saliency import saliency_scores, scores


class Net(nn.Module):
    """Batch norm, dropout, a parameter that the loss does not reach, one that is frozen and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.tied = self.twice
        self.conv.bias.requires_grad_(False)

    def forward(self, images):
        hidden = self.drop(torch.relu(self.norm(self.conv(images)))).mean(dim=(2, 3))
        return self.head(torch.relu(self.tied(torch.relu(self.twice(hidden)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net().double()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    net.train()
    net.norm.eval()
    net.head.weight.grad = torch.full_like(net.head.weight, 7.0)
    return net


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(23, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (23,), generator=generator)


def batches(data, size):
    return zip(data[0].split(size), data[1].split(size), strict=True)


def whole_set_gradient(model, data):
    """|d mean loss| by autograd on everything at once."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(cross_entropy(model(data[0]), data[1]), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad.abs()
        for (name, value), grad in zip(named.items(), grads, strict=True)
    }


def sum_over_samples(model, data):
    """|mean over samples of each one's gradient|, one backward pass a sample."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    for image, label in zip(*data, strict=True):
        loss = cross_entropy(model(image[None]), label[None])
        for name, grad in zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True):
            total[name] += 0 if grad is None else grad
    return {name: (value / len(data[1])).abs() for name, value in total.items()}


@pytest.mark.parametrize("reference", [whole_set_gradient, sum_over_samples])
@pytest.mark.parametrize("size", [1, 5, 8, 22, 23, 100])
def test_scores_do_not_depend_on_the_batches(model, data, size, reference):
    expected = reference(model, data)
    scores = saliency_scores(model, batches(data, size), cross_entropy)
    assert list(scores) == list(expected) == [name for name, _ in model.named_parameters()]
    for name, score in scores.items():
        assert score.shape == expected[name].shape
        assert not score.requires_grad
        torch.testing.assert_close(score, expected[name], rtol=0, atol=1e-10)
    assert float(scores["unused.weight"].abs().sum()) == 0
    assert float(scores["conv.bias"].abs().sum()) > 0


def test_empty_batches_are_ignored(model, data):
    empty = (data[0][:0], data[1][:0])
    scores = saliency_scores(model, [empty, *batches(data, 10), empty], cross_entropy)
    torch.testing.assert_close(scores, whole_set_gradient(model, data), rtol=0, atol=1e-10)


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "asked": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
    }


def assert_untouched(model, before):
    after = state(model)
    assert all(torch.equal(after["weights"][name], value) for name, value in before["weights"].items())
    assert {key: after[key] for key in ("modes", "asked", "grads")} == {
        key: before[key] for key in ("modes", "asked", "grads")
    }


def test_scoring_does_not_change_the_model(model, data):
    before = state(model)
    saliency_scores(model, batches(data, 8), cross_entropy)
    assert_untouched(model, before)
    with torch.no_grad():
        saliency_scores(model, batches(data, 8), cross_entropy)
    assert_untouched(model, before)


def test_model_is_left_as_it_was_after_an_exception(model, data):
    before = state(model)

    def failing():
        yield data[0][:8], data[1][:8]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        saliency_scores(model, failing(), cross_entropy)
    assert_untouched(model, before)


def test_model_is_left_as_it_was_when_a_parameter_cannot_have_a_gradient(model, data):
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    before = state(model)
    with pytest.raises(RuntimeError):
        saliency_scores(model, batches(data, 8), cross_entropy)
    assert_untouched(model, before)


@pytest.mark.parametrize("given", [[], [(torch.empty(0, 2, 6, 6).double(), torch.empty(0).long())]])
def test_an_empty_forget_set_is_refused(model, given):
    before = state(model)
    with pytest.raises(DataError, match="forget set is empty"):
        saliency_scores(model, given, cross_entropy)
    assert_untouched(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(model, data, bad):
    data[0][3, 0, 2, 2] = bad
    before = state(model)
    with pytest.raises(ModelError, match="not finite"):
        saliency_scores(model, batches(data, 8), cross_entropy)
    assert_untouched(model, before)


def test_a_model_without_parameters_is_refused(data):
    with pytest.raises(ModelError, match="no parameters"):
        saliency_scores(nn.Flatten(), batches(data, 8), cross_entropy)


def test_any_loss_over_samples_works(model, data):
    def mean_square(outputs, targets):
        return (outputs[torch.arange(len(targets)), targets] ** 2).mean()

    scores = saliency_scores(model, batches(data, 7), mean_square)
    reference = copy.deepcopy(model).eval()
    mean_square(reference(data[0]), data[1]).backward()
    torch.testing.assert_close(scores["conv.weight"], reference.conv.weight.grad.abs(), rtol=0, atol=1e-10)


def test_large_images_go_through_the_network_in_parts(model, data, monkeypatch):
    sizes, images = [], data[0]
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    wanted = saliency_scores(model, batches(data, 10), cross_entropy)
    monkeypatch.setattr(scores, "VALUES_AT_ONCE", 4 * images[0].numel() + 1)
    found = saliency_scores(model, batches(data, 10), cross_entropy)
    assert sizes == [10, 10, 3, 4, 4, 2, 4, 4, 2, 3]
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-9, atol=1e-15) for name in wanted)


def test_a_chunk_of_small_images_is_one_part_and_one_of_imagenet_is_not():
    assert scores.VALUES_AT_ONCE // (3 * 64 * 64) == scores.CHUNK
    assert scores.VALUES_AT_ONCE // (3 * 224 * 224) == 20
