"""The run form: the parameters of the pipelines, with their defaults, bounds and descriptions.

This is the only source. `salun run` and `salun sweep` build their options from it, and the pipelines their parameters.
The components repeat the defaults, because their source runs in a container of its own: compiling the pipelines checks
them. The module imports neither torch nor boto3, so that `salun --help` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field

from salun_core.config import Document, parse, parse_text
from salun_core.methods.recipe import DEFAULT_METHOD, Recipe
from salun_core.sweeps.policy import BatchLimits


class RunForm(Document):
    """The parameters that a run and a sweep share."""

    model_line: str = Field(description="Name of the model line; the run starts from its HEAD.")
    store_uri: str = Field(description="The object store of model lines and requests, as s3://bucket/prefix.")

    method: str = Field(
        default=DEFAULT_METHOD,
        description="The unlearning method. default: salun_adaptive for classifiers, salun for diffusion models. With "
        "tune also auto, or several names separated by commas: the search chooses one. In a sweep, the cause of a "
        "refusal decides which recipe comes next.",
    )
    density: float = Field(
        default=0.5, gt=0, le=1, description="Share of the weights that may change, above 0 and at most 1."
    )
    policy_uri: str = Field(
        default="auto",
        description="The gate policy: auto (by the kind of model), a shipped policy, a file or an s3:// address.",
    )
    method_config: dict[str, Any] = Field(
        default={}, description='Settings that replace the method\'s defaults, as JSON such as {"epochs": 5}.'
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the random labels, the order of the data and the augmentation."
    )
    retrain_reference: bool = Field(
        default=False, description="Also train a model from scratch without the forget set, and compare with it. Slow."
    )
    tune: bool = Field(
        default=False,
        description="Search density and settings, and with auto the method, on validation data, within the policy's "
        "margins; classifiers only.",
    )
    tune_budget: str = Field(
        default="20e",
        coerce_numbers_to_str=True,
        description="Budget of the search: passes (200000), time (90s, 15m, 2h) or epochs (20e).",
    )
    extra_metrics: str = Field(
        default="",
        description="Extra metrics, such as lira=16,relearn,probe,decile,seeds=3; with a reference also kl,tow.",
    )
    evaluation_samples: str = Field(
        default="20000",
        coerce_numbers_to_str=True,
        description="Most retained, and most test images that the evaluation of a classifier measures. Of more images "
        "it draws a sample and gives intervals; all measures every image.",
    )

    @property
    def recipe(self) -> Recipe:
        """What the run does; of a sweep, what it tries first."""
        return Recipe(method=self.method, density=self.density, method_config=self.method_config, seed=self.seed)


class UnlearningForm(RunForm):
    """The parameters of one unlearning run: those of the pipeline salun-unlearning, and of `run.yaml`."""

    forget_manifest_uri: str = Field(
        description="Address of the forget set: a frozen manifest, a forget target or a list of targets."
    )


class DeletionSweepForm(BatchLimits, RunForm):
    """The parameters of a sweep: those of the pipeline salun-deletion-sweep."""

    dry_run: bool = Field(
        default=False, description="Report what would be claimed and how much would be purged, and write nothing."
    )


F = TypeVar("F", bound=RunForm)


def read_form(kind: type[F], given: Mapping[str, Any]) -> F:
    """Build a run form from the parameters of a step, which kfp passes by name; UsageError lists all faults.

    Settings of a method are JSON text, and what the form does not have is left out.
    """
    fields = {name: value for name, value in given.items() if name in kind.model_fields}
    if isinstance(text := fields.get("method_config"), str):
        fields["method_config"] = parse_text(text, "method_config") if text.strip() else {}
    return parse(kind, fields, "the run form")
