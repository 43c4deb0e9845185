"""The functions for own programs: `load`, `mask`, `unlearn`, `evaluate` and `publish` a classifier; `save` and `sets`.

They run the code of the pipeline's steps, on a module and data of the caller's:

    import salun_core as salun

    mask = salun.mask(model, forget, density=0.5)
    result = salun.unlearn(model, forget=forget, retain=retain, mask=mask)
    evidence = salun.evaluate(model, result, forget=forget, retain=retain, test=test, mask=mask)

A model is a `torch.nn.Module` that returns logits [B, classes], or what `load` returned. It stays unchanged. Data go to
its device. A set of images is `(images, labels)`, a `Dataset`, a `DataLoader` or an `ImageSet`. Each call reads a set
once, in the order of the data set, and holds it in memory. `shuffle` and `batch_size` of a loader have no effect: the
mask is scored in batches of `CHUNK` samples, and `config` has the batch size of the unlearning. Float images are given
to the model as they are; uint8 images are pixels, which only a model with a card can normalise.

Bars of progress are shown on a terminal and in a notebook, never in a pipe; `progress=False` switches them off.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

import structlog
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parameter import UninitializedParameter

from salun_core import plugins
from salun_core.data import DataSpec, ForgetSet, SplitManifest, load_data, load_spec
from salun_core.data.images import Images, ImageSet, ImageSource
from salun_core.data.spec import relative_to
from salun_core.data.table import Table
from salun_core.data.targets import Target, parse_target
from salun_core.device_memory import explained
from salun_core.errors import ConflictError, DataError, ModelError, UsageError
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.evidence import EpochRecord, Forgotten, Measured, RunFacts
from salun_core.evaluation.outputs import evaluation_mode
from salun_core.methods import classification
from salun_core.methods.classification import METHODS, UnlearnConfig, UnlearnResult, method_config
from salun_core.methods.classification.salun_adaptive import AdaptiveConfig, most_passes
from salun_core.methods.classification.training import fresh_classifier
from salun_core.methods.method import get_method
from salun_core.models import LoadedModel, load_model, save_model
from salun_core.models.checkpoint import WEIGHTS, model_digest, weights_bytes
from salun_core.registry.lookup import read_head, read_version, require_head
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency.scores import CHUNK, LossFn, chunks_of, repeatable
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate as evaluate_step
from salun_core.steps.fetch import fetch_model
from salun_core.steps.outcome import EVIDENCE, REPORT
from salun_core.steps.publishing import Published, gate_and_publish, model_of
from salun_core.storage import open_store
from salun_core.storage.local_files import write_whole
from salun_core.storage.probe import require_safe
from salun_core.sweeps.heartbeat import line_held
from salun_core.sweeps.runs import new_run_id
from salun_core.tasks import TASKS, inputs_of, register_model, task_of
from salun_core.tasks.classification.inputs import ClassifierInputs
from salun_core.tasks.classification.training import import_model
from salun_core.tasks.resolve import AUTO, check_policy, model_folder
from salun_core.tasks.run_facts import RUN_FACTS, facts_json, facts_of_run
from salun_core.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from salun_core.storage.s3 import S3Store

__all__ = ["Forget", "Model", "evaluate", "load", "mask", "publish", "save", "sets", "unlearn"]

Model = nn.Module | LoadedModel
Forget = Target | Mapping[str, Any] | Sequence[Target | Mapping[str, Any]]
"""Forget targets, such as `{"kind": "class", "class_name": "cat"}` or `{"kind": "samples", "ids": [...]}`."""

_COMPARED = 64  # test images whose logits must agree before a module is saved
_WIDTH = 30  # characters of a bar in a notebook
_AGREES = (1e-3, 1e-4)  # relative and absolute tolerance: other memory layouts add in another order


@overload
def load(source: nn.Module, store: str | None = None) -> nn.Module: ...
@overload
def load(source: str | Path, store: str | None = None) -> LoadedModel: ...
def load(source: nn.Module | str | Path, store: str | None = None) -> Model:
    """Load a classifier, or check a module of the caller's.

    Args:
        source: a model folder, `LINE` or `LINE@VERSION` in a store, or a module, which is returned as it is.
        store: `s3://bucket/prefix`; by default $SALUN_STORE_URI.

    Returns:
        The module; or the model with its card, split and digest, on the CPU. Its `model` is the network.

    Raises:
        UsageError: the model does not exist, or is a diffusion model.
        ModelError: the module has no weights yet, or has them on several devices.
        IntegrityError: a file is damaged.

    Example:
        >>> load(torch.nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
    """
    if isinstance(source, nn.Module):
        return _network(source)
    with model_folder(str(source), store or os.environ.get("SALUN_STORE_URI")) as folder:
        _require_classifier(folder)
        return load_model(folder)


def mask(
    model: Model, forget: Images, *, density: float = 0.5, loss: LossFn = cross_entropy, progress: bool = True
) -> SaliencyMask:
    """Choose the weights that the forget set depends on most (SalUn, eq. 3 and 4).

    The same module, data, device and version of torch give the same bits. Parameters whose `requires_grad` is False
    stay outside the mask.

    Args:
        model: the original model.
        forget: D_f with true labels.
        density: share of the weights to keep salient, in (0, 1].
        loss: (logits, labels) -> mean loss over the batch, a scalar.
        progress: show a bar.

    Returns:
        The mask over all parameters of the model.

    Raises:
        DataError: the set is empty, or is not images with class ids of the model.
        ModelError: the model does not take the images, or the loss reaches no weight.
        UsageError: the density is out of range.

    Example:
        >>> images, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> mask(torch.nn.Linear(4, 2), (images, labels), density=0.25, progress=False).k
        2
    """
    network = _network(model)
    images = _images(model, network, "forget", forget, labelled=loss is cross_entropy)
    started, trainable = time.perf_counter(), [name for name, one in network.named_parameters() if one.requires_grad]
    if not trainable:
        raise ModelError(
            "no weight may change",
            "requires_grad is False on every parameter",
            "set it to True where weights may change",
        )
    with explained(), repeatable(), _bar("mask", chunks_of(len(images)), progress) as step:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(images.batches(CHUNK), start=1):
                yield batch
                step(number, "")

        scores = _scores(network, batches(), loss)
    if not any(bool(scores[name].any()) for name in trainable):
        raise ModelError(
            "every saliency score is 0", "the loss reaches no weight that may change", "check the model and the loss"
        )
    facts = {"model_digest": model_digest(network), "seconds": f"{time.perf_counter() - started:.3f}"}
    found = SaliencyMask.from_scores({name: scores[name] for name in trainable}, density, facts)
    return found.within({name: tuple(score.shape) for name, score in scores.items()})


def _scores(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], loss: LossFn) -> dict[str, Tensor]:
    try:
        return saliency_scores(network, batches, loss)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ModelError(
            "the loss has no gradient",
            "the model computes it without one (no_grad, detach or argmax)",
            "return logits that depend on the weights",
        ) from error


def unlearn(
    model: Model,
    method: str = classification.DEFAULT,
    *,
    forget: Images,
    retain: Images,
    mask: SaliencyMask | None = None,
    held_out: Images | None = None,
    config: UnlearnConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> UnlearnResult:
    """Make a copy of the model forget a set of images; weights outside the mask keep their bits.

    Whether a sample is in both sets is not checked: tensors have no names. A sample in both is not forgotten.

    Args:
        model: the original model.
        method: a key of `METHODS`, or a plug-in that `SALUN_PLUGINS` allows.
        forget: D_f with true labels.
        retain: D_r with true labels.
        mask: from `mask`, for methods that need one (`salun_adaptive`, `salun`, `salun_lotus`); the others refuse one.
        held_out: images that the model was not trained on, with true labels; not the test images. `lotus` and
            `salun_lotus` need them, and `salun_adaptive` compares with them. Without them it holds back a part of the
            retain set, which tells it less.
        config: settings that differ from the method's defaults, such as `{"epochs": 3, "learning_rate": 0.01}`.
        seed: seed of the order and of all draws; by default that of `config`.
        progress: show a bar.

    Returns:
        The new model (`.model`) on the original's device, with its history.

    Raises:
        UsageError: an unknown method, a wrong setting, or a mask that is missing or not supported.
        DataError: a set is empty, or is not images with class ids of the model.
        ModelError: the mask does not fit, the model does not take the images, or the loss became NaN or infinite.
    """
    network = _network(model)
    given = {**(config.model_dump() if isinstance(config, UnlearnConfig) else config or {})}
    given |= {"seed": seed} if seed is not None else {}
    settings = method_config(method, {"device": str(_device(network)), **given})
    gone, kept = _images(model, network, "forget", forget), _images(model, network, "retain", retain)
    card = model.card if isinstance(model, LoadedModel) else None
    adaptive, spent = isinstance(settings, AdaptiveConfig), 0
    epochs = settings.epochs * min(settings.forget_parts, len(gone))
    total = most_passes(settings, len(gone) + len(kept)) if adaptive else epochs
    with explained(), _bar(method, total, progress) as step:

        def on_epoch(record: EpochRecord) -> None:
            nonlocal spent
            spent += record.reading.passes if record.reading else 1
            step(min(spent, total), ", ".join(f"loss {name} {loss:.3f}" for name, loss in record.losses.items()))

        result = classification.unlearn(
            network,
            method,
            forget=gone,
            retain=kept,
            config=settings,
            mask=mask,
            held_out=None if held_out is None else _images(model, network, "held-out", held_out),
            fresh=(lambda seed: fresh_classifier(card.architecture, kept, len(card.classes), seed)) if card else None,
            on_epoch=on_epoch,
        )
        if result.ended:  # an adaptive run may end before its budget does
            step(None, result.ended)
    return result


def evaluate(
    before: Model,
    after: UnlearnResult | Model,
    *,
    forget: Images,
    retain: Images,
    test: Images,
    mask: SaliencyMask | None = None,
    reference: UnlearnResult | Model | None = None,
    classes: Sequence[str] | None = None,
) -> Evidence:
    """Measure a model before and after unlearning: accuracies, membership attack, and the weights bit by bit.

    `evidence.metrics` has the figures, `salun_core.gate.decide` applies a policy to them. The digests in the evidence
    identify the tensors in their order; `publish` measures again, on the data that the model's card names.

    A class that is in the forget set and not in the retain set counts as forgotten as a whole: it is left out of TA.

    Args:
        before: the original model.
        after: the result of `unlearn`, or a model from elsewhere.
        forget: D_f with true labels.
        retain: D_r with true labels.
        test: unseen images of all classes.
        mask: the mask of the run; weights outside it are compared bit by bit. A result of `salun` needs it.
        reference: a model that was trained without D_f.
        classes: class names by id; by default those of the card, or the ids.

    Returns:
        The evidence, as the gate takes it.

    Raises:
        UsageError: the mask of the run is missing, or its method has none.
        DataError: a set is empty, or is not images with class ids of the model.
        ModelError: the models or the mask do not fit each other.
    """
    network, result = _network(before), after if isinstance(after, UnlearnResult) else None
    if result is not None:
        get_method(METHODS, result.method).check_mask(result.method, mask)
    others = {name: _network(one) for name, one in (("after", after), ("reference", reference)) if one is not None}
    for name, other in others.items():
        if _device(other) != _device(network):
            where = f"{_device(other)} and {_device(network)}"
            raise ModelError(f"the model {name} is on another device", where, "move one of them with .to()")
    named = {"forget": forget, "retain": retain, "test": test}
    found = {name: _images(before, network, name, data) for name, data in named.items()}
    splits = Splits(found["forget"], found["retain"], found["test"])
    if classes is None and isinstance(before, LoadedModel):
        classes = before.card.classes
    names = list(classes) if classes is not None else [str(index) for index in range(_outputs(network, splits.forget))]
    split, forgotten = _identified(splits, names)
    measured = Measured(
        before=model_digest(network),
        after=model_digest(others["after"]),
        reference=model_digest(others["reference"]) if reference is not None else None,
        dataset=split.dataset_digest,
        split=split.digest,
        forget_set=forgotten.digest,
        mask=mask.digest if mask is not None else None,
    )
    summary = Forgotten(
        count=len(splits.forget),
        train_count=len(splits.forget) + len(splits.retain),
        kinds=forgotten.kinds,
        classes=forgotten.classes,
    )
    architecture = before.card.architecture if isinstance(before, LoadedModel) else ""
    facts = facts_of_run(len(splits.forget), result, mask, architecture=architecture) if result else RunFacts()
    with explained():
        return evaluate_classifier(
            network, others["after"], splits, measured, summary, others.get("reference"), mask, names, facts
        )


def _identified(splits: Splits, classes: list[str]) -> tuple[SplitManifest, ForgetSet]:
    """Describe sets of tensors by the documents that describe a data set: names are positions, digests are of bytes."""
    ids: dict[str, list[str]] = {}
    labels: list[int] = []
    rows: list[Any] = []
    for name in ("forget", "retain", "test"):
        images: ImageSource = getattr(splits, name)
        ids[name] = [f"{name}/{index:06d}" for index in range(len(images))]
        labels += images.labels.tolist()
        pixels = images.pixels(range(len(images)))
        pixels = pixels if pixels.dtype == torch.uint8 else pixels.to(torch.float32)
        rows += list(pixels.cpu().contiguous().numpy())
    table = Table([*ids["forget"], *ids["retain"], *ids["test"]], labels, rows, classes)
    digests = dict(zip(table.ids, table.row_digests, strict=True))
    split = SplitManifest(
        dataset_digest=table.digest,
        train={sample: digests[sample] for sample in (*ids["forget"], *ids["retain"])},
        validation={},
        test={sample: digests[sample] for sample in ids["test"]},
    )
    gone, kept = set(splits.forget.labels.tolist()), set(splits.retain.labels.tolist())
    kinds = (["class"] if gone - kept else []) + (["samples"] if gone & kept else [])
    forget_set = ForgetSet(
        dataset_digest=split.dataset_digest,
        split_digest=split.digest,
        ids=ids["forget"],
        kinds=kinds,
        classes=sorted(gone - kept),
    )
    return split, forget_set


def sets(model: LoadedModel, forget: Forget, *, data: str | None = None) -> Splits:
    """Return the images of a model from a folder or a store: those to forget, to retain and to test on, and held out.

    They are the ones that the pipeline's steps use, in the same order. `held_out` is the validation split; None if the
    model's data have none.

    Args:
        model: from `load`.
        forget: forget targets.
        data: where the data are, if not where the card says.

    Raises:
        UsageError: a target or the data do not exist.
        DataError: nothing is to be forgotten, or everything.
        IntegrityError: the data are not those of the model's training.
    """
    inputs = _inputs(model, forget, data)
    return Splits(inputs.forget, inputs.retain, inputs.test, inputs.held_out)


def save(
    module: nn.Module,
    folder: str | Path,
    *,
    arch: str,
    data: str | DataSpec,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    line: str | None = None,
    store: str | None = None,
) -> LoadedModel:
    """Write a module of the caller's as a model folder, which `load` and `publish` take, and begin a model line.

    A module can be saved if its class is an architecture by name, and if its data have a source that salun reads: a
    folder of images, parquet, `digits`, `torchvision:NAME`. A later deletion reads the data again, so tensors that only
    one program has cannot be published. Logits of the saved model are compared with the module's; they must be in the
    order of the data's classes.

    Args:
        module: the trained classifier.
        folder: folder to write.
        arch: a name for `build_classifier` with the parameters of the module, or `package:callable`, which is called
            here. Later runs need the package too, and must allow it in $SALUN_PLUGINS.
        data: data of its training: a `DataSpec`, a YAML file with one, a folder, parquet, or a name. Data without test
            data of their own are split here. `validation_fraction: 0` if the module was trained on all training rows.
        mean: mean of pixels in [0, 1] that the module's inputs were normalised with, by channel; measured by default.
        std: their standard deviation.
        line: also publish it as the first version of this model line.
        store: `s3://bucket/prefix` of the line; by default $SALUN_STORE_URI.

    Returns:
        The model, read back from the folder.

    Raises:
        UsageError: the architecture or the data do not exist, or the folder holds something else.
        ModelError: the module's parameters or outputs differ from the architecture's.
        ConflictError: the line exists.
    """
    network, spec = _network(module), load_spec(data) if isinstance(data, str) else relative_to(data, Path.cwd())
    plugins.allow(arch)  # who names it here has chosen to run it
    opened = _store(store) if line else None
    if opened is not None and line:
        if read_head(opened, line) is not None:
            raise ConflictError(f"model line {line} exists already", "it has a HEAD", "choose another name")
        require_safe(opened)
    with TemporaryDirectory(prefix="salun-save-") as work:
        write_whole(Path(work, WEIGHTS), weights_bytes(network))
        means, deviations = (list(values) if values is not None else None for values in (mean, std))
        import_model(Path(work, WEIGHTS), spec, arch, Path(work, "model"), means, deviations)
        saved = load_model(Path(work, "model"))
        _require_equal(network, saved)
        save_model(Path(folder), saved.model, saved.card, saved.split)
    if opened is not None and line:
        register_model(opened, line, Path(folder), "import", len(saved.split.train))
    return load_model(Path(folder))


def _require_equal(network: nn.Module, saved: LoadedModel) -> None:
    """Check that a module computes what its architecture does: equal names and shapes do not show it."""
    test = load_data(saved.card.data, saved.split).images("test", saved.normalisation)
    some = test.select(range(min(_COMPARED, len(test))))
    with evaluation_mode(network):
        given = torch.cat([network(images.to(_device(network))).cpu() for images, _ in some.batches(_COMPARED)])
    with evaluation_mode(saved.model):
        built = torch.cat([saved.model(images) for images, _ in some.batches(_COMPARED)])
    if given.shape != built.shape or not torch.allclose(given, built, *_AGREES):
        raise ModelError(
            f"{saved.card.architecture} computes something else than the module",
            "their weights have the same names, and their outputs differ",
            "name the architecture that the module was built with",
        )


def publish(
    before: LoadedModel,
    after: UnlearnResult,
    *,
    forget: Forget,
    line: str,
    store: str | None = None,
    mask: SaliencyMask | None = None,
    policy: str = AUTO,
    data: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Published:
    """Publish an unlearned model as the next version of its line, if the gate passes.

    The model is measured again, on the data that the card of the line's model names, and the gate compares all digests.
    It holds the line meanwhile, as `salun run` does. A module of the caller's has no card: `save` it with a `line`
    first. A model that was not made by `unlearn` cannot be published, nor one of tensors that only this program has.

    Args:
        before: the line's HEAD, from `load(line, store)` or `save`.
        after: the result of `unlearn`.
        forget: the forget targets, by name in the data: what was unlearned.
        line: the model line.
        store: `s3://bucket/prefix`; by default $SALUN_STORE_URI.
        mask: the mask of the run, for a method that needs one.
        policy: name of a shipped policy, a file, an s3:// address, or auto.
        data: where the data are, if not where the card says.
        folder: keeps both models, evidence, decision and report here; the version has them in any case.
        progress: show a bar.

    Returns:
        Digest of the new HEAD, and the gate's decision.

    Raises:
        GateRefusedError: the gate refused; the line is as it was.
        ConflictError: HEAD is another model than `before`, or another run holds the line.
        UsageError: the line, a target, the policy or the mask does not exist or does not fit.
        IntegrityError: the data are not those of the model's training.
    """
    if not isinstance(before, LoadedModel) or not isinstance(after, UnlearnResult):
        raise UsageError(
            "only a result of `unlearn` on a model with a card can be published",
            f"before is {type(before).__name__}, after is {type(after).__name__}",
            "write the module with `save`, unlearn what it returns, and publish that result",
        )
    get_method(METHODS, after.method).check_mask(after.method, mask)
    check_policy(policy)
    opened, run, targets = _store(store), new_run_id(), _targets(forget)
    require_head(opened, line)  # before the lease: a line that does not exist has none
    with ExitStack() as stack:
        if not structlog.is_configured():  # the steps would take over the logs of the whole program
            configure_logging(level="warning", libraries=False)
            stack.callback(structlog.reset_defaults)
        step = stack.enter_context(_bar("publish", 3, progress))
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="salun-publish-")))
        work = Path(folder) if folder else scratch
        work.mkdir(parents=True, exist_ok=True)
        named = scratch / "forget.json"  # names samples, so that it does not stay in `folder`
        document = [target.model_dump(mode="json", exclude_none=True) for target in targets]
        write_whole(named, json.dumps(document).encode())
        context = RunContext(work / "before", str(named), line, opened.uri, run, data)
        stack.enter_context(line_held(opened, line, run))
        head = model_of(read_version(opened, line, require_head(opened, line).version))
        if head != before.digest:
            raise ConflictError(
                f"HEAD of {line} is another model than `before`",
                f"it is {head[:12]}, not {before.digest[:12]}",
                f"start again from load({line!r}): publishing this would bring back what was forgotten since",
            )
        fetched = fetch_model(context)
        step(1, "measure")
        kept = work / "mask.safetensors" if mask is not None else None
        if mask is not None and kept is not None:
            mask.save(kept)
        samples, architecture = context.inputs.sizes["forget_samples"], before.card.architecture
        facts = facts_json(facts_of_run(samples, after, mask, architecture=architecture))
        own = replace(after, model=copy.deepcopy(after.model))  # `save` moves it to the CPU
        context.task.save(work / "after", context.inputs, own, {RUN_FACTS: facts})
        evaluate_step(context, work / "after", work / EVIDENCE, work / REPORT, mask=kept)
        step(2, "gate")
        paths = (work / "after", work / EVIDENCE, work / REPORT)
        published = gate_and_publish(context, *paths, parent=fetched.version, policy_uri=policy, mask=kept)
        step(3, "published")
        return published


def _targets(forget: Forget) -> list[Target]:
    items = [forget] if isinstance(forget, Mapping) or not isinstance(forget, Sequence) else forget
    if not items:
        raise UsageError("no forget target was given", "the list is empty", "name a class, samples or a subject")
    return [parse_target(dict(item), "forget") if isinstance(item, Mapping) else item for item in items]


def _inputs(model: LoadedModel, forget: Forget, data: str | None) -> ClassifierInputs:
    inputs = inputs_of(TASKS["classification"], model, _targets(forget), data)
    assert isinstance(inputs, ClassifierInputs)
    return inputs


def _store(uri: str | None) -> S3Store:
    found = uri or os.environ.get("SALUN_STORE_URI")
    if not found:
        raise UsageError("no store was given", "a model line is in a store", "give store=, or set SALUN_STORE_URI")
    return open_store(found)


def _require_classifier(folder: Path) -> None:
    task = task_of(folder)
    if task is not TASKS["classification"]:
        raise UsageError(
            f"the model is a {task.description}",
            "these functions take classifiers",
            "use `salun run`, or salun_core.tasks.open_inputs",
        )


def _network(model: Model | UnlearnResult) -> nn.Module:
    """Return the network of a model, which has weights, all on one device."""
    network = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{type(model).__name__} is not a model",
            "it is not a torch.nn.Module",
            "give a module, or the result of salun.load",
        )
    for name, parameter in network.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(
                f"parameter {name} has no shape yet", "its layer is lazy", "run one batch through the model first"
            )
    devices = sorted({str(parameter.device) for parameter in network.parameters()})
    if not devices:
        raise ModelError("the model has no parameters", "there is nothing to unlearn", "check the module")
    if len(devices) > 1 or devices == ["meta"]:
        raise ModelError(
            f"the model is on {' and '.join(devices)}",
            "its weights must be on one device, and not on meta",
            "move it: model.to(device)",
        )
    return network


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _images(model: Model, network: nn.Module, name: str, data: Images, *, labelled: bool = True) -> ImageSource:
    """Read a set onto the model's device, and check that the model takes it."""
    images = ImageSet.of(data, name)
    if len(images) == 0:
        raise DataError(f"the {name} set is empty", "no sample is in it", "check how it was selected")
    if images.normalisation is None and images.pixels([0]).dtype == torch.uint8:
        if not isinstance(model, LoadedModel):
            raise DataError(
                f"the images of the {name} set are uint8",
                "the normalisation of the model's inputs is not known",
                "give images as the model expects them, such as images.float() / 255",
            )
        images = images.normalised_by(model.normalisation)
    images = images.to(_device(network))
    classes = _outputs(network, images)
    least, most = int(images.labels.min()), int(images.labels.max())
    if labelled and (least < 0 or most >= classes):
        raise DataError(
            f"labels of the {name} set are out of range",
            f"they are from {least} to {most}, and the model has {classes} classes",
            "give class ids from 0, as in the model's training",
        )
    return images


def _outputs(network: nn.Module, images: ImageSource) -> int:
    """Return the number of a model's outputs, from its logits of one image."""
    first, _ = next(images.batches(1))
    try:
        with evaluation_mode(network):
            logits = network(first)
    except (RuntimeError, TypeError, ValueError) as error:
        why = f"{list(first.shape)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise ModelError("the model does not take the images", why, "give images as in the model's training") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError("the model does not return logits [B, classes]", f"it returns {found}", "wrap it in a module")
    return int(logits.shape[1])


@contextmanager
def _bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int | None, str], None]]:
    """Show a bar on a terminal or in a notebook, and nothing elsewhere.

    Yields a function of what is done and a text. None means that the work has ended, whatever is left of the total.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not shown or not (console.is_jupyter or sys.stderr.isatty()):
        yield lambda done, text: None
    elif console.is_jupyter:  # rich draws there with ipywidgets only, which are not in every notebook
        yield _notebook_bar(label, total)
    else:
        from rich.progress import Progress

        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done, text: bar.update(
                task, completed=total if done is None else done, description=f"{label}: {text}" if text else label
            )


def _notebook_bar(label: str, total: int) -> Callable[[int | None, str], None]:
    from IPython.display import display

    def drawn(done: int | None, text: str) -> dict[str, str]:
        if done is None:
            return {"text/plain": f"{label} {'━' * _WIDTH} {text}"}
        filled = _WIDTH * done // max(1, total)
        bar = "━" * filled + "╌" * (_WIDTH - filled)
        return {"text/plain": f"{label} {bar} {done} of {total}{f', {text}' if text else ''}"}

    handle = display(drawn(0, ""), raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return lambda done, text: handle.update(drawn(done, text), raw=True)
