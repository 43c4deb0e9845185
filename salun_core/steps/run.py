"""The whole pipeline in one process: what `salun run` does, without Kubeflow."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from salun_core.config import Document
from salun_core.evaluation import Evidence
from salun_core.steps.evaluation import evaluate
from salun_core.steps.fetch import fetch_model
from salun_core.steps.mask import compute_mask
from salun_core.steps.observe import RunRef
from salun_core.steps.publishing import REPORT, Published, gate_and_publish
from salun_core.steps.unlearning import run_unlearning


class RunConfig(Document):
    """`run.yaml`: the same parameters as the pipeline's run form."""

    model_line: str = Field(description="name of the model line")
    forget_manifest_uri: str = Field(description="forget targets: a file or an s3:// address")
    store_uri: str = Field(description="s3://bucket/prefix")
    method: str = Field(default="salun", description="a name of METHODS")
    density: float = Field(default=0.5, gt=0, le=1, description="share of salient weights")
    policy_uri: str = Field(
        default="auto", description="gate policy: name, file or s3:// address; auto: by the kind of model"
    )
    method_config: dict[str, object] = Field(default={}, description="what differs from the method's defaults")
    seed: int = Field(default=0, ge=0, description="of the loop")
    retrain_reference: bool = Field(default=False, description="also retrain without the set, to compare")


@dataclass(frozen=True)
class RunOutcome:
    """What a run made: its id, the parent it started from, evidence, and what was published."""

    run: str
    parent: str
    evidence: Evidence
    published: Published
    report: Path


def new_run_id() -> str:
    """Return a fresh run id such as `run-20260131-120000-3f9a1c`."""
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def run_all(
    config: RunConfig, folder: Path, say: Callable[[str], None] = lambda step: None, run: str | None = None
) -> RunOutcome:
    """Run the five steps one after the other.

    Args:
        config: the parameters.
        folder: working folder; each step writes below it.
        say: called with the name of each step before it starts.
        run: id of the run; a fresh one by default.

    Returns:
        What was made.

    Raises:
        GateRefusedError: the gate refused; nothing was published.
        SalunError: any step failed.
    """
    run = run or new_run_id()
    ours = RunRef(config.store_uri, run)
    line, forget = config.model_line, config.forget_manifest_uri
    before, after, mask = folder / "before", folder / "after", folder / "mask.safetensors"
    say("fetch_model")
    fetched = fetch_model(config.store_uri, line, forget, before, ours)
    say("compute_mask")
    method, overrides = config.method, config.method_config
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
