"""Shared parts of the methods of all tasks: a row of the method table, its configuration and its result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from salun_core import plugins
from salun_core.config import parse
from salun_core.errors import UsageError, unknown_name
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.config import LoopConfig
from salun_core.methods.recipe import Recipe
from salun_core.saliency import SaliencyMask

C = TypeVar("C", bound=LoopConfig)


Range = tuple[float, float, bool]
"""Of a setting in a search: lowest, highest, logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Method(Generic[C]):
    """One row of a table of methods. Labels, listings, search space and the table of the docs are made from it.

    Args:
        base_config: what the configuration classes of this kind of model extend.
        config_type: configuration class. Its fields are all that the method reads.
        about: what it does, in one line.
        source: publication.
        needs_mask: whether it trains salient weights only.
        needs_original: whether it reads the outputs of the original model.
        needs: what else it needs, in words.
        fresh_start: whether it starts from fresh weights.
        defaults: overrides of the configuration class's defaults.
        search: ranges of its own settings in a search; the learning rate has one anyway.
        grows: whether its run of n epochs at a constant rate is a prefix of a longer run, so that one trial of a
            search measures every length.
        shardable: whether the weights may be sharded over processes: its loss reads them in the model's forward pass
            only, and runs as many passes in each process.
    """

    base_config: ClassVar[type[LoopConfig]] = LoopConfig
    config_type: type[C]
    about: str = ""
    source: str = ""
    needs_mask: bool = False
    needs_original: bool = False
    needs: str = ""
    fresh_start: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    search: Mapping[str, Range] = field(default_factory=dict)
    grows: bool = False
    shardable: bool = False

    def check(self, name: str, config: C) -> None:
        """Check settings that the configuration class cannot check, because they depend on the method.

        Raises:
            UsageError: the configuration does not fit the method.
        """

    def check_sharding(self, name: str, config: LoopConfig) -> None:
        """Raise `UsageError` if the weights are sharded but the method or a setting needs whole ones."""
        if config.sharding == "none":
            return
        if not self.shardable:
            raise UsageError(
                f"{name} cannot shard the weights",
                "it reads or edits whole weights",
                "leave `sharding` out, or choose the method salun",
            )
        if getattr(config, "forget_parts", 1) > 1:
            raise UsageError(
                "sharded weights and forget_parts exclude each other",
                "each part begins with a copy of the whole model",
                "leave one out",
            )
        if getattr(config, "selection", "") == "text" or config.state_place != "none":
            raise UsageError(
                "sharding: fsdp does not go with `selection: text` or `offload`",
                "they move whole weights",
                "leave one of them out",
            )

    def check_row(self, name: str) -> None:
        """Raise `UsageError` if a plug-in's row lacks a configuration class, or has not exactly one way to unlearn.

        The rows that ship are checked by tests.
        """
        own: object = self.config_type
        if not isinstance(own, type) or not issubclass(own, self.base_config):
            raise UsageError(
                f"method {name} has no configuration class",
                f"its config_type is {own!r}",
                f"set config_type to {self.base_config.__name__}, or to a class that extends it",
            )
        if sum(way is not None for way in self.ways) != 1:
            raise UsageError(
                f"method {name} cannot unlearn",
                "it needs an `edit`, or the loss or phases of a training, and not both",
                "give its row exactly one of them",
            )

    @property
    def ways(self) -> tuple[object, ...]:
        """The functions of which exactly one is given: those of a training and of a closed-form edit."""
        return ()

    def with_more_weights(self, recipe: Recipe) -> list[Recipe]:
        """Return a recipe halfway to all weights, and one with all of them; none if the density is not read or is 1."""
        densities = dict.fromkeys((recipe.density, (1 + recipe.density) / 2, 1.0)) if self.needs_mask else {}
        return [recipe.model_copy(update={"density": density}) for density in densities][1:]

    def check_mask(self, name: str, mask: SaliencyMask | None) -> None:
        """Raise `UsageError` unless a mask is given if and only if the method needs one."""
        if self.needs_mask and mask is None:
            remedy = "compute one with `salun mask`, in Python with `salun_core.mask`"
            raise UsageError(f"{name} needs a mask", "it trains salient weights only", remedy)
        if mask is not None and not self.needs_mask:
            raise UsageError(
                f"{name} takes no mask", "it would be ignored", "use the method salun, or leave the mask out"
            )


M = TypeVar("M", bound=Method[Any])


def get_method(methods: Mapping[str, M], name: str) -> M:
    """Return a method of a table by name, or the method of a plug-in that the operator allows.

    An unknown name is a `UsageError` that suggests the nearest match; a plug-in with other files is an
    `IntegrityError`.
    """
    if name in methods:
        return methods[name]
    found = plugins.load("method", name)
    if found is None:
        raise unknown_name("method", name, [*methods, *(offer.name for offer in plugins.offers("method"))])
    kind = type(next(iter(methods.values())))
    if not isinstance(found, kind):
        raise plugins.wrong_type("method", name, found, f"a {kind.__name__}, for this kind of model")
    found.check_row(name)
    return found


def resolve_config(methods: Mapping[str, Method[C]], name: str, overrides: Mapping[str, Any] | None = None) -> C:
    """Resolve a method's configuration: its own defaults, then the user's overrides.

    The `UsageError` lists all faults and, if a setting is unknown, the settings of the method.
    """
    row = get_method(methods, name)
    given = overrides or {}
    try:
        config = parse(row.config_type, {**row.defaults, **given}, f"configuration of {name}")
    except UsageError as error:
        if given.keys() <= row.config_type.model_fields.keys():
            raise
        known = ", ".join(sorted(row.config_type.model_fields))
        raise UsageError(error.what, error.why, f"{error.remedy}; the settings of {name} are {known}") from error
    row.check(name, config)
    row.check_sharding(name, config)
    return config


def settings_of(methods: Mapping[str, Method[C]], name: str, config: C | Mapping[str, Any] | None) -> C:
    """Return a configuration that is resolved already, or resolve overrides of the method's defaults.

    A configuration of another method is a `UsageError`.
    """
    if config is None or isinstance(config, Mapping):
        return resolve_config(methods, name, config)
    kind = get_method(methods, name).config_type
    if not isinstance(config, kind):
        raise UsageError(
            f"{name} takes no {type(config).__name__}",
            "it lacks settings of the method",
            f"give a {kind.__name__}, or the settings as a dict",
        )
    return config


@dataclass(frozen=True)
class UnlearnResult:
    """Result of an unlearning method.

    Args:
        model: the new network, in eval mode; the input network is unchanged.
        method: name of the method.
        config: the resolved configuration.
        history: one record per epoch; empty after a closed-form method.
        seconds: wall-clock time of the loop or the edit only.
        passes: samples that went forward and backward; a forward pass alone counts 1/3; the total is rounded up.
        changed_fraction: share of weights whose value differs from the original's, from 0 to 1; None if not measured.
        ended: what ended the run, in words, if the method decided that; else None.
        text_encoder: the new text encoder of a diffusion model, in eval mode; None if it was not trained.
    """

    model: nn.Module
    method: str
    config: LoopConfig
    history: list[EpochRecord]
    seconds: float
    passes: int
    changed_fraction: float | None = None
    ended: str | None = None
    text_encoder: nn.Module | None = None


def fresh_seed(seed: int, retained: int) -> int:
    """Return the seed of the fresh weights of a retraining from the run's and the number of samples in D_r.

    Each retraining of a line retains fewer, so the weights differ from the first weights of a training with an equal
    seed, and from those of an earlier retraining of the same line. Otherwise the weights at the end could not show that
    they do not continue those before (`Integrity.distance`).
    """
    return int.from_bytes(hashlib.sha256(f"retrain {seed} {retained}".encode()).digest()[:4])
