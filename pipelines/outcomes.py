"""Reads how a run ended: its outcome in the store, or Kubeflow's state if there is none to read."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.runs import SUCCEEDED, Result
from salun_core.errors import SalunError
from salun_core.steps.outcome import OUTCOME_FILE, OutcomeRecord, read_outcome
from salun_core.storage import open_store
from salun_core.storage.keys import run_key


@dataclass(frozen=True)
class Ending:
    """How a run ended: `code` is the exit code of `submit --wait` and `status`.

    `error` is one line, empty without an error. `note` is why there is no outcome; it is empty if there is one, or if
    the pipeline writes none.
    """

    code: int
    error: str = ""
    note: str = ""
    outcome: OutcomeRecord | None = None


def read_ending(result: Result) -> Ending:
    """Return how a finished run ended.

    Kubeflow's API has no text of any step. So the outcome counts, also if Kubeflow shows the run as succeeded. Without
    an outcome Kubeflow's state decides: 0 for a run that succeeded, 1 for any other.
    """
    if not result.store_uri:
        return _by_state(result, "the run has no parameter store_uri")
    address = f"{result.store_uri.rstrip('/')}/runs/{result.run_id}/{OUTCOME_FILE}"
    try:
        store = open_store(result.store_uri)
        address = f"{store.uri}/{run_key(result.run_id, OUTCOME_FILE)}"
        outcome = read_outcome(store, result.run_id)
    except SalunError as error:
        return _by_state(result, f"cannot read the outcome {address}: {error}")
    if outcome is None:
        return _by_state(result, f"there is no outcome {address}")
    if not outcome.final:
        step = outcome.step or "its first step"
        return Ending(1, f"the run ended in {step} and wrote no verdict", f"{address} is not final", outcome)
    return Ending(outcome.code, outcome.text if outcome.code else "", "", outcome)


def _by_state(result: Result, note: str) -> Ending:
    if result.state == SUCCEEDED:
        return Ending(0, note=note)
    failed = ", ".join(step for step, state in result.steps.items() if state == "FAILED")
    what = f"{failed} failed" if failed else f"the run is {result.state.lower()}"
    return Ending(1, f"{what}; Kubeflow's API has no text of a step, see the log: {result.logs}", note)
