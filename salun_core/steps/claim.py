"""The first step of a sweep: claim the next batch of deletion requests of a model line."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from salun_core.certificates.issue import ModelCertifier
from salun_core.config import parse
from salun_core.data import LoadedData, load_data
from salun_core.errors import ConflictError
from salun_core.methods.recipe import Recipe
from salun_core.requests.resolve import Resolver, TableResolver
from salun_core.storage.keys import probe_key
from salun_core.storage.probe import require_safe
from salun_core.sweeps.claim import Claim, Skipped, claim, preview
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.policy import SweepPolicy
from salun_core.tasks import task_named
from salun_core.tasks.line import OpenLine
from salun_core.tasks.resolve import AUTO, fetched, policy_digest
from salun_core.tasks.task import Task
from salun_core.telemetry.observe import observed
from salun_core.times import Clock, utc_clock

if TYPE_CHECKING:
    from salun_core.storage.s3 import S3Store

_PROBED = probe_key("passed.json")
_PROBE_LASTS = timedelta(days=7)


def sweep_policy(
    line: OpenLine,
    recipe: Recipe,
    *,
    tune: bool = False,
    **settings: Any,  # noqa: ANN401 - as below
) -> SweepPolicy:
    """Return the policy of a sweep: the escalation of a recipe, and other settings.

    Args:
        line: the model line; its task escalates the recipe.
        recipe: the first recipe.
        tune: whether the runs search for settings.
        settings: of `SweepPolicy`.

    Raises:
        UsageError: a setting is out of range, or the method or its configuration is wrong.
        IntegrityError: HEAD or its card is damaged.
    """
    recipes = task_to_sweep(line).escalation(recipe, tune=tune)
    digest = policy_digest(settings.get("policy_uri", AUTO))
    return parse(SweepPolicy, {**dict(recipes), "policy_digest": digest, **settings}, "the policy of the sweep")


def task_to_sweep(line: OpenLine) -> Task[Any]:
    """Return the task of a line; classification for a line without HEAD, which has nothing to claim.

    Raises:
        IntegrityError: HEAD or its card is damaged.
    """
    return task_named("classification") if line.head is None else line.task


def claim_requests(
    store: S3Store,
    line: OpenLine,
    run: str,
    policy: SweepPolicy,
    *,
    dry_run: bool = False,
    clock: Clock = utc_clock,
    on_data: Callable[[LoadedData], object] = lambda loaded: None,
) -> Claim:
    """Claim a batch for a run; see `sweeps.claim.claim`.

    Args:
        store: the store of the line.
        line: the line, as it was read for the policy.
        run: id of the run.
        policy: of the sweep.
        dry_run: describe in `reason` what would be claimed, and write nothing.
        clock: returns the time.
        on_data: called with the data that the requests were resolved against, for a run in the same process.

    Returns:
        What was claimed.

    Raises:
        StoreError: the store's conditional writes are not safe.
        UsageError: no such line, or no signing key although a certificate is due.
    """
    with observed("claim_requests", line.name, run) as metrics:
        context = SweepContext(store, clock, ModelCertifier(store))
        if dry_run:
            return preview(context, line.name, policy)
        probe_once(store)
        found = claim(context, line, run, policy, lambda opened: resolver_of(opened, on_data))
        for reason in Skipped:
            metrics.record("salun_sweep_skipped", float(found.skipped is reason), reason=reason)
        metrics.record("salun_sweep_skipped_due", found.due)
        return found


def probe_once(store: S3Store) -> None:
    """Test the conditional writes of a store before its first claim, and again after a week.

    Raises:
        StoreError: its conditional writes are not safe.
    """
    passed = store.get(_PROBED)
    if passed and passed.served and passed.served - passed.modified < _PROBE_LASTS:
        return
    require_safe(store)
    note = json.dumps({"format": "salun.probe/v1", "nonce": secrets.token_hex(8)}).encode()
    try:
        if passed is None:
            store.put_new(_PROBED, note)
        else:
            store.put_if(_PROBED, note, passed.etag)
    except ConflictError:  # another sweep passed the same test
        return


def resolver_of(line: OpenLine, on_data: Callable[[LoadedData], object] = lambda loaded: None) -> Resolver:
    """Build the resolver for a version: its split manifest, and the rows of its data set, if it came with one.

    Args:
        line: the line at the version.
        on_data: called with the data set.

    Raises:
        IntegrityError: a file of the version is gone or damaged, or the data are not what it was trained on.
    """
    data = load_data(line.card.data, line.split) if line.card.data is not None else None
    if data is not None:
        on_data(data)
    return TableResolver(data.table if data is not None else None, line.split, line.task, fetched)
