"""The contract of plug-ins: what each method, metric, attack and architecture of another package must hold.

Each check runs the plug-in on small synthetic models and images, and compares what it did with what it must do. It
finds mistakes, not malice: a plug-in runs in this process, and could hide from it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from salun_core import plugins
from salun_core.cli.plugins import fault_of
from salun_core.data.images import ImageSet
from salun_core.errors import SalunError, UsageError, unknown_name
from salun_core.evaluation.evidence import EpochRecord, Metric
from salun_core.evaluation.optional_metrics import AddedAttack, AddedMetric, MeasuredModels, measure_added
from salun_core.methods import classification, diffusion
from salun_core.methods.checkpoint import CheckpointStore, FileCheckpoint
from salun_core.methods.classification.method import ClassifierMethod
from salun_core.methods.diffusion.method import DiffusionMethod, ExampleSets
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import Method, UnlearnResult, get_method, resolve_config
from salun_core.models.architectures import build_classifier
from salun_core.models.checkpoint import model_digest
from salun_core.plugins import Kind, Offer
from salun_core.saliency import SaliencyMask

State = Literal["holds", "fails", "does not apply"]
_CONTRAST = 0.05  # classes are near each other, so that a method that moves images across a border soon does
_TOLERANCE = 0.99  # of the passes that ran; a batch in which some samples need no gradient is counted in full here
_EPOCHS, _DENSITY, _RATE = 3, 0.3, 1e-3  # few weights and small steps: it is about mechanics, not about forgetting
_OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/share/zoneinfo/")  # libraries open these at first use
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - refused
_OF_PYTHON = ("stdlib", "platstdlib", "purelib", "platlib")
_SUFFIXES = "|".join(map(re.escape, importlib.machinery.all_suffixes()))
_CODE = re.compile(rf".*(\.pyc\.\d+|{_SUFFIXES})")  # NAME.pyc.NUMBER: what Python compiled, while it writes it
_IMPORT_SYSTEM = ("<frozen importlib", "<frozen zipimport")
_REACHING = {
    "open",
    "socket.connect",
    "socket.sendto",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "sqlite3.connect",
}
_REQUEST, _ANSWER, _STATE = "request.json", "answer.json", "state"  # files of the process that resumes a run


@dataclass(frozen=True)
class Check:
    """The result of one check: what a plug-in must do, whether it does, and what was found."""

    plugin: str
    check: str
    state: State
    found: str


def chosen(name: str) -> list[Offer]:
    """Return the plug-ins that a name means: of a distribution, of entry points, or one object.

    UsageError if no package offers the name, or the object cannot be loaded.
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


def check_plugins(name: str) -> list[Check]:
    """Check the plug-ins that a name means. It allows them in this process, and runs their code.

    The name is that of a distribution, a plug-in or an object; UsageError if no package offers it. A plug-in that
    cannot be loaded or run has no further results.
    """
    plugins.allow(name)
    with _reaching() as imported:  # before the first plug-in is loaded: its module may do anything when it is imported
        offers = chosen(name)
        loads = [_load(offer) for offer in offers]
    found = []
    for offer, loaded in zip(offers, loads, strict=True):
        found += [loaded, *(_checks_of(offer, imported) if loaded.state == "holds" else ())]
    return found


def _load(offer: Offer) -> Check:
    plugins.allow(offer)
    try:
        if fault := fault_of(offer):
            return Check(offer.name, "loads", "fails", fault)
        plugins.load(offer.kind, offer.name)
        (record,) = plugins.loaded(offer.kind, offer.name)
    except SalunError as error:
        return Check(offer.name, "loads", "fails", str(error))
    return Check(offer.name, "loads", "holds", record.words)


def _checks_of(offer: Offer, imported: Sequence[_Reach]) -> list[Check]:
    checks = {"method": _method, "metric": _measure, "attack": _measure, "architecture": _architecture}
    try:
        return checks[offer.kind](offer, imported)
    except SalunError as error:
        return [Check(offer.name, "runs", "fails", str(error))]
    except Exception as error:  # noqa: BLE001 - any code
        return [Check(offer.name, "runs", "fails", _raised(error))]


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
    """What a method is run on, the same in each process: its network, its sets as tensors, its mask, and a run."""

    network: nn.Module
    tensors: Sequence[Tensor]
    run: Callable[..., UnlearnResult]
    epochs: int
    mask: SaliencyMask | None


class _BrokenOffError(Exception):
    """Stands for a kill."""


@dataclass(frozen=True)
class _MethodRun:
    """A whole run of a method, and what it is compared with.

    `passes` is what the network ran, as the method's kind counts it. `reached` are other data, connections and
    processes that its module reached for when it was imported, or the run. `before` is the digest of the original
    model, `inputs` copies of the sets.
    """

    name: str
    lab: _Lab
    result: UnlearnResult
    passes: float
    reached: list[str]
    before: str
    inputs: list[Tensor]

    def deterministic(self) -> str:
        same = model_digest(self.lab.run().model) == model_digest(self.result.model)
        _require(same, "two runs with one seed gave different weights: draw all numbers from the generator")
        return "two runs with one seed gave equal weights"

    def keeps_inputs(self) -> str:
        same = model_digest(self.lab.network) == self.before
        _require(same, "it changed the original model: work on the context's model")
        _require(_equal(self.inputs, self.lab.tensors), "it changed images or labels in place: copy them first")
        return "model and images are as before"

    def changes(self) -> str:
        mask = self.lab.mask
        moved = self._moved(self.lab.run(weight_decay=0.0)).items()  # a decay changes weights without any gradient
        count = sum(int((changed & mask.tensor(name) if mask else changed).sum()) for name, changed in moved)
        where = " in the mask" if mask else ""
        _require(count > 0, f"it changed no weight{where}: its loss needs a gradient, or its edit an effect")
        return f"{count} weights{where} changed"

    def frozen(self) -> str | None:
        if (mask := self.lab.mask) is None:
            return None
        moved = sum(int(changed[~mask.tensor(name)].sum()) for name, changed in self._moved(self.result).items())
        _require(moved == 0, f"{moved} weights outside the mask changed: change weights by the optimiser only")
        return f"{_count(mask.shapes) - mask.k} weights outside the mask kept their bits"

    def _moved(self, result: UnlearnResult) -> dict[str, Tensor]:
        """Return where the bits of each parameter changed."""
        state = result.model.state_dict()
        return {name: _bits(state[name]) != _bits(old) for name, old in self.lab.network.named_parameters()}

    def resumes(self) -> str | None:
        """Kill a run here, and resume it in another process: what a module keeps in this one does not help it."""
        if not self.result.history:
            return None
        lab, stop = self.lab, self.lab.epochs - 1

        def kill(record: EpochRecord) -> None:
            if record.epoch == stop:
                raise _BrokenOffError

        with TemporaryDirectory(prefix="salun-contract-") as folder:
            with suppress(_BrokenOffError):
                lab.run(FileCheckpoint(Path(folder) / _STATE), kill)
            resumed = _resumed_elsewhere(self.name, Path(folder))
        _require(not resumed.fault, f"a run that was killed could not be resumed in another process: {resumed.fault}")
        _require(
            resumed.epochs == [lab.epochs], f"after a kill in epoch {lab.epochs} it ran the epochs {resumed.epochs}"
        )
        _require(
            resumed.digest == model_digest(self.result.model),
            "a run that was killed and resumed in another process gave other weights: keep no state outside the model",
        )
        return f"killed after epoch {stop} of {lab.epochs} and resumed in another process: equal weights"

    def counts(self) -> str:
        declared, ran = self.result.passes, self.passes
        _require(
            declared >= _TOLERANCE * ran - 1,
            f"it ran {ran:.0f} passes and declares {declared}: set `passes` of its row",
        )
        return f"declares {declared} passes, ran {ran:.0f}"

    def reads_nothing(self) -> str:
        return _no_other(self.reached)


def _method(offer: Offer, imported: Sequence[_Reach]) -> list[Check]:
    lab = _lab(offer.name)
    before, inputs = model_digest(lab.network), [tensor.clone() for tensor in lab.tensors]
    with _reaching() as reached, _counted(lab.network) as cost:
        first = lab.run()
    other = _other_data(offer, [*imported, *reached])
    run = _MethodRun(offer.name, lab, first, cost.passes, other, before, inputs)
    return _checks(
        offer,
        ("equal seeds, equal weights", run.deterministic),
        ("inputs stay as they are", run.keeps_inputs),
        ("changes weights", run.changes),
        ("frozen bits", run.frozen),
        ("resume after a kill", run.resumes),
        ("cost counted", run.counts),
        ("no test data", run.reads_nothing),
    )


def _lab(name: str) -> _Lab:
    row = plugins.load("method", name)
    if isinstance(row, ClassifierMethod):
        return _classifier_lab(name)
    if isinstance(row, DiffusionMethod):
        return _denoiser_lab(name)
    raise plugins.wrong_type("method", name, row, "a ClassifierMethod or a DiffusionMethod")


def _mask(network: nn.Module, needed: bool) -> SaliencyMask | None:  # noqa: FBT001 - of a method's row
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    return SaliencyMask.random(shapes, _DENSITY, 0) if needed else None


@dataclass(frozen=True)
class _Resumed:
    """What a process that resumed a run found; with a fault there is no digest of the weights."""

    epochs: list[int]
    digest: str
    fault: str


def _resumed_elsewhere(name: str, folder: Path) -> _Resumed:
    """Resume a run in a new interpreter, with the module path and the number of threads of this one.

    `folder` holds the state of the run; the request and the answer lie in it, too, because the plug-in may write to
    standard output.
    """
    request = {"name": name, "path": sys.path, "threads": torch.get_num_threads()}
    (folder / _REQUEST).write_text(json.dumps(request), "utf-8")
    done = subprocess.run(  # noqa: S603 - this interpreter and this module
        [sys.executable, "-m", "lab.conformance", str(folder)],
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # the working folder hides no installed module
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return _Resumed(**json.loads((folder / _ANSWER).read_text("utf-8")))
    except FileNotFoundError:
        last = " ".join(done.stderr.splitlines()[-1:])
        return _Resumed([], "", f"it ended with code {done.returncode}. {last}".strip())


def _resume(folder: Path) -> None:
    """Resume a run, in a process that has not run the method before, and write the answer."""
    request, epochs = json.loads((folder / _REQUEST).read_text("utf-8")), list[int]()
    sys.path[:] = request["path"]
    torch.set_num_threads(request["threads"])  # the order of sums, and so the bits, depend on it
    try:
        store = FileCheckpoint(folder / _STATE)
        found = _lab(request["name"]).run(store, lambda record: epochs.append(record.epoch))
        answer = _Resumed(epochs, model_digest(found.model), "")
    except SalunError as error:
        answer = _Resumed(epochs, "", str(error))
    except Exception as error:  # noqa: BLE001 - any code
        answer = _Resumed(epochs, "", _raised(error))
    (folder / _ANSWER).write_text(json.dumps(asdict(answer)), "utf-8")


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

    mask = _mask(network, row.needs_mask)

    def run(
        checkpoint: CheckpointStore | None = None, on_epoch: OnEpoch | None = None, **changes: float
    ) -> UnlearnResult:
        return classification.unlearn(
            network,
            name,
            forget=forget,
            retain=retain,
            held_out=held_out,
            config=config.model_copy(update=changes),
            mask=mask,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )

    tensors = [tensor for images in (forget, retain, held_out) for tensor in _tensors(images)]
    return _Lab(network, tensors, run, config.epochs, mask)


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

    mask = _mask(unet, row.needs_mask)

    def run(
        checkpoint: CheckpointStore | None = None, on_epoch: OnEpoch | None = None, **changes: float
    ) -> UnlearnResult:
        changed = config.model_copy(update=changes)
        return diffusion.unlearn_denoiser(
            denoiser, sets, name, config=changed, mask=mask, checkpoint=checkpoint, on_epoch=on_epoch
        )

    tensors = sets.forget.mean, sets.forget.condition, sets.retain.mean, sets.retain.condition
    return _Lab(unet, tensors, run, config.epochs, mask)


def _measure(offer: Offer, imported: Sequence[_Reach]) -> list[Check]:
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
    other = _other_data(offer, [*imported, *reached])

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

    return _checks(
        offer,
        ("a value", value),
        ("equal seeds, equal values", repeats),
        ("inputs stay as they are", keeps_inputs),
        ("measures a retrained model", reference),
        ("no other data", lambda: _no_other(other)),
    )


def _tensors(images: ImageSet) -> tuple[Tensor, Tensor]:
    return images.images, images.labels


_INPUTS = ((3, 32), (1, 28), (1, 8), (3, 224))  # channels and side of images to try


def _architecture(offer: Offer, imported: Sequence[_Reach]) -> list[Check]:
    def built(classes: int = 3) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_classifier(offer.name, classes)

    with _reaching() as reached:
        network = built()
    other = _other_data(offer, [*imported, *reached])

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
        ("no other data", lambda: _no_other(other)),
    )


@dataclass
class _Cost:
    """Samples that a network ran: `forward` went forward, `trained` backward as well."""

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


class _Reach(NamedTuple):
    """Something that code reached for (a file, a connection, a process), with Python's audit event.

    `path` has no symbolic links; `importing` is whether Python's import system opened it.
    """

    event: str
    path: str
    importing: bool


_watching: list[list[_Reach]] = []  # an audit hook cannot be removed, so that it watches only while this has a list


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in _REACHING:
        return
    if event != "open":
        _watching[-1].append(_Reach(event, "", importing=False))
    elif isinstance(arguments[0], str | bytes | os.PathLike):  # not the number of a file that is open already
        caller = sys._getframe().f_back
        importing = caller is not None and caller.f_code.co_filename.startswith(_IMPORT_SYSTEM)
        path = os.path.realpath(os.fsdecode(arguments[0]))  # now: the working folder may change
        _watching[-1].append(_Reach(event, path, importing))


_hooked: list[bool] = []


@contextmanager
def _reaching() -> Iterator[list[_Reach]]:
    """Collect the files, connections and processes that the block reaches for."""
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    gettempdir()  # its first call writes a file
    found: list[_Reach] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)


def _other_data(offer: Offer, reached: Sequence[_Reach]) -> list[str]:
    """Return what a plug-in may not reach for, each once.

    It may import code from anywhere, and read what installed packages bring, such as tables and certificates. In its
    own package it may read code only, because the digest of a plug-in covers no data. All else may be test data: files
    elsewhere, connections and processes.
    """
    own = [os.path.realpath(folder) for folder in _folders_of(offer.target.partition(":")[0].partition(".")[0])]
    modules = {os.path.realpath(found) for module in [*sys.modules.values()] if (found := _file_of(module))}
    archives, installed = {os.path.realpath(path) for path in sys.path}, _installed()

    def fits(reach: _Reach) -> bool:
        path = reach.path
        if reach.event != "open":
            return False
        if path in archives or os.path.dirname(path).endswith((".dist-info", ".egg-info")):
            return True  # whoever looks for the version of a package opens these
        mine = _is_in(path, own)
        # The digest reads the plug-in's own code, and a warning quotes a line of any module.
        if _CODE.fullmatch(path) and (reach.importing or path in modules or mine):
            return True
        of_system = path.startswith(_OF_THE_SYSTEM) and not path.startswith(_SHARED_MEMORY)
        return of_system or (_is_in(path, installed) and not mine)

    return list(dict.fromkeys(reach.path or reach.event for reach in reached if not fits(reach)))


def _no_other(reached: Sequence[str]) -> str:
    _require(not reached, f"it reached for {', '.join(reached[:3])}: use only what it is given")
    return "opened no other data and no connection"


def _folders_of(package: str) -> Sequence[str]:
    """Return the folders of a package that is loaded; none for a module of one file."""
    return list(getattr(sys.modules.get(package), "__path__", ()))


def _file_of(module: object) -> str | None:
    found = getattr(module, "__file__", None)
    return found if isinstance(found, str) else None


def _is_in(path: str, folders: Sequence[str]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in folders)


def _installed() -> list[str]:
    """Return the folders of Python and of installed packages: `pip install --target` makes some, too."""
    packages = [path for path in sys.path if any(Path(path).glob("*.dist-info"))]
    of_python = (sysconfig.get_path(name) for name in _OF_PYTHON)
    return [os.path.realpath(path) for path in (*of_python, *packages)]


if __name__ == "__main__":
    _resume(Path(sys.argv[1]))
