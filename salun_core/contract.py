"""The contract of plug-ins: what each method, metric, attack and architecture of another package must hold.

Each check runs the plug-in on small synthetic models and images, and compares what it did with what it must do. It
finds mistakes, not malice: a plug-in runs in this process, and could hide from it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from salun_core import plugins
from salun_core.data.images import ImageSet
from salun_core.errors import SalunError, UsageError, unknown_name
from salun_core.evaluation.evidence import METRIC_NAMES, EpochRecord, Metric
from salun_core.evaluation.optional_metrics import NAMES, AddedAttack, AddedMetric, MeasuredModels, measure_added
from salun_core.methods import classification, diffusion
from salun_core.methods.checkpoint import CheckpointStore, FileCheckpoint
from salun_core.methods.classification.method import ClassifierMethod
from salun_core.methods.diffusion.method import DiffusionMethod, ExampleSets
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import Method, UnlearnResult, get_method, resolve_config
from salun_core.models.architectures import CLASSIFIERS, build_classifier
from salun_core.models.checkpoint import model_digest
from salun_core.plugins import Kind, Offer
from salun_core.saliency import SaliencyMask

State = Literal["holds", "fails", "does not apply"]
_CONTRAST = 0.05  # classes are near each other, so that a method that moves images across a border soon does
_TOLERANCE = 0.99  # of the passes that ran; a batch in which some samples need no gradient is counted in full here
_EPOCHS, _DENSITY, _RATE = 3, 0.3, 1e-3  # few weights and small steps: it is about mechanics, not about forgetting
_OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/")  # what Python and torch may open at the first use of a function
_OF_PYTHON = ("stdlib", "platstdlib", "purelib", "platlib")
_REACHING = {"open", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        plugin: name of the plug-in.
        check: what it must do.
        state: whether it does.
        found: what was found.
    """

    plugin: str
    check: str
    state: State
    found: str


def shipped_names(kind: Kind) -> set[str]:
    """Return the names of what ships, which no plug-in can have."""
    return {
        "method": {*classification.METHODS, *diffusion.METHODS},
        "metric": {*NAMES, *METRIC_NAMES},
        "attack": {*NAMES, *METRIC_NAMES},
        "architecture": set(CLASSIFIERS),
    }[kind]


def fault_of(offer: Offer) -> str:
    """Return why a plug-in cannot be reached by its name, without loading it; empty if it can."""
    if offer.name in shipped_names(offer.kind):
        return f"hidden: {offer.name} ships; rename the entry point"
    same = [other for other in plugins.offers(offer.kind) if other.name == offer.name and other != offer]
    if same:
        return f"ambiguous: {same[0].distribution} offers it, too; uninstall one of them"
    return "" if plugins.is_reference(offer.target) else f"{offer.target!r} is not package:object; correct it"


def chosen(name: str) -> list[Offer]:
    """Return the plug-ins that a name means: of a distribution, of entry points, or one object.

    Raises:
        UsageError: no package offers the name, or the object cannot be loaded.
    """
    if plugins.is_reference(name):
        return [Offer(_kind_of(plugins.load("method", name)), name, name)]
    every = [offer for kind in plugins.GROUPS for offer in plugins.offers(kind)]
    found = [offer for offer in every if offer.distribution == name] or [o for o in every if o.name == name]
    if not found:
        raise unknown_name("plug-in", name, {word for offer in every for word in (offer.name, offer.distribution)})
    return found


def _kind_of(found: object) -> Kind:
    rows: tuple[tuple[type, Kind], ...] = ((Method, "method"), (AddedMetric, "metric"), (AddedAttack, "attack"))
    return next((kind for row, kind in rows if isinstance(found, row)), "architecture")


def check_plugin(offer: Offer) -> list[Check]:
    """Check one plug-in, which must be allowed.

    Args:
        offer: the plug-in.

    Returns:
        One result for each check. A plug-in that cannot be loaded or run has no further ones.
    """
    try:
        if fault := fault_of(offer):
            return [Check(offer.name, "loads", "fails", fault)]
        plugins.load(offer.kind, offer.name)
        (record,) = plugins.loaded(offer.kind, offer.name)
    except SalunError as error:
        return [Check(offer.name, "loads", "fails", str(error))]
    loads = Check(offer.name, "loads", "holds", record.words)
    checks = {"method": _method, "metric": _measure, "attack": _measure, "architecture": _architecture}
    try:
        return [loads, *checks[offer.kind](offer)]
    except SalunError as error:
        return [loads, Check(offer.name, "runs", "fails", str(error))]
    except Exception as error:  # noqa: BLE001 - any code
        return [loads, Check(offer.name, "runs", "fails", _raised(error))]


def _checks(offer: Offer, *results: tuple[str, Callable[[], str | None]]) -> list[Check]:
    """Run checks: each returns what it found, raises AssertionError with the fault, or None if it does not apply."""
    found = []
    for name, check in results:
        try:
            text = check()
            state: State = "does not apply" if text is None else "holds"
        except (AssertionError, SalunError) as error:
            text, state = str(error), "fails"
        except Exception as error:  # noqa: BLE001 - any code
            text, state = _raised(error), "fails"
        found.append(Check(offer.name, name, state, text or ""))
    return found


def _raised(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {str(error)[:200]}"


def _require(condition: bool, fault: str) -> None:  # noqa: FBT001 - reads like an assertion
    if not condition:
        raise AssertionError(fault)


class _Lab(NamedTuple):
    """One kind of model to unlearn: its network, its sets as tensors, and a run of a method."""

    network: nn.Module
    tensors: Sequence[Tensor]
    run: Callable[..., UnlearnResult]
    epochs: int
    needs_mask: bool


class _BrokenOffError(Exception):
    """Stands for a kill."""


@dataclass(frozen=True)
class _MethodRun:
    """A whole run of a method, and what it is compared with.

    Args:
        lab: the model and its sets.
        mask: of the run; None for a method without a mask.
        result: of the run.
        passes: what the network ran, as the method's kind counts it.
        reached: files, connections and processes that the run reached for.
        before: digest of the original model.
        inputs: copies of the sets.
    """

    lab: _Lab
    mask: SaliencyMask | None
    result: UnlearnResult
    passes: float
    reached: list[str]
    before: str
    inputs: list[Tensor]

    def deterministic(self) -> str:
        same = model_digest(self.lab.run(self.mask).model) == model_digest(self.result.model)
        _require(same, "two runs with one seed gave different weights: draw all numbers from the generator")
        return "two runs with one seed gave equal weights"

    def keeps_inputs(self) -> str:
        same = model_digest(self.lab.network) == self.before
        _require(same, "it changed the original model: work on the context's model")
        _require(_equal(self.inputs, self.lab.tensors), "it changed images or labels in place: copy them first")
        return "model and images are as before"

    def frozen(self) -> str | None:
        if self.mask is None:
            return None
        state, old, mask = self.result.model.state_dict(), self.lab.network.state_dict(), self.mask
        moved = sum(int((_bits(state[n]) != _bits(old[n]))[~mask.tensor(n)].sum()) for n in mask.shapes)
        _require(moved == 0, f"{moved} weights outside the mask changed: change weights by the optimiser only")
        return f"{_count(mask.shapes) - mask.k} weights outside the mask kept their bits"

    def resumes(self) -> str | None:
        if not self.result.history:
            return None
        lab, epochs, stop = self.lab, list[int](), self.lab.epochs - 1

        def kill(record: EpochRecord) -> None:
            if record.epoch == stop:
                raise _BrokenOffError

        with TemporaryDirectory(prefix="salun-contract-") as folder:
            store = FileCheckpoint(Path(folder) / "state")
            with suppress(_BrokenOffError):
                lab.run(self.mask, store, kill)
            resumed = lab.run(self.mask, store, lambda record: epochs.append(record.epoch))
        _require(epochs == [lab.epochs], f"after a kill in epoch {lab.epochs} it ran the epochs {epochs}")
        same = model_digest(resumed.model) == model_digest(self.result.model)
        _require(same, "a run that was killed and resumed gave other weights: keep no state between epochs")
        return f"killed after epoch {stop} of {lab.epochs} and resumed: equal weights"

    def counts(self) -> str:
        declared, ran = self.result.passes, self.passes
        _require(
            declared >= _TOLERANCE * ran - 1,
            f"it ran {ran:.0f} passes and declares {declared}: set `passes` of its row",
        )
        return f"declares {declared} passes, ran {ran:.0f}"

    def reads_nothing(self) -> str:
        reached = ", ".join(self.reached[:3])
        _require(not reached, f"it reached for {reached}: use the images of the context only")
        return "opened no file and no connection: it sees what it is given, no test data"


def _method(offer: Offer) -> list[Check]:
    row = plugins.load("method", offer.name)
    if isinstance(row, ClassifierMethod):
        lab = _classifier_lab(offer.name)
    elif isinstance(row, DiffusionMethod):
        lab = _denoiser_lab(offer.name)
    else:
        raise plugins.wrong_type("method", offer.name, row, "a ClassifierMethod or a DiffusionMethod")
    shapes = {name: tuple(parameter.shape) for name, parameter in lab.network.named_parameters()}
    mask = SaliencyMask.random(shapes, _DENSITY, 0) if lab.needs_mask else None
    before, inputs = model_digest(lab.network), [tensor.clone() for tensor in lab.tensors]
    with _reaching() as reached, _counted(lab.network) as cost:
        first = lab.run(mask)
    run = _MethodRun(lab, mask, first, cost.passes, reached, before, inputs)
    return _checks(
        offer,
        ("equal seeds, equal weights", run.deterministic),
        ("inputs stay as they are", run.keeps_inputs),
        ("frozen bits", run.frozen),
        ("resume after a kill", run.resumes),
        ("cost counted", run.counts),
        ("no test data", run.reads_nothing),
    )


def _equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor.detach()


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _images(count: int, seed: int, classes: int = 3) -> ImageSet:
    """Draw images of one channel whose brightness tells their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return ImageSet(_CONTRAST * (noise + labels.float()[:, None, None, None]), labels)


def _small_classifier() -> nn.Module:
    """Return a trained network with batch norm and dropout: state and random numbers that a method may mishandle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(2)
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))
        images, labels = _tensors(_images(60, 4))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        network.zero_grad()
    return network.eval()


def _classifier_lab(name: str) -> _Lab:
    network, forget, retain, held_out = _small_classifier(), _images(11, 1), _images(30, 2), _images(12, 3)
    row = get_method(classification.METHODS, name)
    settings = {} if row.edit else {"epochs": _EPOCHS, "learning_rate": _RATE}
    config = resolve_config(classification.METHODS, name, {"batch_size": 8, "device": "cpu", **settings})

    def run(
        mask: SaliencyMask | None, checkpoint: CheckpointStore | None = None, on_epoch: OnEpoch | None = None
    ) -> UnlearnResult:
        return classification.unlearn(
            network,
            name,
            forget=forget,
            retain=retain,
            held_out=held_out,
            config=config,
            mask=mask,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )

    tensors = [tensor for images in (forget, retain, held_out) for tensor in _tensors(images)]
    return _Lab(network, tensors, run, config.epochs, row.needs_mask)


def _denoiser_lab(name: str) -> _Lab:
    """Return a small text-to-image U-Net with images of three prompts."""
    try:
        library: Any = importlib.import_module("diffusers")
    except ImportError as error:
        why = "diffusers is missing"
        raise UsageError("a diffusion method cannot be checked", why, "install salun[diffusion]") from error
    from salun_core.diffusion.conditions import ConditionTable
    from salun_core.diffusion.denoiser import Denoiser
    from salun_core.diffusion.examples import Examples
    from salun_core.diffusion.process import Process

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = library.UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ).eval()
        prompts = torch.randn(4, 5, 12)
    denoiser = Denoiser(unet, Process.of_scheduler(library.DDPMScheduler()))
    table = ConditionTable(["zero", "one", "two", ""], {"encoder_hidden_states": prompts}, 3)
    forget, retain = _images(8, 1, 1), _images(16, 2)
    forgotten = Examples(forget.images, forget.labels, pseudo=torch.ones(8, dtype=torch.int64))
    sets = ExampleSets(forgotten, Examples(retain.images, retain.labels), table, pixels=True)
    row = get_method(diffusion.METHODS, name)
    settings = {} if row.edit else {"epochs": _EPOCHS, "steps": _EPOCHS, "batch_size": 4}
    config = resolve_config(diffusion.METHODS, name, {"device": "cpu", "precision": "float32", **settings})

    def run(
        mask: SaliencyMask | None, checkpoint: CheckpointStore | None = None, on_epoch: OnEpoch | None = None
    ) -> UnlearnResult:
        return diffusion.unlearn_denoiser(
            denoiser, sets, name, config=config, mask=mask, checkpoint=checkpoint, on_epoch=on_epoch
        )

    tensors = sets.forget.mean, sets.forget.condition, sets.retain.mean, sets.retain.condition
    return _Lab(unet, tensors, run, config.epochs, row.needs_mask)


def _measure(offer: Offer) -> list[Check]:
    row = plugins.load(offer.kind, offer.name)
    expected = AddedMetric if offer.kind == "metric" else AddedAttack
    if not isinstance(row, expected):
        raise plugins.wrong_type(offer.kind, offer.name, row, f"an {expected.__name__}")
    before, after = _small_classifier(), _small_classifier()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(0.9)
    models: dict[str, nn.Module] = {"before": before, "after": after}
    sets = _images(11, 1), _images(30, 2), _images(30, 3)
    subject = MeasuredModels(models, *sets)
    state = [model_digest(model) for model in models.values()]
    tensors = [item for images in sets for item in _tensors(images)]
    inputs = [tensor.clone() for tensor in tensors]

    def measured(which: MeasuredModels) -> Metric:
        outputs = {name: which.outputs(model) for name, model in which.models.items()}
        return measure_added(row, offer.name, which, outputs, 0)

    with _reaching() as reached:
        first = measured(subject)

    def value() -> str:
        _require(first.n > 0, "n is 0: say how many samples are behind the value")
        for name in ("before", "after"):
            found = getattr(first, name)
            _require(found is not None and math.isfinite(found), f"its value {name} is {found}, not a number")
        return f"before {first.before:.4f}, after {first.after:.4f}, n {first.n}"

    def repeats() -> str:
        _require(measured(subject) == first, "two measurements of the same models differ: use the seed")
        return "two measurements gave one value"

    def keeps_inputs() -> str:
        _require([model_digest(model) for model in models.values()] == state, "it changed a model: measure a copy")
        _require(_equal(inputs, tensors), "it changed images or labels in place: copy them first")
        return "models and images are as before"

    def reference() -> str:
        found = measured(replace(subject, models={**models, "reference": before})).reference
        _require(found is not None, "it has no value for a retrained model, which a policy may compare with")
        return f"reference {found:.4f}"

    def reads_nothing() -> str:
        _require(not reached, f"it reached for {', '.join(reached[:3])}: use what it is given")
        return "opened no file and no connection"

    return _checks(
        offer,
        ("a value", value),
        ("equal seeds, equal values", repeats),
        ("inputs stay as they are", keeps_inputs),
        ("measures a retrained model", reference),
        ("no other data", reads_nothing),
    )


def _tensors(images: ImageSet) -> tuple[Tensor, Tensor]:
    return images.images, images.labels


_INPUTS = ((3, 32), (1, 28), (1, 8), (3, 224))  # channels and side of images to try


def _architecture(offer: Offer) -> list[Check]:
    def built(classes: int = 3) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_classifier(offer.name, classes)

    network = built()

    def logits() -> str:
        for channels, side in _INPUTS:
            try:
                with torch.no_grad():
                    found = network.eval()(torch.zeros(2, channels, side, side))
            except Exception:  # noqa: BLE001, S112 - it may take images of another form
                continue
            shape = tuple(getattr(found, "shape", ()))
            _require(shape == (2, 3), f"2 images and 3 classes give outputs of {shape}, not (2, 3)")
            return f"logits of {channels} x {side} x {side} images"
        forms = ", ".join(f"{channels} x {side} x {side}" for channels, side in _INPUTS)
        raise AssertionError(f"it takes no images of {forms}")

    def repeats() -> str:
        _require(model_digest(built()) == model_digest(network), "one seed gave two networks: use torch's generator")
        return "one seed gave equal weights"

    def trains() -> str:
        fixed = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
        _require(not fixed, f"{fixed[:3]} require no gradient: saliency needs one of each parameter")
        return f"{_count({n: tuple(p.shape) for n, p in network.named_parameters()})} weights"

    def classes() -> str:
        names = built(5).state_dict().keys()
        _require(names == network.state_dict().keys(), "5 classes have other parameters than 3")
        return "5 classes have the same parameters as 3"

    return _checks(
        offer,
        ("logits", logits),
        ("equal seeds, equal weights", repeats),
        ("parameters are trained", trains),
        ("any number of classes", classes),
    )


@dataclass
class _Cost:
    """What a network ran.

    Args:
        forward: samples that went forward.
        trained: samples that went backward as well.
    """

    forward: int = 0
    trained: int = 0

    @property
    def passes(self) -> float:
        """Image passes: a forward pass alone is a third of one."""
        return self.forward / 3 + self.trained * 2 / 3


@contextmanager
def _counted(network: nn.Module) -> Iterator[_Cost]:
    """Count the samples that pass through the copies of a network that are made in the block.

    A run's own first look at the number of classes is not part of the method, and is taken off.
    """
    cost = _Cost(-1)

    def forward(_module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401 - of any network
        tensor = output if isinstance(output, Tensor) else output[0]
        samples = len(tensor)
        cost.forward += samples
        if tensor.requires_grad:

            def backward(_gradient: Tensor) -> None:
                cost.trained += samples

            tensor.register_hook(backward)

    handle = network.register_forward_hook(forward)  # copies of the network keep it
    try:
        yield cost
    finally:
        handle.remove()


_watching: list[list[str]] = []  # an audit hook cannot be removed, so that it watches only while this has a list


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in _REACHING:
        return
    target = arguments[0] if event == "open" and arguments else event
    if isinstance(target, bytes):
        target = os.fsdecode(target)
    if not isinstance(target, str | os.PathLike):
        return  # a number of a file that is open already
    path = str(os.fspath(target))
    code = path in sys.path or path.endswith((*importlib.machinery.all_suffixes(), ".pyc"))
    if event != "open" or not (code or path.startswith((*_OF_THE_SYSTEM, *_installed()))):
        _watching[-1].append(path)


def _installed() -> list[str]:
    """Return the folders of Python and of installed packages."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return [f"{path}/" for path in (*(sysconfig.get_path(name) for name in _OF_PYTHON), *packages)]


_hooked: list[bool] = []


@contextmanager
def _reaching() -> Iterator[list[str]]:
    """Collect the files, connections and processes that the block reaches for, apart from those of Python itself."""
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    gettempdir()  # its first call writes a file
    found: list[str] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)
