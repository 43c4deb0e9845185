"""`salun train` and `salun model`: create and import models, and manage the versions of a model line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from salun_core import plugins
from salun_core.cli.options import Actor, DryRun, OptionalStore, Reason, Settings, Store, read_settings, who
from salun_core.cli.output import MODE, emit, emit_facts, emit_plan, epoch_progress, progress
from salun_core.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from salun_core.data import DataSpec
    from salun_core.errors import StateMismatchError
    from salun_core.models.card import Card, DiffusionEvaluation
    from salun_core.tasks.diffusion.importing import MadeDiffusion

CLASSIFIER = "classifier"

OwnData = Annotated[
    str, typer.Option("--data", metavar="D", help="A YAML spec, a folder, parquet, `digits` or torchvision:NAME.")
]
Architecture = Annotated[
    str, typer.Option("--arch", metavar="A", help="Such as resnet18, torchvision:NAME or timm:NAME.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write the model to.")]
Line = Annotated[str | None, typer.Option("--line", help="Also publish it as the first version of this model line.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights, the order and the noise.")]
Judge = Annotated[
    str | None, typer.Option("--judge", help="Classifier of the images: LINE, LINE@VERSION, a folder or s3://.")
]
Evaluation = Annotated[
    list[str], typer.Option("--evaluation", metavar="KEY=VALUE", help="Setting of the evaluation; may be repeated.")
]
Policy = Annotated[
    str, typer.Option("--policy", help="Gate policy of the line; warns if the line lacks what this policy needs.")
]
Version = Annotated[str, typer.Argument(metavar="LINE@VERSION", help="The version, by 6 or more digits of its digest.")]


@dataclass(frozen=True)
class Destination:
    """Where a new model goes: a folder, and perhaps the model line that it begins, with store and gate policy."""

    out: Path
    line: str | None
    store: str | None
    policy: str = "auto"

    def check(self) -> None:
        """Refuse, before any work, a line that exists already or a store that cannot hold one safely."""
        from salun_core.registry.lookup import read_head
        from salun_core.storage import open_store
        from salun_core.storage.probe import require_safe

        if self.line is None:
            return
        if not self.store:
            raise UsageError("--line needs a store", "no store is given", "give --store or set SALUN_STORE_URI")
        store = open_store(self.store)
        if read_head(store, self.line) is not None:
            raise ConflictError(f"model line {self.line} exists already", "it has a HEAD", "choose another name")
        require_safe(store)

    def plan(self, verb: str, spec: DataSpec, arch: str | None = None) -> None:
        """Read the data, build the architecture, check the line, and print what would be made."""
        from salun_core.data import load_data
        from salun_core.models import build_classifier

        loaded = load_data(spec)
        images = loaded.images("train")
        if arch:
            build_classifier(arch, len(loaded.table.classes), *images.shape[:2])
        self.check()
        facts = {"would_write": self.out, "would_publish": self.line, **({"arch": arch} if arch else {})}
        size = _size(*images.shape, chosen=spec.size is not None)
        sizes = {"images": size, "train_images": len(images), "test_images": len(loaded.split.test)}
        emit_plan(verb, {**facts, "classes": len(loaded.table.classes), **sizes})

    def warn(self, card: Card) -> list[str]:
        """Print what a model lacks to pass its policy, whatever a run does, and return it."""
        from salun_core.storage import open_store
        from salun_core.tasks.ingredients import ingredients_of_line
        from salun_core.tasks.resolve import policy_for

        store = open_store(self.store) if self.store else None
        found = ingredients_of_line(card, policy_for(self.policy, card), store)
        texts = [str(item) for item in found if self.line or not item.only_in_pods]  # pods have only what is published
        for text in texts:
            progress(f"warning: {text}")
        return texts

    def with_judge(self, evaluation: DiffusionEvaluation) -> DiffusionEvaluation:
        """Publish an image classifier that is a folder of this machine, so that pods have it; name its version.

        It becomes the line `LINE-judge`; ConflictError if that line exists with another model. If the process dies
        before LINE is published, the same command finds it there.
        """
        from salun_core.digest import sha256_file
        from salun_core.models.checkpoint import WEIGHTS
        from salun_core.registry.lookup import read_head, read_version
        from salun_core.storage import open_store
        from salun_core.tasks import read_card, register_model

        folder = Path(evaluation.judge or "")
        if not (self.line and self.store and evaluation.judge and folder.is_dir()):
            return evaluation
        store, name = open_store(self.store), f"{self.line}-judge"
        head = read_head(store, name)
        if head is None:
            version = register_model(store, name, folder, read_card(folder).method, _trained_on(folder))
            progress(f"published the image classifier {folder} as {name}@{version[:12]}")
        else:
            version = head[0].version
            kept = read_version(store, name, version).files.get(WEIGHTS)
            if kept is None or kept.sha256 != sha256_file(folder / WEIGHTS):
                raise ConflictError(
                    f"model line {name} exists already",
                    f"its model is not the one in {folder}, which would be published under this name",
                    f"give --judge {name}, or another name for the line",
                )
        return evaluation.model_copy(update={"judge": f"{name}@{version}"})

    def finish(
        self, register: Callable[..., str], method: str, facts: Mapping[str, object], warned: list[str] | None = None
    ) -> None:
        """Publish the model if a line was given, and print what was made, and what it lacks unless it was printed."""
        from salun_core.storage import open_store
        from salun_core.tasks import read_card

        card = read_card(self.out)
        chosen = card.data is None or card.data.size is not None
        size = {"images": _size(card.channels, card.height, card.width, chosen=chosen)}
        published: dict[str, object] = {}
        if self.line and self.store:
            version = register(open_store(self.store), self.line, self.out, method, _trained_on(self.out))
            published = {"line": self.line, "version": version}
        warnings = self.warn(card) if warned is None else warned
        told = {"warnings": warnings} if warnings and MODE.json else {}
        emit_facts({"model": self.out, **facts, **size, **published, **told})


def _size(channels: int, height: int, width: int, *, chosen: bool) -> str:
    """Return the size of images, and where it comes from unless the data spec names it."""
    return f"{channels} x {height} x {width}" + ("" if chosen else " (of the data)")


def _trained_on(folder: Path) -> int:
    from salun_core.data.split import read_split

    return len(read_split(folder).train)


class TrainGroup(TyperGroup):
    """`salun train`, which trains a classifier if no kind of model is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, which typer hides
        """Insert the kind if it is missing."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named or not args else [CLASSIFIER, *args])


def train_classifier(
    data: OwnData,
    arch: Architecture,
    out: Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, order and augmentation.")] = 0,
    settings: Settings = [],
    line: Line = None,
    store: OptionalStore = None,
    policy: Policy = "auto",
    dry_run: DryRun = False,
) -> None:
    """Train a classifier and write its model folder."""
    from salun_core.data import load_spec
    from salun_core.tasks import register_model
    from salun_core.tasks.classification.training import train_model, training_config

    named = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    config = training_config({**named, **read_settings(settings)})
    spec, to = load_spec(data), Destination(out, line, store, policy)
    plugins.allow(arch)
    if dry_run:
        to.plan("train", spec, arch)
        return
    to.check()
    with epoch_progress(f"train {arch}", config.epochs) as on_epoch:
        made = train_model(spec, arch, config, out, on_epoch=on_epoch)
    accuracy = {"train_accuracy": made.train_accuracy, "test_accuracy": made.test_accuracy}
    to.finish(register_model, "train", {"digest": made.digest, **accuracy})


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint, a folder of timm, transformers or diffusers, or a hub name."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the model to.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="D", help="The training data: a YAML spec, a folder, parquet or torchvision:NAME."
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="A", help="Such as resnet18, timm:NAME or package:callable. Default: inferred."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Class names in the model's order: one per line, JSON, or separated by commas."
        ),
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Means of the normalisation: 0.49,0.48,0.45.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviations of that normalisation.")] = None,
    key: Annotated[str | None, typer.Option(help="Key of the weights, if a file has several models.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Diffusion: prompt of a class; {label} is its name. Default: an image of a {label}."),
    ] = None,
    judge: Judge = None,
    evaluation: Evaluation = [],
    hub: Annotated[
        bool, typer.Option("--hub", help="Diffusion: download a hub name that is not in the cache.")
    ] = False,
    trainable_text_encoder: Annotated[
        bool, typer.Option("--trainable-text-encoder", help="Diffusion: methods may train the text encoder, too.")
    ] = False,
    line: Line = None,
    store: OptionalStore = None,
    policy: Policy = "auto",
    dry_run: DryRun = False,
) -> None:
    """Import a model of another program into a model folder.

    It prints what was recognised, and runs no code of the model. With --dry-run it writes nothing, and without --data
    it then only recognises the checkpoint.
    """
    from salun_core.errors import StateMismatchError
    from salun_core.models.diffusers_folder import INDEX
    from salun_core.models.importing import read_class_names

    path, names = Path(source), read_class_names(classes) if classes else []
    of_classifiers = {"--arch": arch, "--mean": mean, "--std": std, "--key": key}
    of_diffusion = {"--prompt": prompt, "--judge": judge, "--evaluation": evaluation, "--hub": hub}
    of_diffusion |= {"--trainable-text-encoder": trainable_text_encoder}
    if (path / INDEX).is_file() or hub or (not path.exists() and _is_hub_name(source)):
        _refuse_options("a diffusion model", {**of_classifiers, "--dry-run": dry_run})
        to = Destination(_required(out), line, store, policy)
        _import_diffusion(source, to, data, prompt, (judge, evaluation), names, hub, trainable_text_encoder)
        return
    _refuse_options("a classifier", of_diffusion)
    try:
        _import_classifier(path, out, data, (arch, key), (mean, std), names, (line, store, policy), dry_run)
    except StateMismatchError as error:
        _show_details(error)
        raise


def _import_classifier(
    path: Path,
    out: Path | None,
    data: str | None,
    named: tuple[str | None, str | None],
    scale: tuple[str | None, str | None],
    names: list[str],
    target: tuple[str | None, str | None, str],
    dry_run: bool,
) -> None:
    from salun_core.data import load_spec
    from salun_core.models.architectures import is_own
    from salun_core.models.importing import read_checkpoint
    from salun_core.models.layouts import recognise
    from salun_core.tasks import register_model
    from salun_core.tasks.classification.training import describe, import_model

    (arch, key), (mean, std) = named, (_numbers("--mean", scale[0]), _numbers("--std", scale[1]))
    if arch:
        plugins.allow(arch)
    if data is None:
        checkpoint = read_checkpoint(path, key)
        found = recognise(checkpoint, arch, None, None)
        if dry_run:
            emit_plan("model import", describe(checkpoint, found))
            return
        raise UsageError(
            f"{path.name} fits {found.architecture}, but no data are given",
            "a classifier is kept with its split, so that each later step knows its training samples",
            "give --data, or --dry-run to see what the checkpoint is",
        )
    spec, to = load_spec(data), None if dry_run and out is None else Destination(_required(out), *target)
    if to:
        to.check()
    made = import_model(path, spec, arch, None if dry_run else out, mean, std, names, key)
    facts = {**made.facts, "digest": made.digest}
    facts |= {"train_accuracy": made.train_accuracy, "test_accuracy": made.test_accuracy}
    if made.near_chance:
        progress("warning: the test accuracy is near chance; check --mean and --std, --classes, and the data")
    if dry_run or to is None:
        emit_plan("model import", {**({"would_write": to.out, "would_publish": to.line} if to else {}), **facts})
        return
    to.finish(register_model, "import", facts)
    if arch and is_own(arch) and (offer := plugins.find("architecture", arch)):
        allowed = f"export {plugins.ALLOWED_VARIABLE}={offer.entry}"
        progress(f"Later commands build {arch} only if the environment allows it: {allowed}")


def _is_hub_name(text: str) -> bool:
    """Whether a text is a name of the hub, `owner/name`, rather than a path that does not exist."""
    from salun_core.models.importing import is_checkpoint_name

    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not is_checkpoint_name(text)


def _required(out: Path | None) -> Path:
    if out is None:
        raise UsageError("--out is missing", "the model folder needs a place", "give --out DIR")
    return out


def _refuse_options(kind: str, options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot be used here", f"this is {kind}", "leave it out")


def _show_details(error: StateMismatchError) -> None:
    """Print every difference: as JSON with --json, as lines with --debug."""
    if MODE.json:
        emit({"error": error.what, **error.details}, lambda: None)
    elif MODE.debug:
        for kind, names in error.details.items():
            for name in names:
                progress(f"{kind}: {name}")


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers", str(error), "write 0.49,0.48,0.45") from error


def _import_diffusion(
    source: str,
    to: Destination,
    data: str | None,
    prompt: str | None,
    judged: tuple[str | None, list[str]],
    names: list[str],
    hub: bool,
    trainable: bool,
) -> None:
    from salun_core.data import load_spec
    from salun_core.models.card import DiffusionEvaluation
    from salun_core.tasks import register_model
    from salun_core.tasks.diffusion import importing

    settings, spec = read_evaluation(*judged, DiffusionEvaluation()), load_spec(data) if data else None
    to.check()
    settings = to.with_judge(settings)
    prompt = prompt or "an image of a {label}"
    made = importing.import_diffusion(source, spec, to.out, prompt, settings, names, hub, trainable)
    to.finish(register_model, "import", {"layout": "diffusers", **made_facts(made)})


def read_evaluation(judge: str | None, settings: list[str], defaults: DiffusionEvaluation) -> DiffusionEvaluation:
    """Return how the images of a model are evaluated: the defaults with what --judge and --evaluation give."""
    from salun_core.config import parse
    from salun_core.models.card import DiffusionEvaluation

    given = {**({"judge": judge} if judge else {}), **read_settings(settings)}
    return parse(DiffusionEvaluation, {**defaults.model_dump(), **given}, "--evaluation")


def made_facts(made: MadeDiffusion) -> dict[str, object]:
    """Return what is printed about a diffusion model that was trained or imported."""
    loss = {"loss": made.loss} if made.loss is not None else {}
    return {"digest": made.digest, "parameters": made.parameters, **loss}


def rollback(
    version: Version,
    reason: Reason,
    store: Store,
    reopen: Annotated[bool, typer.Option("--reopen", help="Queue the undone requests again.")] = False,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """Make an earlier version HEAD again. A rollback past an erasure is refused unless --reopen is given."""
    from salun_core.certificates.keys import find_signing_key
    from salun_core.sweeps.rollback import rollback as step

    signer = find_signing_key()
    done = step(store, version, who(actor), reason, reopen=reopen, dry_run=dry_run, signer=signer)
    head = done.head.version if done.head else "as before (dry run)"
    emit_facts({"head": head, "undone_versions": len(done.undone), "reopened_requests": len(done.reopened)})


def hold(version: Version, reason: Reason, store: Store, actor: Actor = "") -> None:
    """Exclude the weights of a version from purges.

    The hold lasts until `salun model release`.
    """
    from salun_core.registry.holds import hold_version
    from salun_core.registry.lookup import resolve
    from salun_core.storage import open_store
    from salun_core.times import utc_clock

    opened = open_store(store)
    line, digest = resolve(opened, version)
    held = hold_version(opened, line, digest, who(actor), reason, utc_clock)
    emit_facts({"held": f"{line}@{digest}", "by": held.by, "since": held.at, "reason": held.reason})


def release(version: Version, store: Store) -> None:
    """Remove the hold of a version.

    The next purge treats it like any other version.
    """
    from salun_core.registry.holds import release_version
    from salun_core.registry.lookup import resolve
    from salun_core.storage import open_store

    opened = open_store(store)
    line, digest = resolve(opened, version)
    held = release_version(opened, line, digest)
    emit_facts({"released": f"{line}@{digest}", "was_held_by": held.by, "since": held.at, "reason": held.reason})
