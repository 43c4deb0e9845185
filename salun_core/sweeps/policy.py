"""The policy of a sweep: recipes and their escalation, when a batch is due, and what follows a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydantic import Field

from salun_core.config import Document
from salun_core.times import due_after_one_month

LEASE_SECONDS = 26 * 3600  # longer than the longest step of a run may take


class Recipe(Document):
    """One recipe of the ladder."""

    method: str = Field(description="the unlearning method")
    density: float = Field(default=0.5, gt=0, le=1, description="share of the weights that may change")
    method_config: dict[str, Any] = Field(default={}, description="what differs from the method's defaults")


class BatchLimits(Document):
    """When a batch of requests is due, and how large it may be."""

    min_requests: int = Field(default=16, ge=1, description="A batch of this many requests is due at once.")
    max_requests: int = Field(default=64, ge=1, le=1000, description="Maximum number of requests in one run.")
    max_wait_hours: float = Field(
        default=24.0, ge=0, description="A batch is due when its oldest request has waited for so many hours."
    )
    max_forget_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Maximum share of the training data that one run forgets.",
    )


class SweepPolicy(BatchLimits):
    """How a sweep batches, and which recipes it tries."""

    recipes: list[Recipe] = Field(
        min_length=1, description="the recipes; after a refusal the next is tried, and after the last a person decides"
    )
    seed: int = Field(default=0, ge=0, description="of each run")
    policy_uri: str = Field(default="auto", description="the gate policy")
    deadline_days: float = Field(default=8.0, ge=0, description="a batch is due when one of its months ends so soon")
    max_attempts: int = Field(default=10, ge=1, description="tries of a request, at most")
    lease_seconds: int = Field(
        default=LEASE_SECONDS,
        ge=1,
        le=7 * 86400,
        description="how long the model line is held after the last sign of life",
    )


def why_due(received: Sequence[datetime], returned: int, now: datetime, policy: SweepPolicy) -> str | None:
    """Say why a batch is due, or return None while it may wait for more requests.

    Args:
        received: when each waiting request was received (UTC).
        returned: how many of them came back from an earlier run: these never wait for company.
        now: the time.
        policy: of the sweep.
    """
    if not received:
        return None
    oldest = min(received)
    if returned:
        return f"{returned} came back from an earlier run"
    if len(received) >= policy.min_requests:
        return f"{len(received)} waiting, and {policy.min_requests} make a batch"
    if now - oldest > timedelta(hours=policy.max_wait_hours):
        return f"the oldest has waited for more than {policy.max_wait_hours:g} hours"
    if due_after_one_month(oldest) - now < timedelta(days=policy.deadline_days):
        return f"a month ends within {policy.deadline_days:g} days"
    return None


@dataclass(frozen=True)
class Next:
    """What becomes of a request that a run did not erase: another try, or none.

    Args:
        give_up: whether it becomes a dead letter.
        rung: the recipe of the next try.
        group: the half of the batch that tries again together.
        reason: for the audit log.
    """

    give_up: bool
    rung: int = 0
    group: str | None = None
    reason: str = ""


def after_refusal(members: Mapping[str, int], run: str, rung: int, policy: SweepPolicy) -> Mapping[str, Next]:
    """Decide about the requests of a run that the gate refused.

    The batch is halved and each half tries the next recipe, so that a request that no recipe can erase ends alone
    and does not keep the others back; alone at the last recipe, it becomes a dead letter.

    Args:
        members: attempt by request, in the order of the batch.
        run: the refused run.
        rung: the recipe that was refused.
        policy: of the sweep.
    """
    last = len(policy.recipes) - 1
    alone = len(members) == 1
    return {
        name: Next(True, rung, None, f"the gate refused it alone, with the last of {last + 1} recipes")
        if alone and rung >= last
        else _again(attempt, min(rung + 1, last), group, "the gate refused the run", policy)
        for name, attempt, group in _halves(members, run)
    }


def after_failure(
    members: Mapping[str, int], run: str, rung: int, group: str | None, policy: SweepPolicy
) -> Mapping[str, Next]:
    """Decide about the requests of a run that ended without a verdict; from the second time on they are halved.

    Args:
        members: attempt by request, in the order of the batch.
        run: the run that failed.
        rung: its recipe, which is tried again.
        group: the half that the run was.
        policy: of the sweep.
    """
    again = _halves(members, run) if min(members.values()) > 1 else [(name, n, group) for name, n in members.items()]
    return {name: _again(attempt, rung, half, "the run failed", policy) for name, attempt, half in again}


def after_stale(members: Mapping[str, int], rung: int, group: str | None, policy: SweepPolicy) -> Mapping[str, Next]:
    """Decide about the requests of a run whose parent was superseded meanwhile: all try again as they were."""
    reason = "another version was published meanwhile"
    return {name: _again(attempt, rung, group, reason, policy) for name, attempt in members.items()}


def _halves(members: Mapping[str, int], run: str) -> list[tuple[str, int, str | None]]:
    middle = (len(members) + 1) // 2
    return [
        (name, attempt, f"{run}-{'a' if index < middle else 'b'}")
        for index, (name, attempt) in enumerate(members.items())
    ]


def _again(attempt: int, rung: int, group: str | None, reason: str, policy: SweepPolicy) -> Next:
    if attempt >= policy.max_attempts:
        return Next(True, rung, None, f"{reason}; all {policy.max_attempts} attempts are used up")
    return Next(False, rung, group, reason)
