"""The terms of a sweep: which recipes are tried one after the other, and when a batch is due."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from salun_core.config import Document

LEASE_SECONDS = 26 * 3600  # longer than the longest step of a run may take


class Rung(Document):
    """One recipe of the ladder."""

    method: str = Field(description="the unlearning method")
    density: float = Field(default=0.5, gt=0, le=1, description="share of the weights that may change")
    method_config: dict[str, Any] = Field(default={}, description="what differs from the method's defaults")


class Terms(Document):
    """How a sweep batches, and what it tries."""

    ladder: list[Rung] = Field(
        min_length=1, description="the recipes; after a refusal the next is tried, and after the last a person decides"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of each run")
    policy_uri: str = Field(default="auto", description="the gate policy")
    max_requests: Annotated[int, Field(ge=1, le=1000)] = Field(default=64, description="requests of one run, at most")
    min_requests: Annotated[int, Field(ge=1)] = Field(
        default=16, description="a batch of so many is due even when none waits long"
    )
    max_wait_hours: Annotated[float, Field(ge=0)] = Field(
        default=24.0, description="a batch is due when its oldest request waits longer"
    )
    deadline_days: Annotated[float, Field(ge=0)] = Field(
        default=8.0, description="a batch is due when one of its months ends so soon"
    )
    max_forget_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="share of the training data that one run forgets, at most; concepts do not count"
    )
    max_attempts: Annotated[int, Field(ge=1)] = Field(default=10, description="tries of a request, at most")
    lease_seconds: Annotated[int, Field(ge=1, le=7 * 86400)] = Field(
        default=LEASE_SECONDS, description="how long the model line is held after the last sign of life"
    )
