"""Foreign classifiers: layouts are recognised from names and shapes, and the network here computes the same outputs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from salun_core.errors import ModelError, StateMismatchError
from salun_core.models import build_classifier
from salun_core.models.checkpoint import load_weights
from salun_core.models.importing import read_checkpoint
from salun_core.models.layouts import recognise


def filled(network, seed=0):
    """Give a network weights and statistics that are neither 0 nor 1, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) * (0.3 / max(1, tensor[0].numel()) ** 0.5 + 0.05)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return network.eval()


def imported(path, architecture=None, channels=None, size=None):
    found = recognise(read_checkpoint(path), architecture, channels, size)
    network = build_classifier(found.architecture, found.num_classes or 10, channels or 3, size)
    load_weights(network, found.state)
    return found, network.eval()


def same_logits(ours, reference, images):
    with torch.no_grad():
        torch.testing.assert_close(ours(images), reference(images), rtol=1e-4, atol=1e-5)


class ReferenceResNet:
    """A CIFAR ResNet as the paper describes it, computed from tensors by functions; no module of the project.

    Args:
        blocks: residual blocks of each of the three stages.
        shortcut: `padded`: no weights; otherwise the name of the convolution and its batch norm.
        head: name of the last layer.
    """

    def __init__(self, blocks, shortcut, head, classes=10, seed=0):
        self.blocks, self.shortcut, self.head = blocks, shortcut, head
        self.state, self.generator = {}, torch.Generator().manual_seed(seed)
        self._conv_and_norm("conv1", "bn1", 3, 16, 3)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), 1):
            for block in range(blocks):
                base = f"layer{stage}.{block}"
                self._conv_and_norm(f"{base}.conv1", f"{base}.bn1", inputs, width, 3)
                self._conv_and_norm(f"{base}.conv2", f"{base}.bn2", width, width, 3)
                if inputs != width and shortcut != "padded":
                    self._conv_and_norm(f"{base}.{shortcut}.0", f"{base}.{shortcut}.1", inputs, width, 1)
                inputs = width
        self.state[f"{head}.weight"], self.state[f"{head}.bias"] = self._random(classes, 64), self._random(classes)

    def _random(self, *shape):
        return torch.randn(shape, generator=self.generator) * 0.2

    def _conv_and_norm(self, conv, norm, inputs, outputs, side):
        self.state[f"{conv}.weight"] = self._random(outputs, inputs, side, side)
        for name in ("weight", "bias", "running_mean"):
            self.state[f"{norm}.{name}"] = self._random(outputs)
        self.state[f"{norm}.running_var"] = self._random(outputs).abs() + 0.5

    def _apply(self, images, conv, norm, stride=1):
        weight = self.state[f"{conv}.weight"]
        images = functional.conv2d(images, weight, stride=stride, padding=weight.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (self.state[f"{norm}.{name}"].view(1, -1, 1, 1) for name in names)
        return (images - mean) / (var + 1e-5).sqrt() * scale + shift

    def __call__(self, images):
        hidden = self._apply(images, "conv1", "bn1").clamp(min=0)
        for stage, width in enumerate((16, 32, 64), 1):
            for block in range(self.blocks):
                base, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                inner = self._apply(hidden, f"{base}.conv1", f"{base}.bn1", stride).clamp(min=0)
                inner = self._apply(inner, f"{base}.conv2", f"{base}.bn2")
                if stride == 1:
                    outer = hidden
                elif self.shortcut == "padded":
                    outer = torch.zeros_like(inner)
                    outer[:, width // 4 : width // 4 + hidden.shape[1]] = hidden[:, :, ::2, ::2]
                else:
                    outer = self._apply(hidden, f"{base}.{self.shortcut}.0", f"{base}.{self.shortcut}.1", stride)
                hidden = (inner + outer).clamp(min=0)
        return hidden.mean((2, 3)) @ self.state[f"{self.head}.weight"].T + self.state[f"{self.head}.bias"]


@pytest.mark.parametrize(
    ("shortcut", "head", "architecture", "layout"),
    [
        ("padded", "linear", "resnet20_option_a", "akamaster's CIFAR ResNet, option A"),
        ("shortcut", "linear", "resnet20", "CIFAR ResNet, option B (akamaster, kuangliu)"),
        ("downsample", "fc", "resnet20", "CIFAR ResNet of torchvision's names (chenyaofo)"),
    ],
)
def test_a_public_cifar_resnet_computes_the_same_logits(tmp_path, shortcut, head, architecture, layout):
    reference = ReferenceResNet(3, shortcut, head, classes=7)
    state = {f"module.{name}": tensor for name, tensor in reference.state.items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "resnet20.th")
    checkpoint = read_checkpoint(tmp_path / "resnet20.th")
    assert (checkpoint.wrapper, checkpoint.prefix) == ("state_dict", "module.")
    found, network = imported(tmp_path / "resnet20.th")
    assert (found.architecture, found.layout, found.num_classes) == (architecture, layout, 7)
    assert found.added == 19 + 2 * (shortcut != "padded")  # one batch counter of each batch norm
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
    for side in (32, 9):
        same_logits(network, reference, torch.randn(2, 3, side, side))
    assert imported(tmp_path / "resnet20.th", architecture)[0].architecture == architecture


def test_the_padded_shortcut_has_a_gradient_and_no_weights():
    network = build_classifier("resnet8_option_a", 10, 3)
    assert not [name for name, _ in network.named_parameters() if "shortcut" in name]
    assert sum(parameter.numel() for parameter in build_classifier("resnet20_option_a", 10).parameters()) == 269_722
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    network(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_the_normalisation_inside_a_network_is_taken_out(tmp_path):
    state = dict(ReferenceResNet(1, "shortcut", "fc").state)
    state |= {"normalize.mean": torch.tensor([0.49, 0.48, 0.45]), "normalize.std": torch.tensor([0.25, 0.24, 0.26])}
    torch.save(state, tmp_path / "m.pt")
    found, _ = imported(tmp_path / "m.pt")
    assert (found.facts.mean, found.facts.std) == ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_network_of_torchvision_is_recognised(tmp_path, name):
    import torchvision

    reference = filled(torchvision.models.get_model(name, weights=None, num_classes=5))
    torch.save({"model": reference.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "m.pth")
    found, network = imported(tmp_path / "m.pth")
    assert (found.layout, found.architecture, found.num_classes) == ("torchvision", f"torchvision:{name}", 5)
    same_logits(network, reference, torch.randn(2, 3, 64, 64))


def test_a_vit_of_timm_is_recognised_with_its_size(tmp_path):
    side, architecture = 32, "timm:vit_tiny_patch16_224"
    import timm

    reference = filled(timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=side))
    save_file(
        {f"_orig_mod.{name}": value for name, value in reference.state_dict().items()}, tmp_path / "m.safetensors"
    )
    found, network = imported(tmp_path / "m.safetensors", size=side)
    assert (found.layout, found.architecture, found.num_classes) == ("timm", architecture, 4)
    assert recognise(read_checkpoint(tmp_path / "m.safetensors"), None, None, None).architecture == architecture
    same_logits(network, reference, torch.randn(2, 3, side, side))


def test_networks_with_the_same_tensors_are_not_guessed(tmp_path):
    import timm

    network = timm.create_model("efficientnet_b0", num_classes=4)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="timm:efficientnet_b0 and timm:tf_efficientnet_b0 have the same tensors"):
        imported(tmp_path / "m.pt")
    assert imported(tmp_path / "m.pt", "timm:tf_efficientnet_b0")[0].num_classes == 4


def test_a_folder_of_timm_names_its_architecture_classes_and_normalisation(tmp_path):
    network = build_classifier("timm:mobilenetv3_small_050", 2)
    save_file(dict(network.state_dict()), tmp_path / "model.safetensors")
    scale = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 96, 96]}
    config = {"architecture": "mobilenetv3_small_050", "pretrained_cfg": scale, "label_names": ["dog", "cat"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = imported(tmp_path)
    assert (found.architecture, found.num_classes) == ("timm:mobilenetv3_small_050", 2)
    facts = found.facts
    assert (facts.classes, facts.mean, facts.std, facts.size) == (["dog", "cat"], [0.5] * 3, [0.25] * 3, 96)


def _vit(transformers):
    settings = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**settings, num_labels=3))


def _bottleneck(transformers):
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=3))


def _swin(transformers):
    return transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=3))


def _convnext(transformers):
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=3))


@pytest.mark.parametrize(
    ("make", "architecture", "side"),
    [
        (_vit, "timm:vit_tiny_patch16_224", 32),
        (_bottleneck, "torchvision:resnet50", 32),
        pytest.param(_swin, "timm:swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),
        pytest.param(_convnext, "timm:convnext_tiny", 32, marks=pytest.mark.slow),
    ],
)
def test_a_classifier_of_transformers_computes_the_same_logits(tmp_path, make, architecture, side):
    transformers = pytest.importorskip("transformers", reason="the extra `diffusion` is not installed")
    reference = filled(make(transformers))
    reference.config.id2label = {0: "owl", 1: "ant", 2: "bee"}
    reference.save_pretrained(tmp_path)
    scale = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "size": {"height": side, "width": side}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(scale))
    found, network = imported(tmp_path, size=side)
    assert (found.architecture, found.num_classes) == (architecture, 3)
    assert list(found.facts.classes) == ["owl", "ant", "bee"]
    assert (found.facts.mean, found.facts.std, found.facts.size) == ([0.5] * 3, [0.2] * 3, side)
    same_logits(network, lambda images: reference(images).logits, torch.randn(1, 3, side, side))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "is a BertForTokenClassification"),
        ({"hidden_act": "relu"}, "its hidden_act is relu, and only gelu is read"),
        ({"hidden_size": 192, "num_attention_heads": 4}, "its num_attention_heads is 4, and only 3 is read"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "requests code of its own"),
    ],
)
def test_a_classifier_of_transformers_without_an_equal_is_refused(tmp_path, changes, why):
    save_file({"classifier.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=why):
        imported(tmp_path)


def test_a_refusal_groups_what_is_missing_and_unexpected_and_names_the_closest_layout(tmp_path):
    state = dict(ReferenceResNet(3, "padded", "linear").state)
    del state["layer3.0.conv2.weight"], state["layer3.1.conv2.weight"], state["layer3.2.conv2.weight"]
    state |= {"head.weight": torch.ones(2), "head.bias": torch.ones(2)}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(StateMismatchError) as caught:
        imported(tmp_path / "m.pt")
    text = str(caught.value)
    assert "does not fit resnet20_option_a, the closest layout (akamaster's CIFAR ResNet, option A)" in text
    assert "missing 3 of 116: stages.*.*.conv2.weight (3)" in text
    assert "unexpected 2: head.weight, head.bias" in text
    assert caught.value.details["missing"] == [f"stages.2.{block}.conv2.weight" for block in range(3)]


def test_a_wrong_architecture_is_answered_with_the_right_one(tmp_path):
    torch.save(ReferenceResNet(3, "padded", "linear").state, tmp_path / "m.pt")
    with pytest.raises(StateMismatchError, match=r"the names are those of resnet20_option_a") as caught:
        imported(tmp_path / "m.pt", "resnet20")
    assert "missing 10 of 128: stages.*.*.shortcut.*.weight (4), " in str(caught.value)
    torch.save({"a.weight": torch.ones(2), "b.0.weight": torch.ones(2)}, tmp_path / "m.pt")
    with pytest.raises(
        StateMismatchError, match=r"no layout that is recognised: it has 2 tensors: a.weight, b.\*.weight"
    ):
        imported(tmp_path / "m.pt")


def test_half_precision_is_widened_and_double_is_refused(tmp_path):
    reference = ReferenceResNet(1, "padded", "linear")
    torch.save({name: value.half() for name, value in reference.state.items()}, tmp_path / "m.pt")
    found, _ = imported(tmp_path / "m.pt")
    assert found.widened == len(reference.state)
    torch.save({name: value.double() for name, value in reference.state.items()}, tmp_path / "m.pt")
    with pytest.raises(StateMismatchError, match="conv1.weight is torch.float64, not torch.float32"):
        imported(tmp_path / "m.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = dict(ReferenceResNet(1, "padded", "linear").state)
    state["layer1.0.conv1.weight"] = torch.full_like(state["layer1.0.conv1.weight"], value)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"stages.\*.\*.conv1.weight has NaN or infinite values"):
        imported(tmp_path / "m.pt")


def test_a_side_of_classes_is_named_so(tmp_path):
    state = dict(ReferenceResNet(1, "padded", "linear").state)
    state["linear.bias"] = torch.ones(len(state["linear.bias"]) + 1)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(StateMismatchError, match=r"fc.bias is \[\d+\], not \[classes\]"):
        imported(tmp_path / "m.pt")


class OwnNet(nn.Module):
    """An architecture whose only part is called `model`, as in many trainers."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

    def forward(self, images):
        return self.model(images)


OWN = "tests.unit.models.test_layouts:OwnNet"


def test_an_architecture_of_your_own_must_be_allowed(tmp_path, monkeypatch):
    torch.save(OwnNet(3).state_dict(), tmp_path / "m.pt")
    monkeypatch.delenv("SALUN_PLUGINS", raising=False)
    with pytest.raises(Exception, match=f"set SALUN_PLUGINS={OWN}"):
        imported(tmp_path / "m.pt", OWN)
    monkeypatch.setenv("SALUN_PLUGINS", f"other:net, {OWN}")
    found, network = imported(tmp_path / "m.pt", OWN)
    assert (found.num_classes, found.architecture) == (3, OWN)
    assert network(torch.ones(2, 3, 2, 2)).shape == (2, 3)
