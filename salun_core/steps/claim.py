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
    """Return the policy of a sweep: the escalation of a recipe by the line's task, and other settings of `SweepPolicy`.

    UsageError for a wrong setting or method; IntegrityError if HEAD or its card is damaged.
    """
    recipes = task_to_sweep(line).escalation(recipe, tune=tune)
    digest = policy_digest(settings.get("policy_uri", AUTO))
    return parse(SweepPolicy, {**dict(recipes), "policy_digest": digest, **settings}, "the policy of the sweep")


def task_to_sweep(line: OpenLine) -> Task[Any]:
    """Return the task of a line; classification for a line without HEAD, which has nothing to claim.

    IntegrityError if HEAD or its card is damaged.
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

    `line` is as it was read for the policy. With `dry_run`, `reason` describes what would be claimed, and nothing is
    written. `on_data` receives the data that the requests were resolved against, for a run in the same process.
    StoreError if conditional writes are not safe; UsageError if a certificate is due and no signing key is set.
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
    """Test the conditional writes of a store before its first claim, and again after a week; StoreError if not safe."""
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

    `on_data` is called with the data set. IntegrityError if the data are not what the version was trained on.
    """
    data = load_data(line.card.data, line.split) if line.card.data is not None else None
    if data is not None:
        on_data(data)
    return TableResolver(data.table if data is not None else None, line.split, line.task, fetched)
