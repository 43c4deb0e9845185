"""The last step of a sweep, which always runs: complete the requests of a published version, or queue them again."""

from __future__ import annotations

from pathlib import Path

from salun_core.certificates.issue import ModelCertifier
from salun_core.storage import open_store
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.settle import Settled, settle
from salun_core.telemetry.observe import observed
from salun_core.times import Clock, utc_clock


def settle_requests(
    store_uri: str,
    model_line: str,
    run: str,
    *,
    key: Path | None = None,
    clock: Clock = utc_clock,
    keep_scratch: bool = False,
) -> Settled:
    """Settle a run; see `sweeps.settle.settle`. The run's record holds all that is needed.

    The run may have claimed nothing. The signing key is by default the one that $SALUN_SIGNING_KEY names. UsageError if
    a certificate is due and no key is set; settling again continues. `keep_scratch` leaves the scratch files to a later
    call.
    """
    with observed("settle_requests", model_line, run):
        store = open_store(store_uri)
        return settle(
            SweepContext(store, clock, ModelCertifier(store, key)), model_line, run, keep_scratch=keep_scratch
        )
