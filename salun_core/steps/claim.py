"""The first step of a sweep: claim the next batch of deletion requests of a model line."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from salun_core.certificates.issue import ModelCertifier
from salun_core.config import parse
from salun_core.data import load_data
from salun_core.data.split import SplitManifest
from salun_core.errors import ConflictError
from salun_core.methods.classification import method_config
from salun_core.models import ModelCard
from salun_core.models.card import DiffusionCard
from salun_core.models.checkpoint import CARD, SPLIT
from salun_core.registry.lookup import Version, read_file, read_head, read_version
from salun_core.requests.resolve import Resolver, TableResolver
from salun_core.steps.observe import RunRef, observed
from salun_core.storage import FileStore, open_store
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import probe_key
from salun_core.storage.objects import ObjectStore
from salun_core.storage.probe import ProbedStore, require_safe
from salun_core.sweeps.claim import Claim, claim, preview
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.policy import Recipe, SweepPolicy
from salun_core.tasks.resolve import fetched
from salun_core.times import Clock, utc_clock

_PROBED = probe_key("passed.json")
_PROBE_LASTS = timedelta(days=7)


def ladder(method: str, density: float, overrides: Mapping[str, Any], *, generative: bool = False) -> list[Recipe]:
    """Return the recipes that a sweep tries: as asked, then stronger, then with more weights, then a full retraining.

    A diffusion model is not retrained by a sweep, which may take weeks: its last recipe frees every weight.

    Args:
        method: the unlearning method.
        density: share of the weights that may change.
        overrides: what differs from the method's defaults.
        generative: whether the line holds diffusion models.

    Raises:
        UsageError: the method or its configuration is wrong.
    """
    given = dict(overrides)
    if generative:
        from salun_core.methods.diffusion import diffusion_config

        settings = diffusion_config(method, overrides)
        stronger = {**given, "steps": 2 * settings.steps, "learning_rate": 2 * settings.learning_rate}
        last = Recipe(method=method, density=1.0, method_config=stronger)
    else:
        config = method_config(method, overrides)
        stronger = {**given, "epochs": 2 * config.epochs, "learning_rate": 3 * config.learning_rate}
        last = Recipe(method="retrain", density=1.0)
    return [
        Recipe(method=method, density=density, method_config=given),
        Recipe(method=method, density=density, method_config=stronger),
        Recipe(method=method, density=min(1.0, (1 + density) / 2), method_config=stronger),
        last,
    ]


def sweep_terms(
    method: str,
    density: float,
    overrides: Mapping[str, Any],
    *,
    generative: bool = False,
    **settings: Any,  # noqa: ANN401 - of SweepPolicy, which checks them
) -> SweepPolicy:
    """Return the policy of a sweep: the ladder of a recipe, and the settings of `SweepPolicy` that are given.

    Raises:
        UsageError: one is out of range, or the method or its configuration is wrong.
    """
    rungs = ladder(method, density, overrides, generative=generative)
    return parse(SweepPolicy, {"recipes": rungs, **settings}, "the policy of the sweep")


def is_generative_line(store_uri: str, line: str) -> bool:
    """Say whether HEAD of a model line is a diffusion model; a line without HEAD is none.

    Raises:
        IntegrityError: HEAD or its card is damaged.
    """
    store = open_store(store_uri)
    head = read_head(store, line)
    if head is None:
        return False
    version = Version(head[0].version, read_version(store, line, head[0].version))
    return not isinstance(card_of(store, version), ModelCard)


def card_of(store: ObjectStore, version: Version) -> ModelCard | DiffusionCard:
    """Read the card of a version, of either kind.

    Raises:
        IntegrityError: it is gone or damaged.
    """
    data = read_file(store, version, CARD)
    return parse_stored(_kind_of(data), data, CARD)


def _kind_of(data: bytes) -> type[ModelCard] | type[DiffusionCard]:
    try:
        return DiffusionCard if json.loads(data)["task"] != "classification" else ModelCard
    except (ValueError, KeyError, TypeError, RecursionError):
        return ModelCard  # reading it says what is wrong


def claim_requests(
    store_uri: str, model_line: str, run: str, policy: SweepPolicy, *, dry_run: bool = False, clock: Clock = utc_clock
) -> Claim:
    """Claim a batch for a run; see `sweeps.claim.claim`.

    Args:
        store_uri: `s3://bucket/prefix`.
        model_line: name of the line.
        run: id of the run.
        policy: of the sweep.
        dry_run: describe in `reason` what would be claimed, and write nothing.
        clock: returns the time.

    Returns:
        What was claimed.

    Raises:
        StoreError: the store's conditional writes are not safe.
        UsageError: no such line, or no signing key although a certificate is due.
    """
    with observed("claim_requests", model_line, RunRef(store_uri, run)):
        store = open_store(store_uri)
        context = SweepContext(store, clock, ModelCertifier(store))
        if dry_run:
            return preview(context, model_line, policy)
        probe_once(store)
        return claim(context, model_line, run, policy, lambda version: resolver_of(store, version))


def probe_once(store: ProbedStore) -> None:
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


def resolver_of(store: FileStore, version: Version) -> Resolver:
    """Build the resolver for a version: its split manifest, and the rows of its data set, if it came with one.

    Raises:
        IntegrityError: a file of the version is gone or damaged, or the data are not what it was trained on.
    """
    card = card_of(store, version)
    split = parse_stored(SplitManifest, read_file(store, version, SPLIT), SPLIT)
    table = load_data(card.data, split).table if card.data is not None else None
    return TableResolver(version.digest, table, split, fetched, generative=not isinstance(card, ModelCard))
