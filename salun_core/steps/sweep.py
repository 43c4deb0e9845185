"""A whole sweep in one process: claim, run, settle. The scheduled pipeline does the same in Kubeflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salun_core.certificates.keys import load_signing_key
from salun_core.data import LoadedData
from salun_core.errors import SalunError
from salun_core.retention.purge import PurgeReport
from salun_core.steps.claim import claim_requests, sweep_policy
from salun_core.steps.form_check import check_form
from salun_core.steps.purge import purge_store
from salun_core.steps.run import RunOutcome, run_steps
from salun_core.steps.run_form import DeletionSweepForm, RunForm, UnlearningForm
from salun_core.steps.settle import settle_requests
from salun_core.storage import open_store
from salun_core.sweeps.claim import Claim
from salun_core.sweeps.heartbeat import lease_renewed
from salun_core.sweeps.policy import BatchLimits, SweepPolicy
from salun_core.sweeps.runs import new_run_id
from salun_core.sweeps.settle import Settled
from salun_core.tasks.line import OpenLine
from salun_core.telemetry.logs import get_logger, run_bound
from salun_core.tuning.search import OnTrial

Say = Callable[[str], None]


def policy_of(form: DeletionSweepForm, line: OpenLine) -> SweepPolicy:
    """Return the policy of a sweep of the form's line; UsageError if the method or its configuration is wrong."""
    limits = form.model_dump(include={"policy_uri", *BatchLimits.model_fields})
    return sweep_policy(line, form.recipe, tune=form.tune, **limits)


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep did; `outcome` is set if the run passed, `error` if it failed.

    `settled` is None after a dry run, `purged` if the configuration does not purge.
    """

    run: str
    claimed: Claim
    settled: Settled | None = None
    outcome: RunOutcome | None = None
    error: SalunError | None = None
    purged: PurgeReport | None = None


def sweep_once(
    form: DeletionSweepForm,
    folder: Path,
    say: Say = lambda step: None,
    run: str | None = None,
    on_trial: OnTrial | None = None,
    *,
    purge_after: bool = True,
) -> SweepOutcome:
    """Claim one batch, erase it, and settle it in any case.

    `say` is called with the name of each step before it starts; `purge_after` deletes the data past their retention
    period afterwards. The outcome holds the error that ended the run, if there was one. UsageError: the configuration
    is not possible, and nothing was claimed. SalunError: claiming or settling failed; the next sweep continues from
    there.
    """
    run = run or new_run_id()
    with run_bound(run):
        store = open_store(form.store_uri)
        line = OpenLine(store, form.model_line)
        policy = policy_of(form, line)
        check_form(form, in_pods=False, line=line)
        say("claim_requests")
        if form.dry_run:
            return SweepOutcome(run, claim_requests(store, line, run, policy, dry_run=True))
        signer = load_signing_key()  # a missing key must end the sweep now, not after the run
        data: list[LoadedData] = []  # read and checked by the claim: the run does not do it again
        claimed = claim_requests(store, line, run, policy, on_data=data.append)
        outcome, error, purged = None, None, None
        try:
            if claimed.record:
                common = form.model_dump(include=set(RunForm.model_fields)) | claimed.recipe.model_dump()
                settings = UnlearningForm(**common, forget_manifest_uri=claimed.forget_uri)
                # The recipe may be another one by now. HEAD is not read for that: it is what the claim found.
                check_form(settings, in_pods=False, line=line.at(claimed.record.parent))
                with lease_renewed(store, form.model_line, run):
                    outcome = run_steps(settings, folder, say, run, on_trial, data[-1] if data else None)
        except SalunError as ended:
            error = ended
            get_logger().warning("run_ended", model_line=form.model_line, error=type(ended).__name__)
        finally:
            say("settle_requests")
            settled = settle_requests(form.store_uri, form.model_line, run)
        if purge_after:
            say("purge")
            purged = purge_store(form.store_uri, signer=signer)
        return SweepOutcome(run, claimed, settled, outcome, error, purged)
