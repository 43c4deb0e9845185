"""The policy of a sweep: its recipes and their escalation, when a batch is due, and what follows a refusal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field

from salun_core.config import Document
from salun_core.gate import Cause
from salun_core.methods.recipe import Escalation, Level, Role
from salun_core.requests.schema import Review, Tried
from salun_core.storage.documents import one_line
from salun_core.times import due_after_one_month

MAX_ATTEMPTS = 10
LEASE_SECONDS = 600  # every step renews it while it works, so a run that died blocks its line no longer than this


class BatchLimits(Document):
    """When a batch of requests is due, and how large it may be."""

    min_requests: int = Field(default=16, ge=1, description="A batch of this many requests is due at once.")
    max_requests: int = Field(default=64, ge=1, le=1000, description="Maximum number of requests in one run.")
    max_wait_hours: float = Field(
        default=24.0,
        ge=0,
        le=24 * 366,
        description="A batch is due when its oldest request has waited for this many hours.",
    )
    max_forget_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Maximum share of the training data that one run forgets.",
    )


class SweepPolicy(Escalation, BatchLimits):
    """How a sweep forms batches, and which recipes it tries."""

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

    `received` are times in UTC; the `returned` ones, from an earlier run, do not wait for more.
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
    """Return when a batch is due at the latest, if no further request arrives; None if no request waits."""
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
        group: the half of the batch that is tried together.
        reason: for the audit log: why, and what comes next.
        review: it is held for a person, who must review this.
        tried: recipes that were refused; None keeps those of its last event.
    """

    give_up: bool
    level: int = 0
    group: str | None = None
    reason: str = ""
    review: Review | None = None
    tried: Sequence[Tried] | None = None


@dataclass(frozen=True)
class Limits:
    """When the requests of a run are given up; the run's record holds them, so that settling needs no configuration."""

    levels: Sequence[Level]
    attempts: int = MAX_ATTEMPTS


@dataclass(frozen=True)
class Refused:
    """Why the gate refused a run, from its decision; no causes if the decision is missing."""

    causes: frozenset[Cause] = frozenset()
    advice: Mapping[Cause, str] | None = None

    @property
    def review(self) -> Cause | None:
        """The cause that no recipe changes, so that a person must review the requests; None if a recipe may help.

        Samples that are too few count only if no rule failed for a reason that a recipe changes.
        """
        for cause in (Cause.INTEGRITY, Cause.NOT_MEASURED):
            if cause in self.causes:
                return cause
        return Cause.TOO_FEW_SAMPLES if self.causes == {Cause.TOO_FEW_SAMPLES} else None


_TOO_MUCH = frozenset({Cause.DAMAGED, Cause.OVER_FORGOTTEN})


def next_level(levels: Sequence[Level], tried: Mapping[int, Collection[Cause]]) -> int | None:
    """Return the level that follows from all refusals so far, or None if no recipe is left.

    Each refusal bounds the strength: what did not forget is too weak, what damaged or forgot too much is too strong. So
    damage never leads to a stronger recipe, and no strength is tried twice. If no strength lies between the bounds
    (also since one recipe did both), another method follows, then a full retraining. A method that was only too weak at
    every strength leads to the retraining directly. There is no way back from another method or from a retraining. A
    level in `tried` without a cause counts as not forgotten.
    """
    too_weak, too_strong = [], []
    known = {number: causes for number, causes in tried.items() if number < len(levels)}
    for number, causes in known.items():
        if levels[number].role is not Role.STRENGTH:
            continue
        if _TOO_MUCH & set(causes):
            too_strong.append(levels[number].strength)
        if Cause.NOT_FORGOTTEN in causes or not _TOO_MUCH & set(causes):
            too_weak.append(levels[number].strength)
    left = {role: [n for n, level in enumerate(levels) if level.role is role and n not in known] for role in Role}
    roles = {levels[number].role for number in known}
    between = [
        number
        for number in left[Role.STRENGTH]
        if all(levels[number].strength > strength for strength in too_weak)
        and all(levels[number].strength < strength for strength in too_strong)
    ]
    if between and roles <= {Role.STRENGTH}:
        return min(between, key=lambda number: levels[number].strength * (1 if too_weak else -1))
    if Role.RETRAIN in roles or (left[Role.RETRAIN] and not too_strong and roles <= {Role.STRENGTH}):
        return next(iter(left[Role.RETRAIN]), None)
    return next(iter([*left[Role.OTHER], *left[Role.RETRAIN]]), None)


def last_resort(levels: Sequence[Level], tried: Mapping[int, Collection[Cause]]) -> int:
    """Return the level of a request that exceeds the limits of a run, or that a person retries after all recipes.

    It is the retraining, else another method, else the strongest recipe, or the gentlest one if a recipe did harm.
    """
    for role in (Role.RETRAIN, Role.OTHER):
        for number, level in enumerate(levels):
            if level.role is role:
                return number
    harmed = any(_TOO_MUCH & set(causes) for causes in tried.values())
    return max(range(len(levels)), key=lambda number: levels[number].strength * (-1 if harmed else 1))


def after_refusal(
    members: Mapping[str, int],
    run: str,
    level: int,
    limits: Limits,
    refused: Refused,
    tried: Sequence[Tried] = (),
) -> Mapping[str, Next]:
    """Decide about the requests of a run that the gate refused; the cause decides.

    If no recipe can help, all are held for a person. Else the batch is halved, and each half tries the level that
    `next_level` returns. So a request that no recipe can erase ends alone and does not delay the others. If no recipe
    is left, the halves repeat the last one, unless it did harm; a request that is alone fails. `members` gives the
    attempt by request, in the order of the batch.
    """
    causes = ", ".join(sorted(refused.causes))
    told = f" ({causes})" if causes else ""
    cause = refused.review
    if cause is not None:
        advice = (refused.advice or {}).get(cause, "")
        text = f"the gate refused the run ({cause}: {cause.words}); no recipe changes that, so it is held for review"
        reason = one_line(f"{text}; next: {advice}" if advice else text)
        return dict.fromkeys(members, Next(False, level, None, reason, Review(cause.value)))
    known = {item.rung: frozenset(item.causes) for item in tried} | {level: refused.causes}
    history = [Tried(rung=number, causes=sorted(why)) for number, why in sorted(known.items())]
    found, levels = next_level(limits.levels, known), limits.levels
    repeatable = not refused.causes & _TOO_MUCH or (level < len(levels) and levels[level].role is Role.RETRAIN)
    if found is None and (len(members) == 1 or not repeatable):
        who = "it alone" if len(members) == 1 else "the run"
        reason = f"the gate refused {who}{told}, and none of {len(levels)} recipes is left: a person decides"
        return dict.fromkeys(members, Next(True, level, None, reason, tried=history))
    reason = one_line(f"the gate refused the run{told}; next: {_step(levels, level, found)}")
    return {
        name: _retry(attempt, level if found is None else found, group, reason, limits, history)
        for name, attempt, group in _halves(members, run)
    }


def _step(levels: Sequence[Level], level: int, found: int | None) -> str:
    """Return in words what comes after a refused level."""
    if found is None:
        return "the same recipe for half of the batch"
    there = levels[found]
    if there.role is not Role.STRENGTH:
        kind = "a full retraining" if there.role is Role.RETRAIN else "another method"
    else:
        before = levels[level].strength if level < len(levels) else 0
        kind = "a stronger recipe" if there.strength > before else "a gentler recipe"
    return f"{kind} ({there.words})" if there.words else kind


def after_failure(
    members: Mapping[str, int], run: str, level: int, group: str | None, limits: Limits
) -> Mapping[str, Next]:
    """Decide about the requests of a run that ended without a verdict; from the second time on they are halved.

    `members` gives the attempt by request, in the order of the batch; all try the same level again.
    """
    first = min(members.values(), default=1) == 1
    halves = [(name, attempt, group) for name, attempt in members.items()] if first else _halves(members, run)
    return {name: _retry(attempt, level, half, "the run failed", limits) for name, attempt, half in halves}


def after_interruption(
    members: Mapping[str, int], level: int, group: str | None, reason: str, limits: Limits
) -> Mapping[str, Next]:
    """Decide about the requests of a run that was not at fault: all are tried again unchanged."""
    return {name: _retry(attempt, level, group, reason, limits) for name, attempt in members.items()}


def _halves(members: Mapping[str, int], run: str) -> list[tuple[str, int, str | None]]:
    middle = (len(members) + 1) // 2
    return [
        (name, attempt, f"{run}-{'a' if index < middle else 'b'}")
        for index, (name, attempt) in enumerate(members.items())
    ]


def _retry(
    attempt: int,
    level: int,
    group: str | None,
    reason: str,
    limits: Limits,
    tried: Sequence[Tried] | None = None,
) -> Next:
    if attempt >= limits.attempts:
        ended = one_line(f"{reason.partition('; next: ')[0]}; all {limits.attempts} attempts are used up")
        return Next(True, level, None, ended, tried=tried)
    return Next(False, level, group, reason, tried=tried)
