"""One check of all parameters of a run, before it costs anything: at the submission, and in the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from salun_core import plugins
from salun_core.config import parse
from salun_core.data.targets import Target
from salun_core.errors import StoreError, UsageError, reported_as
from salun_core.evaluation.evidence import most_evaluated
from salun_core.evaluation.optional_metrics import parse_optional_metrics, require_reference
from salun_core.gate import shipped_policies
from salun_core.steps.claim import task_to_sweep
from salun_core.steps.run_form import DeletionSweepForm, RunForm, UnlearningForm
from salun_core.storage import open_store, split_uri
from salun_core.storage.keys import check_id
from salun_core.sweeps.policy import SweepPolicy
from salun_core.tasks import TASKS
from salun_core.tasks.ingredients import absent_evaluators
from salun_core.tasks.line import OpenLine
from salun_core.tasks.resolve import AUTO, check_policy, read_forget, read_policy_early
from salun_core.tasks.task import Task, check_recipe, named
from salun_core.tuning import parse_budget
from salun_core.tuning.space import methods_of

T = TypeVar("T")
Skipped = Callable[[str], None]
_S3 = "s3://"


class _Faults:
    """The faults of a form, and what could not be read."""

    def __init__(self, skipped: Skipped | None) -> None:
        self.found: list[UsageError] = []
        self.unread: list[str] = []
        self.reason: StoreError | None = None
        self._skipped = skipped

    def of(self, what: str, check: Callable[..., T], *given: object, reads: bool = False) -> T | None:
        """Make a check, and keep its fault. After the store failed once, it is not asked again."""
        if reads and self.reason is not None:
            self.unread.append(what)
            return None
        try:
            return check(*given)
        except UsageError as error:
            self.found.append(error)
        except StoreError as error:
            if self._skipped is None:
                raise
            self.unread.append(what)
            self.reason = error
        return None

    def finish(self) -> None:
        """Raise what was found, or report what was not checked."""
        if self.found:
            raise _joined(self.found)
        if self._skipped is not None and self.reason is not None:
            self._skipped(f"not checked here: {', '.join(self.unread)}, because {self.reason.what}: {self.reason.why}")


def check_form(form: RunForm, *, in_pods: bool, skipped: Skipped | None = None, line: OpenLine | None = None) -> None:
    """Check every parameter of a run before any work; several faults are listed in one UsageError.

    Values out of range are refused when the form is parsed. This checks what the values name: the store's address, the
    policy, what evaluates a diffusion model, the forget targets, the method and its configuration, the search, the
    extra metrics. Nothing is written.

    Steps in pods cannot read a file of this machine. `skipped` is called with one line that names what was not checked
    because the store cannot be read from here; by default that is a StoreError. `line` is for a caller that goes on
    with what was read of it.
    """
    faults = _Faults(skipped)
    task = None
    addressed = faults.of("store_uri", split_uri, form.store_uri) is not None
    named = faults.of("model_line", check_id, "model line", form.model_line) is not None
    if addressed and named:
        line = line or OpenLine(open_store(form.store_uri), form.model_line)
        task = faults.of("model_line", _task, form, line, reads=True)
        if task is not None and line.head is not None:
            faults.of("the evaluation of the line", _check_evaluators, line, in_pods, reads=True)
    if isinstance(form, UnlearningForm):
        _check_forget(faults, form.forget_manifest_uri, task, in_pods)
    _check_policy(faults, form.policy_uri, in_pods)
    _check_recipe(faults, form, task)
    faults.finish()


def _task(form: RunForm, line: OpenLine) -> Task[Any]:
    """Return the task of the line; only a sweep may find a line without HEAD, which has nothing to claim."""
    return task_to_sweep(line) if isinstance(form, DeletionSweepForm) else line.task


def _check_evaluators(line: OpenLine, in_pods: bool) -> None:
    """Refuse a line whose image classifier, extractor or CLIP model cannot be found: the run would fail at its end."""
    absent = absent_evaluators(line.card, line.store, in_pods=in_pods)
    if absent:
        why = f"the evaluation of model line {line.name} needs it"
        raise UsageError("; ".join(item.why for item in absent), why, "; ".join(item.remedy for item in absent))


def _check_forget(faults: _Faults, uri: str, task: Task[Any] | None, in_pods: bool) -> None:
    if in_pods and not uri.startswith(_S3):
        faults.found.append(_only_here("forget_manifest_uri", uri, "give its s3:// address"))
        return
    found = faults.of("forget_manifest_uri", read_forget, uri, reads=uri.startswith(_S3))
    if task is not None and isinstance(found, list):
        faults.of("forget_manifest_uri", _check_targets, task, found)


def _check_targets(task: Task[Any], targets: list[Target]) -> None:
    with reported_as("the model line cannot forget what the forget set names"):
        task.check_targets(targets)


def _check_policy(faults: _Faults, uri: str, in_pods: bool) -> None:
    is_file = not uri.startswith(_S3) and uri not in (AUTO, *shipped_policies()) and ("/" in uri or "." in uri)
    if in_pods and is_file:
        names = ", ".join((AUTO, *shipped_policies()))
        faults.found.append(_only_here("policy_uri", uri, f"give its s3:// address, or one of {names}"))
        return
    faults.of("policy_uri", check_policy, uri, reads=uri.startswith(_S3))


def _check_recipe(faults: _Faults, form: RunForm, task: Task[Any] | None) -> None:
    """Check the method, its configuration, the search and the extra metrics.

    Without the task of the line a method counts if any task has it.
    """
    faults.of("method", _resolve, form, task)
    asked = faults.of("extra_metrics", parse_optional_metrics, form.extra_metrics) or {}
    faults.of("extra_metrics", require_reference, asked, form.retrain_reference)
    faults.of("evaluation_samples", most_evaluated, form.evaluation_samples)
    if form.tune:
        faults.of("tune_budget", parse_budget, form.tune_budget, 1)
    if not faults.found:
        faults.of("the policy", _check_plugins, form, asked)
    if task is None or faults.found:
        return
    if asked and not task.optional_metrics:
        faults.found.append(
            UsageError(
                f"{', '.join(asked)} cannot be measured on {form.model_line}",
                f"a {task.description} has no extra metrics",
                "leave extra_metrics out",
            )
        )
    if form.tune:
        faults.of("tune", task.check_tuning, named(task, form.recipe, tune=True).method, form.recipe.overrides)
    if isinstance(form, DeletionSweepForm):
        faults.of("the policy of the sweep", _sweep_policy, form, task)


def _resolve(form: RunForm, task: Task[Any] | None) -> None:
    having = [one for one in TASKS.values() if form.method in one.methods] if task is None else [task]
    faults = []
    for one in having or TASKS.values():
        try:
            check_recipe(one, form.recipe, tune=form.tune)
        except UsageError as error:
            faults.append(error)
        else:
            return
    raise faults[0]


def _check_plugins(form: RunForm, asked: Mapping[str, int]) -> None:
    """Refuse a plug-in that the policy does not allow, before it costs a run. They were loaded by the checks before."""
    used = [
        *plugins.loaded("method", *methods_of(form.method)),
        *plugins.loaded("metric", *asked),
        *plugins.loaded("attack", *asked),
    ]
    if not used:
        return
    policy = read_policy_early(form.policy_uri)
    if refused := policy.refused(used):
        raise UsageError(
            f"policy {policy.name} does not allow the {refused[0].words}",
            "its gate would refuse the model",
            f"choose what ships, or list {refused[0].distribution or refused[0].object} under `plugins` in a policy of "
            "your own",
        )


def _sweep_policy(form: DeletionSweepForm, task: Task[Any]) -> None:
    limits = form.model_dump(include=set(SweepPolicy.model_fields))
    parse(SweepPolicy, {**dict(task.escalation(form.recipe, tune=form.tune)), **limits}, "the policy of the sweep")


def _only_here(name: str, uri: str, remedy: str) -> UsageError:
    why = "a pod cannot read a file of this machine"
    return UsageError(f"{name} is {uri}", why, f"upload it to the store and {remedy}")


def _joined(faults: list[UsageError]) -> UsageError:
    if len(faults) == 1:
        return faults[0]
    texts = [f"{fault.what}: {fault.why}" if fault.why else fault.what for fault in faults]
    remedies = dict.fromkeys(fault.remedy for fault in faults if fault.remedy)
    what = f"{len(faults)} parameters are wrong"
    private = any(fault.public for fault in faults)
    public = "; ".join(fault.public or text for fault, text in zip(faults, texts, strict=True))
    return UsageError(what, "; ".join(texts), "; ".join(remedies), public=f"{what}: {public}" if private else "")
