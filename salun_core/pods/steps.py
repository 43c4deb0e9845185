"""The steps of a run as pods do them; `pods.pod.in_step` surrounds each of them.

A step downloads what it needs, each model once, and puts what it made under `scratch/RUN/`; what it returns is a
reference. The components of the pipelines call these functions, and log what the user interface shows.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from salun_core.certificates.keys import load_signing_key
from salun_core.config import Document, load
from salun_core.data import load_data
from salun_core.data.forget_set import ForgetSet, require_partial
from salun_core.data.split import SPLIT, PinnedSplit
from salun_core.digest import check_digest, sha256_bytes
from salun_core.errors import DeviceMemoryError, RunSettledError, SalunError, StoreError, UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import EVALUATED
from salun_core.gate import DECISION, GateDecision
from salun_core.methods.method import get_method
from salun_core.methods.recipe import parse_recipe
from salun_core.pods.ends import counts_of, published_outcome, verdict_of
from salun_core.pods.pod import Hold, Pod, end_process, in_step, nothing, patiently
from salun_core.pods.reference import Fact, Kind, Reference
from salun_core.pods.summary import empty_report, markdown
from salun_core.registry.versions import fetch_version
from salun_core.saliency import SaliencyMask
from salun_core.steps.claim import claim_requests
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate_together as evaluate_step
from salun_core.steps.form_check import check_form
from salun_core.steps.mask import compute_mask as mask_step
from salun_core.steps.outcome import (
    EVIDENCE,
    REPORT,
    OutcomeRecord,
    RunState,
    add_counts,
    read_outcome,
    write_outcome,
)
from salun_core.steps.processes import in_processes
from salun_core.steps.publishing import gate_and_publish
from salun_core.steps.run_form import DeletionSweepForm, UnlearningForm, read_form
from salun_core.steps.settle import settle_requests
from salun_core.steps.sweep import policy_of, sweep_once
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage.documents import Digest, LineId, parse_stored
from salun_core.storage.keys import run_key, scratch_key
from salun_core.sweeps.claim import Claim, Skipped
from salun_core.sweeps.heartbeat import hold_line
from salun_core.sweeps.runs import RunLog
from salun_core.sweeps.settle import Settled
from salun_core.tasks import resolve_targets
from salun_core.tasks.line import OpenLine
from salun_core.tasks.resolve import read_bytes, read_forget
from salun_core.tasks.run_facts import read_run_facts
from salun_core.tasks.task import TuningOptions, named
from salun_core.telemetry.observe import observed
from salun_core.times import utc_clock

INPUTS_FILE, MASK_FILE = "inputs.json", "mask.safetensors"
EXCERPT_FILE = "forget.parquet"


class PinnedInputs(Document):
    """What a run works on, fixed by its first step.

    It stays in `scratch/RUN/`: with the digest of a forget set of one sample, anybody could try which sample it is. The
    salt keeps the digest of this document, which is in artifacts, from being tried out.
    """

    format: Literal["salun.run-inputs/v1"] = "salun.run-inputs/v1"
    line: LineId = Field(description="the model line")
    parent: Digest = Field(description="the version that was HEAD")
    forget_uri: str = Field(description="address of the resolved forget set")
    forget_digest: Digest = Field(description="its digest")
    salt: str = Field(description="random, in hex")
    split: PinnedSplit | None = Field(
        default=None, description="digests of the split; with them, `forget.parquet` has the forget set's rows of it"
    )


@dataclass(frozen=True)
class Claimed:
    """What the first step of a sweep returns; all of it is shown in the user interface.

    Method, density and settings (JSON) are the recipe's. `forget_manifest_uri` is empty without requests. `code` is 0,
    or the exit code of the outcome if the run cannot start.
    """

    requests: int = 0
    forget_manifest_uri: str = ""
    method: str = ""
    density: float = 0.5
    method_config: str = "{}"
    reason: str = ""
    code: int = 0


def claim(pod: Pod, given: Mapping[str, Any], summary: str) -> Claimed:
    """Claim the next batch of a model line from the run form, and write to `summary` (Markdown) why there is none."""
    claimed = Claimed()

    def work(_folder: Path, _given: list[Reference]) -> Reference:
        nonlocal claimed
        form = read_form(DeletionSweepForm, given)
        line = OpenLine(pod.store, pod.model_line)
        check_form(form, in_pods=False, line=line)
        policy = policy_of(form, line)
        if not form.dry_run:
            load_signing_key()  # a missing key must end the run now, not after hours of work
        found = claim_requests(pod.store, line, pod.run, policy, dry_run=form.dry_run)
        config = json.dumps(found.recipe.method_config, sort_keys=True)
        claimed = Claimed(
            found.requests, found.forget_uri, found.recipe.method, found.recipe.density, config, found.reason
        )
        if not found.requests:
            write_outcome(pod.store, _idle_outcome(pod, found))
        return Reference(kind=Kind.INPUTS)

    in_step(pod, "claim_requests", (), work, hold=Hold.NONE)
    outcome = patiently(pod, "claim_requests", lambda: read_outcome(pod.store, pod.run))
    if outcome is None or not outcome.final:
        _write_text(summary, f"# {pod.model_line}: {claimed.requests} requests claimed\n\n{claimed.reason}\n")
        return claimed
    _write_text(summary, markdown(outcome))
    return replace(claimed, reason=claimed.reason or outcome.text, code=outcome.code)


def _idle_outcome(pod: Pod, found: Claim) -> OutcomeRecord:
    """Return the outcome of a sweep that has no batch, which is not an error."""
    state = RunState.LINE_HELD if found.skipped is Skipped.LINE_HELD else RunState.NOTHING_TO_DO
    done = len(found.nothing_to_erase)
    text = found.reason + (f"; {done} requests named nothing that was trained on" if done else "")
    text += f"; {len(found.held)} held for review: `salun request list --status on_hold`" if found.held else ""
    return pod.outcome(state, text, step="claim_requests", code=0, completed=done, failed=len(found.refused))


def fetch_model(pod: Pod, given: Mapping[str, Any]) -> tuple[Reference, int]:
    """Fix what a run works on: the HEAD of its model line, and the samples that its forget set names in it.

    No weights are moved: each later step downloads them once, and verifies them. The form is checked before anything is
    done. The number is 0, or the exit code of the outcome if the run cannot start.
    """

    def work(folder: Path, _given: list[Reference]) -> Reference:
        form, line = read_form(UnlearningForm, given), OpenLine(pod.store, pod.model_line)
        check_form(form, in_pods=False, line=line)
        hold_line(pod.store, pod.model_line, pod.run)
        with observed("fetch_model", pod.model_line, pod.run):
            line = line.again()  # a run that held the line until now may have published since the form was checked
            forget_set, split = _resolve(pod, line, form.forget_manifest_uri), line.split
            uri = _freeze(pod, forget_set)
            pinned = PinnedInputs(
                line=pod.model_line,
                parent=line.digest,
                forget_uri=uri,
                forget_digest=forget_set.digest,
                salt=secrets.token_hex(16),
            )
            made = folder / "inputs"
            made.mkdir()
            if split.layout is not None and line.task.excerpts:
                excerpt = split.excerpt(forget_set.samples)
                excerpt.write(made / EXCERPT_FILE)
                pinned = pinned.model_copy(update={"split": excerpt.pinned})
            (made / INPUTS_FILE).write_text(pinned.model_dump_json(exclude_none=True), encoding="utf-8")
            facts = {"forget_samples": len(forget_set.ids), "train_samples": len(split.train)}
            origin = {"model_line": pod.model_line, "version": line.digest}
            return pod.scratch.put(Kind.INPUTS, made, facts={**origin, **facts})

    inputs = in_step(pod, "fetch_model", (), work, hold=Hold.NONE)
    outcome = patiently(pod, "fetch_model", lambda: read_outcome(pod.store, pod.run))
    outcome = outcome if inputs.kind is Kind.NOTHING else None
    return inputs, outcome.code or 1 if outcome else 0


def _resolve(pod: Pod, line: OpenLine, uri: str) -> ForgetSet:
    """Resolve a forget set against the split of a version, with its data but without its weights."""
    record = RunLog(pod.store, utc_clock).read(pod.run)
    if record is not None:  # the claim froze it: nobody may have changed it since
        check_digest("the forget set of the run", record.forget_sha256, sha256_bytes(read_bytes(uri)))
    found, split = read_forget(uri), line.split
    if isinstance(found, ForgetSet):
        check_digest("the split of the forget set", split.digest, found.split_digest)
    else:
        table = load_data(line.card.data, split).table if line.card.data is not None else None
        found = resolve_targets(line.task, found, table, split)
    require_partial(found, split)
    return found


def _freeze(pod: Pod, forget_set: ForgetSet) -> str:
    key = scratch_key(pod.run, f"forget/{secrets.token_hex(8)}/forget.json")
    pod.store.put_new(key, forget_set.canonical())
    return f"{pod.store.uri}/{key}"


def _pinned(pod: Pod, given: Reference, folder: Path) -> PinnedInputs:
    path = pod.scratch.get(given.find(Kind.INPUTS), folder / "inputs") / INPUTS_FILE
    return parse_stored(PinnedInputs, path.read_bytes(), INPUTS_FILE)


def _open(pod: Pod, given: Reference, folder: Path, *, whole: bool = False) -> tuple[RunContext, PinnedInputs]:
    """Download the model before and the pinned inputs of a run, both verified.

    `whole` downloads the whole split, not only the forget set's rows.
    """
    pinned = _pinned(pod, given, folder)
    forget_set = read_forget(pinned.forget_uri)
    digest = forget_set.digest if isinstance(forget_set, ForgetSet) else ""
    check_digest("the forget set of the run", pinned.forget_digest, digest)
    excerpt = folder / "inputs" / EXCERPT_FILE
    part = not whole and pinned.split is not None and excerpt.is_file()
    fetch_version(pod.store, pod.model_line, pinned.parent, folder / "before", {SPLIT} if part else ())
    context = RunContext(folder / "before", pinned.forget_uri, pod.model_line, pod.store_uri, pod.run)
    return replace(context, pinned=pinned.split, excerpt=excerpt if part else None), pinned


def _mask_file(pod: Pod, given: Reference, folder: Path) -> Path | None:
    """Download the mask of a run; None if its method takes none."""
    mask = given.find(Kind.MASK)
    return pod.scratch.get(mask, folder / "mask") / MASK_FILE if mask.files else None


def _count(processes: str) -> int:
    """Return the number of processes of a step; the form's number of accelerators is text, as Kubernetes needs it."""
    if not processes.isdecimal() or int(processes) < 1:
        raise UsageError(f"{processes!r} is not a number of accelerators", "it must be a whole number from 1", "give 1")
    return int(processes)


def compute_mask(
    pod: Pod, inputs: str, method: str, density: float, method_config: str, processes: str = "1"
) -> Reference:
    """Score the weights and make the mask. A method that takes no mask gets none, and no model is downloaded for it.

    `inputs` is the file of the artifact of `fetch_model`, and `processes` how many share the work in this container.
    """

    def work(folder: Path, given: list[Reference]) -> Reference:
        (first,) = given
        recipe, count = parse_recipe(method, density, method_config), _count(processes)
        version = _pinned(pod, first, folder).parent  # the facts of an artifact are for people, and not verified
        task = OpenLine(pod.store, pod.model_line, version).task
        recipe = named(task, recipe, tune=True)  # the mask is the same without a search
        if recipe.leaves_method_open or not get_method(task.methods, recipe.method).needs_mask:
            return Reference(kind=Kind.MASK, facts={"method": recipe.method, "needed": "no"}, made_from=given)
        context, _ = _open(pod, first, folder)
        out = folder / MASK_FILE
        in_processes(count, mask_step, context, recipe, out)
        mask = SaliencyMask.load(out)
        facts: dict[str, Fact] = {"method": recipe.method, "density": mask.density, "weights": mask.weights}
        return pod.scratch.put(Kind.MASK, out, given, facts)

    return in_step(pod, "compute_mask", (inputs,), work)


def unlearn(
    pod: Pod,
    mask: str,
    method: str,
    method_config: str,
    seed: int,
    tuning: TuningOptions | None = None,
    processes: str = "1",
) -> Reference:
    """Unlearn the forget set; weights outside the mask stay bit-identical.

    `mask` is the file of the artifact of `compute_mask`, and `processes` how many share the work in this container. A
    search (`tuning`) runs in one process.
    """

    def work(folder: Path, given: list[Reference]) -> Reference:
        recipe = parse_recipe(method, 1.0, method_config, seed)  # the mask carries the density
        count = 1 if tuning else _count(processes)
        context, _ = _open(pod, given[0], folder, whole=True)
        after = folder / "after"
        in_processes(count, run_unlearning, context, recipe, _mask_file(pod, given[0], folder), after, tuning=tuning)
        made = read_run_facts(after, recipe.method)
        facts: dict[str, Fact] = {"method": made.method, "seed": seed, "seconds": made.seconds["unlearn"]}
        return pod.scratch.put(Kind.MODEL, after, given, facts)

    return in_step(pod, "unlearn", (mask,), work)


def evaluate(
    pod: Pod,
    after: str,
    report: str,
    *,
    retrain_reference: bool = False,
    extra_metrics: str = "",
    evaluation_samples: str = str(EVALUATED),
    processes: str = "1",
) -> tuple[Reference, Evidence | None]:
    """Measure the model before and after; the evidence is None if the run ended before.

    `after` is the file of the artifact of `unlearn`, `report` the file for the report without a verdict. `processes`
    share a classifier's outputs, and the training of a reference, in this container.
    """
    evidence: Evidence | None = None

    def work(folder: Path, given: list[Reference]) -> Reference:
        nonlocal evidence
        count = _count(processes)
        context, pinned = _open(pod, given[0], folder, whole=True)
        known = (SPLIT,) if pinned.split else ()  # it follows from the split before; the gate reads and verifies it
        candidate = pod.scratch.get(given[0].find(Kind.MODEL), folder / "after", known)
        in_processes(
            count,
            evaluate_step,
            context,
            candidate,
            folder / EVIDENCE,
            folder / REPORT,
            mask=_mask_file(pod, given[0], folder),
            retrain_reference=retrain_reference,
            extra_metrics=extra_metrics,
            evaluation_samples=evaluation_samples,
        )
        evidence = load(Evidence, folder / EVIDENCE)
        shutil.copyfile(folder / REPORT, report)
        facts: dict[str, Fact] = {"forget_samples": evidence.forgotten.count}
        return pod.scratch.put(Kind.EVIDENCE, folder / EVIDENCE, given, facts)

    made = in_step(pod, "evaluate", (after,), work)
    if evidence is None:
        _write_text(report, empty_report(f"the run ended before ({made.facts['state']})"))
    return made, evidence


def gate_publish(pod: Pod, evidence: str, policy_uri: str, report: str, summary: str) -> Reference:
    """Apply the policy, publish if it passes, and settle the run: requests completed and certified, lease given back.

    Killed before HEAD moved, the next attempt decides again. Killed after, it finds this run's version and settles.
    Settling is idempotent, and the exit handler and the next claim of the line repeat it, so that no kill leaves
    requests in progress. The scratch files stay for such an attempt; the exit handler deletes them, or a purge.

    Returns the decision by reference, or how the run ended before.
    """
    decision: GateDecision | None = None

    def work(folder: Path, given: list[Reference]) -> Reference:
        nonlocal decision
        context, pinned = _open(pod, given[0], folder)
        after = pod.scratch.get(given[0].find(Kind.MODEL), folder / "after")
        measured = pod.scratch.get(given[0].find(Kind.EVIDENCE), folder / "evidence") / EVIDENCE
        made, mask = folder / REPORT, _mask_file(pod, given[0], folder)
        try:
            published = gate_and_publish(
                context, after, measured, made, parent=pinned.parent, policy_uri=policy_uri, mask=mask
            )
        finally:  # a refused gate has written both
            if made.is_file():
                shutil.copyfile(made, report)
            if (folder / DECISION).is_file():
                decision = load(GateDecision, folder / DECISION)
        return Reference(kind=Kind.DECISION, facts=_decided(published.decision, published.version), made_from=given)

    made = in_step(pod, "gate_publish", (evidence,), work, hold=Hold.UNTIL_PUBLISHED, again=True)
    settled = patiently(pod, "gate_publish", lambda: _settle_here(pod, made))
    if settled.next and settled.code and made.kind is Kind.DECISION:
        made = Reference(kind=Kind.NOTHING, facts={"state": str(settled.state)}, made_from=[made])
    _keep_report(pod, report, settled)
    _write_text(summary, markdown(settled, "", decision))
    return made


def _keep_report(pod: Pod, report: str, outcome: OutcomeRecord) -> None:
    """Write the report of a step that did not make one now: that of an earlier attempt, or a page that says why."""
    if not Path(report).is_file():
        kept = patiently(pod, outcome.step, lambda: pod.store.get(run_key(pod.run, REPORT)))
        _write_text(report, kept.data.decode() if kept else empty_report(outcome.text))


def _decided(decision: GateDecision, version: str) -> dict[str, Fact]:
    failed = sum(not verdict.passed for verdict in decision.verdicts)
    return {"passed": int(decision.passed), "rules_failed": failed, "policy": decision.policy, "version": version}


def _settle_here(pod: Pod, made: Reference) -> OutcomeRecord:
    """Settle in the main path, and write the outcome of a published run, which is final only with its certificates."""
    try:
        settled = settle_requests(pod.store_uri, pod.model_line, pod.run, keep_scratch=True)
    except StoreError:
        raise
    except SalunError as error:  # no signing key: the version is published, and its requests wait
        told = error.for_pods()
        text = f"published, but not certified: {told.what}: {told.why}"
        advice = f"{told.remedy}; then `salun sweep --settle {pod.run}`"
        fields = {"next": advice, "step": "gate_publish", "code": error.exit_code}
        return write_outcome(pod.store, pod.outcome(RunState.FAILED, text, **fields))
    if made.kind is Kind.DECISION:
        write_outcome(pod.store, published_outcome(pod, str(made.facts["version"])))
    found = add_counts(pod.store, pod.run, **counts_of(settled))
    assert found is not None  # written above, or by the step that ended the run
    return found


def _write_text(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def sweep_compact(pod: Pod, given: Mapping[str, Any], report: str, summary: str) -> tuple[int, Evidence | None]:
    """Do a whole sweep in this process, which opens the store, the model and the data once.

    Returns 0, or the exit code of the outcome; and the evidence, if the run came so far.
    """
    evidence: Evidence | None = None
    decision: GateDecision | None = None
    settled: Settled | None = None

    def work(folder: Path, _given: list[Reference]) -> Reference:
        nonlocal evidence, decision, settled
        form = read_form(DeletionSweepForm, given)
        try:
            done = sweep_once(form, folder, run=pod.run, purge_after=False)
        except RunSettledError:  # by an earlier attempt of this step, which was killed before it wrote the outcome
            settled = settle_requests(pod.store_uri, pod.model_line, pod.run)
            if (verdict := verdict_of(pod, settled)) is None:
                raise
            write_outcome(pod.store, verdict)
            return nothing(verdict.state)
        for name, place in ((REPORT, report), ("evaluation.html", report)):
            if (folder / name).is_file() and not Path(place).is_file():
                shutil.copyfile(folder / name, place)
        evidence = load(Evidence, folder / EVIDENCE) if (folder / EVIDENCE).is_file() else None
        decision = load(GateDecision, folder / DECISION) if (folder / DECISION).is_file() else None
        settled = done.settled
        if isinstance(done.error, StoreError | DeviceMemoryError):  # repeating would find the run settled
            text = str(done.error.for_pods())
            write_outcome(pod.store, pod.outcome(RunState.FAILED, text, step="sweep_compact"))
        elif done.error is not None:
            raise done.error
        elif done.outcome is not None:
            write_outcome(pod.store, published_outcome(pod, done.outcome.published.version))
        else:
            write_outcome(pod.store, _idle_outcome(pod, done.claimed))
        return Reference(kind=Kind.DECISION)

    in_step(pod, "sweep_compact", (), work, hold=Hold.NONE)
    counts = counts_of(settled) if settled else {"completed": 0, "queued": 0, "failed": 0}
    outcome = patiently(pod, "sweep_compact", lambda: add_counts(pod.store, pod.run, **counts))
    if outcome is None or not outcome.final:
        end_process(pod, "sweep_compact", SalunError("the sweep wrote no outcome", "", "submit a new run"))
    _keep_report(pod, report, outcome)
    _write_text(summary, markdown(outcome, "", decision))
    return outcome.code, evidence
