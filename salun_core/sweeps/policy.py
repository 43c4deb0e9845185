"""The policy of a sweep: its recipes and their escalation, when a batch is due, and what follows a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field

from salun_core.config import Document
from salun_core.methods.recipe import Recipe
from salun_core.times import due_after_one_month

MAX_ATTEMPTS = 10
ESCALATION = 4  # recipes of each task; for records that do not hold the number
LEASE_SECONDS = 600  # every step renews it while it works, so a run that died blocks its line no longer than this


class BatchLimits(Document):
    """When a batch of requests is due, and how large it may be."""

    min_requests: int = Field(default=16, ge=1, description="A batch of this many requests is due at once.")
    max_requests: int = Field(default=64, ge=1, le=1000, description="Maximum number of requests in one run.")
    max_wait_hours: float = Field(
        default=24.0,
        ge=0,
        le=24 * 366,
        description="A batch is due when its oldest request has waited for so many hours.",
    )
    max_forget_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Maximum share of the training data that one run forgets.",
    )


class SweepPolicy(BatchLimits):
    """How a sweep forms batches, and which recipes it tries."""

    recipes: list[Recipe] = Field(
        min_length=1, description="by escalation level: each refusal tries the next; after the last a person decides"
    )
    policy_uri: str = Field(default="auto", description="the gate policy")
    policy_digest: str | None = Field(default=None, description="its digest when the sweep began; none for `auto`")
    deadline_days: float = Field(
        default=8.0, ge=0, description="a batch is due when the month of a request ends within this time"
    )
    max_attempts: int = Field(default=MAX_ATTEMPTS, ge=1, description="most attempts of a request")
    lease_seconds: int = Field(
        default=LEASE_SECONDS,
        ge=1,
        le=LEASE_SECONDS,
        description="how long the lease of the model line is valid after its last renewal",
    )


def why_due(received: Sequence[datetime], returned: int, now: datetime, policy: SweepPolicy) -> str | None:
    """Return why a batch is due, or None while it may wait for more requests.

    Args:
        received: when each waiting request was received (UTC).
        returned: how many of them an earlier run returned; these do not wait for more.
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


def due_when(received: Sequence[datetime], policy: SweepPolicy) -> datetime | None:
    """Return when a batch is due at the latest, if no further request arrives; None if no request waits.

    Args:
        received: when each waiting request was received (UTC).
        policy: of the sweep.
    """
    if not received:
        return None
    oldest = min(received)
    month = due_after_one_month(oldest) - timedelta(days=policy.deadline_days)
    return min(oldest + timedelta(hours=policy.max_wait_hours), month)


@dataclass(frozen=True)
class Next:
    """What happens to a request that a run did not erase.

    Args:
        give_up: whether it fails, so that a person must decide; else it is queued again.
        level: escalation level of its next attempt.
        group: the half of the batch that is tried together.
        reason: for the audit log.
    """

    give_up: bool
    level: int = 0
    group: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """When the requests of a run are given up; the run's record holds them, so that settling needs no configuration.

    Args:
        recipes: how many recipes the escalation has.
        attempts: most attempts of a request.
    """

    recipes: int = ESCALATION
    attempts: int = MAX_ATTEMPTS


def after_refusal(members: Mapping[str, int], run: str, level: int, limits: Limits) -> Mapping[str, Next]:
    """Decide about the requests of a run that the gate refused.

    The batch is halved and each half tries the next recipe. So a request that no recipe can erase ends alone and does
    not delay the others; alone at the last recipe, it fails.

    Args:
        members: attempt by request, in the order of the batch.
        run: the refused run.
        level: escalation level of the refused recipe.
        limits: of the run.
    """
    last = limits.recipes - 1
    if len(members) == 1 and level >= last:
        refused = Next(True, level, None, f"the gate refused it alone, with the last of {last + 1} recipes")
        return dict.fromkeys(members, refused)
    return {
        name: _retry(attempt, min(level + 1, last), group, "the gate refused the run", limits)
        for name, attempt, group in _halves(members, run)
    }


def after_failure(
    members: Mapping[str, int], run: str, level: int, group: str | None, limits: Limits
) -> Mapping[str, Next]:
    """Decide about the requests of a run that ended without a verdict; from the second time on they are halved.

    Args:
        members: attempt by request, in the order of the batch.
        run: the run that failed.
        level: escalation level of its recipe, which is tried again.
        group: the half that the run was.
        limits: of the run.
    """
    first = min(members.values(), default=1) == 1
    halves = [(name, attempt, group) for name, attempt in members.items()] if first else _halves(members, run)
    return {name: _retry(attempt, level, half, "the run failed", limits) for name, attempt, half in halves}


def after_interruption(
    members: Mapping[str, int], level: int, group: str | None, reason: str, limits: Limits
) -> Mapping[str, Next]:
    """Decide about the requests of a run that was not at fault: all are tried again unchanged.

    Args:
        members: attempt by request.
        level: escalation level of the run's recipe.
        group: the half that the run was.
        reason: what interrupted it, for the audit log.
        limits: of the run.
    """
    return {name: _retry(attempt, level, group, reason, limits) for name, attempt in members.items()}


def _halves(members: Mapping[str, int], run: str) -> list[tuple[str, int, str | None]]:
    middle = (len(members) + 1) // 2
    return [
        (name, attempt, f"{run}-{'a' if index < middle else 'b'}")
        for index, (name, attempt) in enumerate(members.items())
    ]


def _retry(attempt: int, level: int, group: str | None, reason: str, limits: Limits) -> Next:
    if attempt >= limits.attempts:
        return Next(True, level, None, f"{reason}; all {limits.attempts} attempts are used up")
    return Next(False, level, group, reason)
