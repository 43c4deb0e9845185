"""The last step of a sweep, which always runs: complete what was published, queue again what was not."""

from __future__ import annotations

from pathlib import Path

from salun_core.certificates.issue import ModelCertifier
from salun_core.steps.observe import RunRef, observed
from salun_core.storage import open_store
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.policy import SweepPolicy
from salun_core.sweeps.settle import Settled, settle
from salun_core.times import Clock, utc_clock


def settle_requests(
    store_uri: str, model_line: str, run: str, policy: SweepPolicy, *, key: Path | None = None, clock: Clock = utc_clock
) -> Settled:
    """Settle a run; see `requests.settling.settle`.

    Args:
        store_uri: `s3://bucket/prefix`.
        model_line: name of the line.
        run: id of the run; one that claimed nothing is no error.
        policy: of the sweep.
        key: file of the signing key; by default the one that $SALUN_SIGNING_KEY names.
        clock: gives the time now.

    Returns:
        What became of the run.

    Raises:
        UsageError: a certificate is due and there is no signing key; settling again goes on.
    """
    with observed("settle_requests", model_line, RunRef(store_uri, run)):
        store = open_store(store_uri)
        return settle(SweepContext(store, clock, ModelCertifier(store, key), "sweep"), model_line, run, policy)
