"""The whole pipeline in one process: what `salun run` does, without Kubeflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from salun_core.config import Document
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.optional_metrics import parse_optional_metrics, require_reference
from salun_core.methods.classification import METHODS
from salun_core.methods.method import get_method
from salun_core.steps.claim import is_generative_line
from salun_core.steps.evaluation import evaluate
from salun_core.steps.fetch import fetch_model
from salun_core.steps.mask import compute_mask
from salun_core.steps.observe import RunRef
from salun_core.steps.publishing import REPORT, Published, gate_and_publish
from salun_core.steps.unlearning import run_unlearning
from salun_core.sweeps.runs import new_run_id
from salun_core.tasks import resolved_config
from salun_core.tasks.classification.tuning import TuningOptions
from salun_core.tasks.resolve import check_policy
from salun_core.tuning import DEFAULT_BUDGET, parse_budget
from salun_core.tuning.search import OnTrial
from salun_core.tuning.space import Space


class RunSettings(Document):
    """What a run and a sweep are told alike: the same parameters as the pipelines' run forms."""

    model_line: str = Field(description="name of the model line")
    store_uri: str = Field(description="s3://bucket/prefix")
    method: str = Field(default="salun", description="a name of METHODS")
    density: float = Field(default=0.5, gt=0, le=1, description="share of salient weights")
    policy_uri: str = Field(
        default="auto", description="gate policy: name, file or s3:// address; auto: by the kind of model"
    )
    method_config: dict[str, Any] = Field(default={}, description="what differs from the method's defaults")
    seed: int = Field(default=0, ge=0, description="of the loop")
    retrain_reference: bool = Field(default=False, description="also retrain without the set, to compare")
    tune: bool = Field(default=False, description="search for what method_config leaves open, within the policy")
    tune_budget: str = Field(
        default=DEFAULT_BUDGET,
        coerce_numbers_to_str=True,
        description="what the search may spend: passes (200000), time (90s, 15m, 2h) or epochs (20e)",
    )
    also: str = Field(default="", description="more measurements, such as lira=16,relearn,probe,decile,seeds=3")

    def check(self) -> None:
        """Refuse before any work what would only fail after hours of it.

        Raises:
            UsageError: the policy cannot be read, or asks for what nobody measures; a measurement is unknown or lacks
                the retrained model; or the model line and the method have nothing to search for.
        """
        check_policy(self.policy_uri)
        asked = parse_optional_metrics(self.also)
        require_reference(asked, self.retrain_reference)
        if (self.tune or asked) and is_generative_line(self.store_uri, self.model_line):
            raise UsageError(
                f"{self.model_line} is a line of diffusion models",
                "`tune` and `also` are for classifiers",
                "leave them out",
            )
        if self.tune:
            parse_budget(self.tune_budget, images=1)
            if not get_method(METHODS, self.method).fresh_start:  # such a method runs by its recipe
                Space.of(self.method, {**self.method_config, "seed": self.seed})


class RunConfig(RunSettings):
    """`run.yaml`: the same parameters as the pipeline's run form."""

    forget_manifest_uri: str = Field(description="forget targets: a file or an s3:// address")


@dataclass(frozen=True)
class RunOutcome:
    """What a run made: its id, the parent it started from, evidence, and what was published."""

    run: str
    parent: str
    evidence: Evidence
    published: Published
    report: Path


def run_all(
    config: RunConfig,
    folder: Path,
    say: Callable[[str], None] = lambda step: None,
    run: str | None = None,
    on_trial: OnTrial | None = None,
) -> RunOutcome:
    """Run the five steps one after the other.

    Args:
        config: the parameters.
        folder: working folder; each step writes below it.
        say: called with the name of each step before it starts.
        run: id of the run; a fresh one by default.
        on_trial: called after each trial of a search.

    Returns:
        What was made.

    Raises:
        UsageError: the configuration asks for what there is not.
        GateRefusedError: the gate refused, or the search found no setting that it would pass; nothing was published.
        SalunError: any step failed.
    """
    config.check()
    run = run or new_run_id()
    ours = RunRef(config.store_uri, run)
    line, forget = config.model_line, config.forget_manifest_uri
    before, after, mask = folder / "before", folder / "after", folder / "mask.safetensors"
    say("fetch_model")
    method, overrides = config.method, config.method_config
    fetched = fetch_model(config.store_uri, line, forget, before, ours)
    resolved_config(before, method, {**overrides, "seed": config.seed})
    say("compute_mask")
    compute_mask(before, forget, config.density, mask, method=method, overrides=overrides, model_line=line, run=ours)
    say("unlearn")
    run_unlearning(
        before,
        mask,
        forget,
        after,
        method=method,
        overrides=overrides,
        seed=config.seed,
        model_line=line,
        run=ours,
        tune=TuningOptions(config.tune_budget, config.policy_uri, on_trial) if config.tune else None,
    )
    say("evaluate")
    evidence = evaluate(
        before,
        after,
        forget,
        folder / "evidence.json",
        folder / "evaluation.html",
        mask=mask,
        retrain_reference=config.retrain_reference,
        model_line=line,
        run=ours,
        also=config.also,
    )
    say("gate_publish")
    published = gate_and_publish(
        before,
        after,
        folder / "evidence.json",
        folder / REPORT,
        forget,
        store_uri=config.store_uri,
        model_line=line,
        parent=fetched.version,
        policy_uri=config.policy_uri,
        mask=mask,
        run=run,
    )
    return RunOutcome(run, fetched.version, evidence, published, folder / REPORT)
