"""Recognises the layout of a foreign classifier, and renames its tensors to those of an architecture here.

A layout is recognised by names and shapes alone. Two architectures with the same names and shapes may compute different
things (padding, activation): `recognise` refuses a choice between those that it compares, and the accuracy after an
import shows the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salun_core.errors import ModelError, SalunError, StateMismatchError
from salun_core.models.architectures import CLASSIFIERS, build_classifier, is_own
from salun_core.models.checkpoint import StateFaults, grouped, state_faults
from salun_core.models.importing import PREFIXES, Checkpoint, Facts

_CLASSES = 1013  # a number that no layer has: a tensor that differs from it in its first side only is the head's
_COUNTER = "num_batches_tracked"
_WIDENED = {torch.float16, torch.bfloat16}
_SIZES = (4, 1024)  # of `size` in a data spec
_STEMS = ("conv1.weight", "patch_embed.proj.weight", "stem.0.weight", "conv_stem.weight", "features.0.weight")
_PADDED = "_option_a"
_HEAD_WIDTH = 64  # of timm's ViTs; another number of heads computes something else from the same tensors
_CLOSE = 0.5  # share of an architecture's tensors below which a layout is not worth naming


@dataclass(frozen=True)
class Recognised:
    """A foreign classifier in terms of an architecture here; `state` has the architecture's names.

    Args:
        num_classes: number of outputs; 0 if the tensors do not show it.
        added: number of batch counters that were missing, which begin at 0.
        widened: number of half-precision tensors that became float32.
        parameters: number of values.
    """

    layout: str
    architecture: str
    num_classes: int
    state: Mapping[str, Tensor]
    added: int
    widened: int
    parameters: int
    facts: Facts


@dataclass(frozen=True)
class _Reading:
    """One way to read a checkpoint; `state` has the names that the architecture should have.

    `twin` is another architecture with the same tensors that computes something else.
    """

    layout: str
    architecture: str
    state: Mapping[str, Tensor]
    facts: Facts
    twin: str = ""


def recognise(checkpoint: Checkpoint, architecture: str | None, channels: int | None, size: int | None) -> Recognised:
    """Find the architecture whose tensors a checkpoint has.

    `architecture` is the only name to try; None tries what the file says and the known layouts. `channels` None takes
    the number of image channels from the tensors. StateMismatchError names the closest architecture and its missing and
    unexpected tensors; ModelError means that architectures that compute different things fit, or a value is NaN or
    infinite.
    """
    channels, size = channels or channels_of(checkpoint.state), size or size_of(checkpoint)
    named = architecture or checkpoint.facts.architecture
    renamed = _of_transformers(checkpoint)
    if renamed is not None:
        checkpoint = replace(checkpoint, state=dict(renamed))
    origin = "transformers, as " if renamed is not None else ""
    readings = list(_named(checkpoint, named, origin) if named else _known(checkpoint, origin))
    closest: tuple[StateFaults, _Reading] | None = None
    for reading in readings:
        try:
            faults, found = _compared(reading, checkpoint, channels, size)
        except SalunError:
            if named:
                raise
            continue  # the architecture cannot be built for images of this size
        if found and reading.twin:
            raise ModelError(
                f"{checkpoint.name} fits two architectures",
                f"{reading.architecture} and {reading.twin} have the same tensors and compute different things",
                f"choose the one that it was trained with: --arch {reading.architecture} or --arch {reading.twin}",
            )
        if found:
            _refuse_damaged_values(checkpoint.name, found.state)
            return found
        if closest is None or len(faults) < len(closest[0]):
            closest = faults, reading
    raise _refusal(checkpoint, named, closest)


def _refuse_damaged_values(name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity: such a network gives no answers, and no later step could measure it."""
    damaged = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise ModelError(
            f"cannot import {name}",
            f"{grouped(damaged)} {'has' if len(damaged) == 1 else 'have'} NaN or infinite values",
            "give a checkpoint from before the training diverged",
        )


def _refusal(checkpoint: Checkpoint, named: str | None, closest: tuple[StateFaults, _Reading] | None) -> ModelError:
    remedy = "give --arch: torchvision:NAME, timm:NAME, or package:callable for an architecture of your own"
    if named:
        remedy = "give the architecture that it was made with"
        other = next(iter(_known(checkpoint, "")), None)
        if other and other.architecture != named:
            remedy += f"; the names are those of {other.architecture} ({other.layout})"
    if closest is None or not (named or len(closest[0].missing) < _CLOSE * closest[0].expected):
        faults = StateFaults(0, unexpected=list(checkpoint.state))
        why = f"it has {len(checkpoint.state)} tensors: {grouped(list(checkpoint.state))}"
        return StateMismatchError(f"{checkpoint.name} has no layout that is recognised", why, remedy, faults.details())
    faults, reading = closest
    what = f"{checkpoint.name} does not fit {reading.architecture}"
    if not named:
        what += f", the closest layout ({reading.layout})"
    return StateMismatchError(what, str(faults), remedy, faults.details())


def _compared(
    reading: _Reading, checkpoint: Checkpoint, channels: int, size: int | None
) -> tuple[StateFaults, Recognised | None]:
    """Compare a reading with the tensors of its architecture, which are built without memory where possible."""
    expected = _skeleton(reading.architecture, channels, size)
    state, faults = reading.state, None
    # An architecture may have the prefix that was removed, such as one whose only part is called `model`.
    parts = re.findall(f"({'|'.join(re.escape(one) for one in PREFIXES)})", checkpoint.prefix)
    for count in range(len(parts) + 1):
        prefix = "".join(parts[len(parts) - count :])
        named = {f"{prefix}{name}": tensor for name, tensor in reading.state.items()}
        found = _faults(expected, named)
        if faults is None or len(found) < len(faults):
            state, faults = named, found
    assert faults is not None
    if faults:
        return faults, None
    added = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in expected.items() if name not in state}
    widened = [name for name, tensor in state.items() if tensor.dtype != expected[name].dtype]
    whole = {name: state[name].to(expected[name].dtype) if name in state else added[name] for name in expected}
    classes = {shape[0] for name in expected if (shape := _head(expected[name], whole[name]))}
    parameters = sum(tensor.numel() for name, tensor in whole.items() if name not in _buffers(expected))
    return faults, Recognised(
        reading.layout,
        reading.architecture,
        classes.pop() if len(classes) == 1 else 0,
        whole,
        len(added),
        len(widened),
        parameters,
        reading.facts,
    )


def _buffers(expected: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in expected.items() if not isinstance(tensor, torch.nn.Parameter)}


def _head(expected: Tensor, found: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a tensor of the head: it differs from the expected one in the number of classes only."""
    fits = expected.ndim and found.ndim == expected.ndim and expected.shape[1:] == found.shape[1:]
    return tuple(found.shape) if fits and expected.shape[0] == _CLASSES else None


def _faults(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateFaults:
    """List the differences, without those that an import resolves: classes, batch counters and half precision."""
    faults = state_faults(expected, state)
    sides = {state[name].shape[0] for name in expected if name in state and _head(expected[name], state[name])}
    different = []
    for name, tensor in expected.items():
        if name not in state:
            continue
        found = state[name]
        resolved = len(sides) == 1 and _head(tensor, found) is not None
        if found.shape != tensor.shape and not resolved:
            side = (
                f"[{', '.join(['classes', *map(str, tensor.shape[1:])])}]" if tensor.shape[:1] == (_CLASSES,) else None
            )
            different.append(f"{name} is {list(found.shape)}, not {side or list(tensor.shape)}")
        elif found.dtype != tensor.dtype and not (tensor.dtype == torch.float32 and found.dtype in _WIDENED):
            different.append(f"{name} is {found.dtype}, not {tensor.dtype}")
    missing = [name for name in faults.missing if not name.endswith(_COUNTER)]
    return StateFaults(faults.expected, missing, faults.unexpected, different)


def _skeleton(architecture: str, channels: int, size: int | None) -> Mapping[str, Tensor]:
    """Return the tensors of an architecture: names, shapes and types without values where it can be built so."""
    try:
        with torch.device("meta"):
            model = build_classifier(architecture, _CLASSES, channels, size)
    except (NotImplementedError, RuntimeError, ModelError):  # perhaps it computes with values, as torchvision's RegNet
        model = build_classifier(architecture, _CLASSES, channels, size)
    return model.state_dict(keep_vars=True)


def channels_of(state: Mapping[str, Tensor]) -> int:
    """Return the number of image channels that the first convolution takes, or 3 if it is not found."""
    stem = next((state[name] for name in _STEMS if name in state), None)
    return stem.shape[1] if stem is not None and stem.ndim == 4 and stem.shape[1] in (1, 3) else 3


def size_of(checkpoint: Checkpoint) -> int | None:
    """Return the side of the images in pixels, if the documents or the positions of a ViT show it."""
    state = checkpoint.state
    patch, places = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patch is not None and places is not None and patch.ndim == 4 and places.ndim == 3:
        side = math.isqrt(places.shape[1])  # one more place than patches, for the class token
        if side and places.shape[1] in (side * side, side * side + 1):
            return int(side * patch.shape[-1])
    size = checkpoint.facts.size
    return size if size and _SIZES[0] <= size <= _SIZES[1] else None


def _named(checkpoint: Checkpoint, architecture: str, origin: str) -> Iterator[_Reading]:
    """Yield the readings of a checkpoint as one architecture: as it is, then as a layout that has other names."""
    ours = architecture.removeprefix("salun:")
    if ours in CLASSIFIERS and ours.startswith("resnet"):  # with the right names, only what really differs is listed
        yield from (replace(reading, architecture=ours) for reading in _small_resnet(checkpoint))
    state, facts = _without_scale(checkpoint.state, checkpoint.facts)
    library = (
        architecture.partition(":")[0] if ":" in architecture else "salun" if architecture in CLASSIFIERS else "timm"
    )
    layout = "your own" if is_own(architecture) else library
    said = f" ({checkpoint.facts.origin})" if architecture == checkpoint.facts.architecture else ""
    yield _Reading(f"{origin}{layout}{said}", architecture, state, facts)


def _known(checkpoint: Checkpoint, origin: str) -> Iterator[_Reading]:
    """Yield the readings that the names and shapes suggest, the most specific one first."""
    yield from _small_resnet(checkpoint)
    yield from _own(checkpoint)
    state, facts = _without_scale(checkpoint.state, checkpoint.facts)
    for library, markers, names in _FAMILIES:
        if all(marker in state for marker in markers):
            for name in names(state) if callable(names) else names:
                # of each pair, one pads as TensorFlow does
                twin = (
                    f"timm:tf_{name}" if name.startswith(("efficientnet", "mobilenetv3")) and library == "timm" else ""
                )
                architecture = name if library == "salun" else f"{library}:{name}"
                yield _Reading(f"{origin}{library}", architecture, state, facts, twin)


def _own(checkpoint: Checkpoint) -> Iterator[_Reading]:
    state, facts = checkpoint.state, checkpoint.facts
    if "features.0.weight" in state and "classifier.weight" in state:
        yield _Reading("VGG-16 for CIFAR", "vgg16_bn", state, facts)


def _small_resnet(checkpoint: Checkpoint) -> Iterator[_Reading]:
    """Yield the reading of a residual network for small images: 3 x 3 stem, basic blocks, `layerN` or our `stages.N`.

    The layers have the same order everywhere; only their names differ.
    """
    state, facts = _without_scale(checkpoint.state, checkpoint.facts)
    stem = state.get("conv1.weight")
    ours = "stages.0.0.conv1.weight" in state
    if stem is None or stem.shape[2:] != (3, 3) or not (ours or "layer1.0.conv1.weight" in state):
        return
    if any(".conv3." in name for name in state):
        return
    renamed = state if ours else {_small_resnet_name(name): tensor for name, tensor in state.items()}
    blocks: list[int] = []
    widths: list[int] = []
    while (first := renamed.get(f"stages.{len(blocks)}.0.conv1.weight")) is not None and first.ndim == 4:
        stage = len(blocks)
        blocks.append(len({name.split(".")[2] for name in renamed if name.startswith(f"stages.{stage}.")}))
        widths.append(first.shape[0])
    padded = not any(".shortcut." in name for name in renamed)
    if widths == [16, 32, 64]:
        architecture = f"resnet{6 * max(blocks) + 2}{_PADDED if padded else ''}"
    elif widths == [64, 128, 256, 512]:
        architecture = "resnet18"
    else:
        return
    if architecture in CLASSIFIERS:
        yield _Reading(_origin(state, ours, padded), architecture, renamed, facts)


def _small_resnet_name(name: str) -> str:
    name = re.sub(r"^layer(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    return re.sub(r"^linear\.", "fc.", name.replace(".downsample.", ".shortcut."))


def _origin(state: Mapping[str, Tensor], ours: bool, padded: bool) -> str:
    if ours:
        return "salun"
    if "linear.weight" in state:
        return "akamaster's CIFAR ResNet, option A" if padded else "CIFAR ResNet, option B (akamaster, kuangliu)"
    return "CIFAR ResNet of torchvision's names (chenyaofo)"


def _without_scale(state: Mapping[str, Tensor], facts: Facts) -> tuple[Mapping[str, Tensor], Facts]:
    """Take the normalisation out of networks that contain it as `normalize.mean` and `normalize.std`."""
    names = ("normalize.mean", "normalize.std")
    if not all(name in state and state[name].numel() in (1, 3) for name in names):
        return state, facts
    mean, std = ([round(float(value), 6) for value in state[name].flatten()] for name in names)
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    return rest, replace(facts, origin="normalize.mean and normalize.std of the checkpoint", mean=mean, std=std)


def _vits(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the ViTs of a width, depth and patch; DeiT has the same networks."""
    patch, depth = state["patch_embed.proj.weight"], _depth(state, "blocks")
    known = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
    if patch.ndim == 4 and (name := known.get((patch.shape[0], depth))):
        yield f"vit_{name}_patch{patch.shape[-1]}_224"


def _torchvision_resnets(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the residual networks with as many blocks; a network for small images has another stem."""
    blocks = tuple(_depth(state, f"layer{stage}") for stage in (1, 2, 3, 4))
    wide: dict[tuple[int, ...], tuple[str, ...]] = {
        (3, 4, 6, 3): ("resnet50", "resnext50_32x4d", "wide_resnet50_2"),
        (3, 4, 23, 3): ("resnet101", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"),
        (3, 8, 36, 3): ("resnet152",),
    }
    plain: dict[tuple[int, ...], tuple[str, ...]] = {(2, 2, 2, 2): ("resnet18",), (3, 4, 6, 3): ("resnet34",)}
    if state["conv1.weight"].shape[2:] == (7, 7):
        yield from (wide if "layer1.0.conv3.weight" in state else plain).get(blocks, ("resnet18", "resnet50"))


def _depth(state: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{part}.")})


_Names = Sequence[str] | Callable[[Mapping[str, Tensor]], Iterator[str]]
_FAMILIES: tuple[tuple[str, tuple[str, ...], _Names], ...] = (
    (
        "torchvision",
        ("conv1.weight", "layer1.0.conv1.weight"),
        _torchvision_resnets,
    ),
    ("torchvision", ("features.0.weight", "classifier.6.weight"), ("vgg11", "vgg13", "vgg16", "vgg19", "alexnet")),
    (
        "torchvision",
        ("features.0.weight", "features.1.running_mean", "classifier.6.weight"),
        ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    ),
    ("torchvision", ("features.0.weight", "classifier.1.weight"), ("squeezenet1_0", "squeezenet1_1", "alexnet")),
    (
        "torchvision",
        ("features.conv0.weight", "features.denseblock1.denselayer1.conv1.weight"),
        ("densenet121", "densenet161", "densenet169", "densenet201"),
    ),
    ("torchvision", ("features.18.0.weight", "classifier.1.weight"), ("mobilenet_v2",)),
    (
        "torchvision",
        ("features.0.0.weight", "classifier.3.weight"),
        ("mobilenet_v3_small", "mobilenet_v3_large"),
    ),
    (
        "torchvision",
        ("features.0.0.weight", "features.1.0.block.0.0.weight", "classifier.1.weight"),
        (*(f"efficientnet_b{number}" for number in range(8)), *(f"efficientnet_v2_{one}" for one in "sml")),
    ),
    (
        "torchvision",
        ("features.0.0.weight", "features.1.0.layer_scale"),
        ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    ),
    (
        "torchvision",
        ("features.0.0.weight", "features.1.0.attn.relative_position_bias_table"),
        ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"),
    ),
    ("torchvision", ("conv_proj.weight", "class_token"), ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    (
        "torchvision",
        ("conv1.0.weight", "stage2.0.branch1.0.weight"),
        ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    ),
    ("timm", ("patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.attn.qkv.weight"), _vits),
    ("salun", ("patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.attn.qkv.weight"), ("vit_tiny",)),
    (
        "timm",
        ("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"),
        tuple(f"swin_{one}_patch4_window7_224" for one in ("tiny", "small", "base", "large")),
    ),
    ("salun", ("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"), ("swin_t",)),
    (
        "timm",
        ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
        tuple(f"convnext_{one}" for one in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")),
    ),
    (
        "timm",
        ("conv_stem.weight", "blocks.0.0.conv_dw.weight", "conv_head.weight", "bn2.weight"),
        tuple(f"efficientnet_b{number}" for number in range(5)),
    ),
    (
        "timm",
        ("conv_stem.weight", "blocks.0.0.conv_dw.weight", "conv_head.weight"),
        ("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100"),
    ),
    ("timm", ("layer1.0.se.fc1.weight", "layer1.0.conv3.weight"), ("seresnet50", "seresnext50_32x4d", "seresnet152")),
)


def _of_transformers(checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
    """Return the tensors of a transformers classifier by the names of timm or torchvision; None if it is not one.

    Raises ModelError if the kind of model, or a setting of it, has no equal there.
    """
    config = checkpoint.facts.config
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str):
        return None
    if kinds[0] not in _TRANSFORMERS:
        known = ", ".join(sorted(_TRANSFORMERS))
        raise ModelError(
            f"{checkpoint.name} is a {kinds[0][:60]}",
            f"only these models of transformers are supported: {known}",
            "wrap the model in a module of your own that returns logits, and give --arch package:callable",
        )
    settings, rename = _TRANSFORMERS[kinds[0]]
    if kinds[0].startswith("ViT") and isinstance(width := config.get("hidden_size"), int):
        settings = {**settings, "num_attention_heads": width // _HEAD_WIDTH}
    for name, value in settings.items():
        if config.get(name, value) != value:
            raise ModelError(
                f"{checkpoint.name} has no equivalent in SalUn",
                f"its {name} is {str(config[name])[:60]}, and only {value} is read",
                "wrap the model in a module of your own that returns logits, and give --arch package:callable",
            )
    return _joined({rename(name): tensor for name, tensor in checkpoint.state.items()})


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the query, key and value of each attention, which timm keeps in one tensor."""
    joined = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        whole = [part for part in parts if part is not None]
        if len(whole) == 3 and len({part.shape[1:] for part in whole}) == 1 and whole[0].ndim:
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(whole)
    return joined


def _renamer(*rules: tuple[str, str]) -> Callable[[str], str]:
    """Return a function that applies patterns to a name, one after the other."""
    compiled = [(re.compile(pattern), text) for pattern, text in rules]

    def rename(name: str) -> str:
        for pattern, text in compiled:
            name = pattern.sub(text, name)
        return name

    return rename


def _resnet_name(name: str) -> str:
    def layer(found: re.Match[str]) -> str:
        return f"layer{int(found[1]) + 1}.{found[2]}."

    name = re.sub(r"^resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", layer, name)
    name = re.sub(r"\.layer\.(\d+)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}.", name)
    name = re.sub(r"\.layer\.(\d+)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}.", name)
    return _resnet_rest(name)


_resnet_rest = _renamer(
    (r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),
    (r"^resnet\.embedder\.embedder\.normalization\.", "bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"^classifier\.1\.", "fc."),
)
# Names of the parts of a block, as transformers 4 and 5 write them.
_BLOCK = (
    (r"\.attention\.(?:attention\.|self\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.|self\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.|self\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.patch_embeddings\.projection\.", ".patch_embed.proj."),
)
_vit_name = _renamer(
    *_BLOCK,
    (r"^vit\.(?:encoder\.layer|layers)\.", "blocks."),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.", ""),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_swin_rest = _renamer(
    *_BLOCK,
    (
        r"\.attention\.(?:self\.|relative_position_bias\.)relative_position_bias_table$",
        ".attn.relative_position_bias_table",
    ),
    (r"^swin\.encoder\.", ""),
    (r"^swin\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^swin\.embeddings\.", ""),
    (r"^swin\.layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)


def _swin_name(name: str) -> str:
    # timm merges patches at the beginning of a stage, transformers at the end of the one before
    merged = re.sub(r"\.layers\.(\d+)\.downsample\.", lambda found: f".layers.{int(found[1]) + 1}.downsample.", name)
    return _swin_rest(merged)


_convnext_name = _renamer(
    (r"^convnext\.embeddings\.patch_embeddings\.", "stem.0."),
    (r"^convnext\.embeddings\.layernorm\.", "stem.1."),
    (r"^convnext\.encoder\.", ""),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"^(stages\.\d+)\.layers\.", r"\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"^(stages\..*)\.layernorm\.", r"\1.norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^convnext\.layernorm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
)
# Only kinds whose networks torchvision or timm have, and only with these settings. Their names here do not depend on
# the installed release of transformers, which renames tensors between releases. LayerNorm's epsilon is timm's.
_TRANSFORMERS: dict[str, tuple[Mapping[str, object], Callable[[str], str]]] = {
    "ConvNextForImageClassification": ({"hidden_act": "gelu", "patch_size": 4}, _convnext_name),
    "ResNetForImageClassification": (
        {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False},
        _resnet_name,
    ),
    "SwinForImageClassification": (
        {"hidden_act": "gelu", "patch_size": 4, "use_absolute_embeddings": False, "qkv_bias": True},
        _swin_name,
    ),
    "ViTForImageClassification": ({"hidden_act": "gelu", "qkv_bias": True}, _vit_name),
}
