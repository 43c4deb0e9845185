"""What a suite's schema cannot say: methods that exist, settings that they take, the controls, what can be forgotten.

All of it works on plain data, so that these faults are listed beside those of the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from salun_core.errors import UsageError

if TYPE_CHECKING:
    from salun_core.bench.suite import Entry

Plain = Mapping[str, Any]
_FORGETS = {
    "classification": ("random", "class", "subject", "sequence"),
    "class-conditional": ("class",),
    "text-to-image": ("class", "concept"),
}


def suite_faults(data: Any, entry: type[Entry]) -> list[str]:  # noqa: ANN401 - whatever the file held
    """List the faults of a suite that its schema does not find.

    Args:
        data: what YAML gave; parts that the schema refuses are passed over.
        entry: the document of a row.
    """
    if not isinstance(data, dict) or data.get("kind") not in _FORGETS:
        return []
    kind, shared = data["kind"], data.get("methods")
    given = data.get("sizes")
    sizes = {name: size for name, size in given.items() if isinstance(size, dict)} if isinstance(given, dict) else {}
    ways = sorted({_searches(kind, size) for size in sizes.values() if not size.get("methods")}) or [False]
    found = [fault for way in ways if shared for fault in _of_methods(kind, shared, "methods", entry, way)]
    for name, size in sizes.items():
        own = size.get("methods")
        if own or not shared:
            found += _of_methods(kind, own, f"sizes.{name}.methods", entry, _searches(kind, size))
        found += _of_size(kind, size, f"sizes.{name}")
    return list(dict.fromkeys(found))


def _searches(kind: str, size: Plain) -> bool:
    return kind == "classification" and size.get("search") is not None


def _of_methods(kind: str, rows: Any, where: str, entry: type[Entry], searched: bool) -> Iterator[str]:  # noqa: ANN401
    if not isinstance(rows, list) or not rows:
        yield f"{where}: there are none"
        return
    entries: list[Entry] = []
    for number, row in enumerate(rows):
        try:
            one = entry.model_validate(row)
        except ValidationError:
            continue  # the schema says why
        entries.append(one)
        yield from (f"{where}.{number}: {fault}" for fault in _of_entry(kind, one, searched and one.search))
    slugs = [item.slug for item in entries]
    yield from (f"{where}: {name!r} occurs twice" for name in sorted({name for name in slugs if slugs.count(name) > 1}))
    if len(entries) == len(rows):
        yield from (f"{where}: {fault}" for fault in _missing_controls(entries, searched))


def _of_entry(kind: str, row: Entry, searched: bool) -> Iterator[str]:
    try:
        needs_mask = _needs_mask(kind, row.method)
    except UsageError as error:
        yield str(error)
        return
    if row.method == "retrain":
        yield "retrain is the reference, no row: ask for it by `retrain: {}` of the size"
    if needs_mask and row.mask == "none":
        yield f"{row.method} needs a mask: saliency, or random for the control"
    if not needs_mask and row.mask != "none":
        yield f"{row.method} takes no mask"
    if row.density is not None and row.mask == "none":
        yield "a density goes with a mask, and only a mask does"
    if row.density is None and row.mask != "none" and not searched:
        yield "a mask goes with a density: it is searched for only where the size has a `search` and the row its part"
    if row.budget is not None and not searched:
        yield "a budget goes with a search: the size has none, or the row takes no part in it"
    if "seed" in row.config:
        yield "config sets a seed: the suite's `seeds` do"
    yield from _refused(lambda: _space(row) if searched else _method_config(kind, row))


def _needs_mask(kind: str, method: str) -> bool:
    if kind == "classification":
        from salun_core.unlearn import get_method

        return get_method(method).needs_mask
    from salun_core.diffusion import get_generation_method

    return get_generation_method(method).needs_mask


def _method_config(kind: str, row: Entry) -> None:
    if kind == "classification":
        from salun_core.unlearn import method_config

        method_config(row.method, row.config)
    else:
        from salun_core.diffusion import generation_config

        generation_config(row.method, row.config)


def _space(row: Entry) -> None:
    from salun_core.unlearn.tuning.space import Space

    Space.of(row.method, row.config, row.density)


def _missing_controls(entries: Sequence[Entry], searched: bool) -> Iterator[str]:
    """A table must show what the saliency is worth: beside a random mask of its density, and beside none.

    Where settings are searched for, the controls get the same search; a row as written, or with a budget of its own,
    then needs none of its own.
    """
    equals = [row for row in entries if (row.search and row.budget is None) or not searched]
    if not any(row.mask == "saliency" for row in equals):
        equals = list(entries)
    salient = [row for row in equals if row.mask == "saliency"]
    alike = "its density, its config and its search" if searched else "its density and its config"
    for row in salient:
        wanted = (row.method, "random", row.density, row.config)
        if not any((other.method, other.mask, other.density, other.config) == wanted for other in equals):
            yield f"{row.name!r} has no control: {row.method} with mask random, {alike}"
    if salient and not any(row.method == "random_label" for row in equals):
        yield "there is no control without a mask: random_label with mask none" + (", searched" if searched else "")


def _of_size(kind: str, size: Plain, where: str) -> Iterator[str]:
    forget, model = size.get("forget"), size.get("model")
    wanted = forget.get("kind") if isinstance(forget, dict) else None
    if wanted in {"random", "class", "subject", "concept", "sequence"} and wanted not in _FORGETS[kind]:
        yield f"{where}.forget: a {kind} model forgets {' or '.join(_FORGETS[kind])}, not {wanted}"
    if isinstance(forget, dict) and wanted == "sequence":
        yield from (f"{where}.forget: {fault}" for fault in _of_sequence(forget))
    yield from (f"{where}.search: {fault}" for fault in _of_search(kind, size))
    seeds = size.get("seeds")
    if isinstance(seeds, list) and any(seeds.count(seed) > 1 for seed in seeds):
        yield f"{where}.seeds: a seed occurs twice"
    if isinstance(model, dict):
        yield from (f"{where}.model: {fault}" for fault in _of_model(kind, model, size))
    judge = size.get("judge")
    if kind == "classification" and judge is not None:
        yield f"{where}.judge: a classifier needs none"
    if isinstance(judge, dict) and isinstance(judge.get("training", {}), dict):
        yield from (f"{where}.judge: {fault}" for fault in _refused(lambda: _training(judge.get("training", {}))))


def _of_sequence(forget: Plain) -> Iterator[str]:
    steps = forget.get("steps")
    named = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    whole = [step for step in named if step.get("kind") in {"class", "subject"}]
    if any(whole.count(step) > 1 for step in whole):
        yield "a class or a subject occurs twice: nothing of it is left to forget"


def _of_search(kind: str, size: Plain) -> Iterator[str]:
    if size.get("search") is None:
        return
    if kind != "classification":
        yield "only the settings of classifiers are searched for: leave it out"
    data = size.get("data")
    if isinstance(data, dict) and data.get("validation_fraction", 1) == 0:
        yield "there are no held-out images to search on: data.validation_fraction is 0"


def _of_model(kind: str, model: Plain, size: Plain) -> Iterator[str]:
    folder, architecture = model.get("folder"), model.get("architecture")
    if folder is None and size.get("data") is None:
        yield "it is trained here, and the size names no data"
    if folder is None and kind == "classification" and not architecture:
        yield "a classifier needs an architecture, or a folder"
    if kind != "classification" and architecture:
        yield "a diffusion model has a recipe: settings under `training`, no architecture"
    settings = model.get("training", {})
    if folder is not None and settings:
        yield "a model in a folder is not trained: leave `training` out"
    elif isinstance(settings, dict):
        if "seed" in settings:
            yield "training sets a seed: the suite's `seeds` do"
        yield from _refused(lambda: _training(settings) if kind == "classification" else _recipe(kind, settings))
    retrain = size.get("retrain")
    if kind == "classification" and isinstance(retrain, dict) and isinstance(settings, dict):
        yield from _refused(lambda: _training({**settings, **retrain}))
    elif kind != "classification" and isinstance(retrain, dict):
        yield from _refused(lambda: _retrain(retrain))


def _training(settings: Plain) -> None:
    from salun_core.steps.training import training_config

    training_config(settings)


def _recipe(kind: str, settings: Plain) -> None:
    from salun_core.config import parse
    from salun_core.diffusion.recipes import DdpmRecipe, StableDiffusionRecipe

    parse(DdpmRecipe if kind == "class-conditional" else StableDiffusionRecipe, dict(settings), "recipe")


def _retrain(settings: Plain) -> None:
    from salun_core.diffusion import generation_config

    generation_config("retrain", settings)


def _refused(check: Callable[[], None]) -> Iterator[str]:
    try:
        check()
    except UsageError as error:
        yield f"{error.what}: {error.why}"
