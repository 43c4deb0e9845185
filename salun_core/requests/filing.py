"""Files deletion requests after a check against the model line: what each one names is known before it is stored.

The check reads HEAD of the line, its card and its split, and the data set if this machine can read it. A sweep checks
everything again against the version that it erases from, because HEAD and the data may change in between. Card and
split are stored as the weights are, so an account without the right to read models files what only the sweep checks.

Each request is filed, then put on hold if the data lack a name of it:

- The process dies in between: the request is queued, and the sweep that looks it up puts it on hold.
- Filing it again: it has moved already, so it stays where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from pydantic import Field

from salun_core.config import Document
from salun_core.data import load_data
from salun_core.data.classes import find_class
from salun_core.data.forget_set import kind_of
from salun_core.data.table import Table
from salun_core.data.targets import ClassTarget, ConceptTarget, SamplesTarget, Target
from salun_core.digest import check_digest
from salun_core.errors import ConflictError, SalunError, StoreDeniedError, StoreError, UsageError
from salun_core.registry.lookup import lines, unknown_line
from salun_core.requests.intake import Filed, submit_all
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.resolve import TableResolver, unmatched
from salun_core.requests.schema import Review, Status, Submission, summarise
from salun_core.storage.objects import FileStore
from salun_core.tasks.ingredients import Measurement, missing_ingredients
from salun_core.tasks.line import OpenLine
from salun_core.tasks.resolve import AUTO, fetched, policy_for
from salun_core.times import Clock, utc_clock

_SHOWN = 5  # faults in one message
_DENIED = "this account may not read the model, so the sweep checks it"


class Match(Document):
    """What a request names in its model line. It holds no sample id, prompt or subject reference."""

    id: str = Field(description="the request")
    model_line: str = Field(description="its model line")
    version: str = Field(description="HEAD of the line when it was checked")
    names: str = Field(description="what it names, such as `class 3` or `2 samples`")
    class_name: str | None = Field(default=None, description="name of the class, of a class only")
    class_index: int | None = Field(default=None, description="index of the class, of a class only")
    samples: int | None = Field(default=None, description="samples in the data; null if these were not read")
    subjects: int | None = Field(default=None, description="persons that the samples belong to; null if unknown")
    in_training: int | None = Field(default=None, description="samples that the version was trained on")
    unknown: int = Field(default=0, description="names that the data do not have: it is held for review")
    unchecked: str | None = Field(default=None, description="why the data, or the model too, were not looked at")
    warnings: list[str] = Field(default=[], description="what will be missing when it is erased")


def file_requests(
    store: FileStore,
    submissions: Sequence[Submission],
    actor: str,
    *,
    check_data: bool | None = None,
    policy_uri: str = AUTO,
    confirm: Callable[[Sequence[Match]], bool] = lambda matches: True,
    done: Callable[[], None] = lambda: None,
    dry_run: bool = False,
    clock: Clock = utc_clock,
) -> tuple[Filed, Sequence[Match]]:
    """Check deletion requests against their model lines, and file them; a UsageError means that nothing was filed.

    `check_data`: None looks up targets in local data only; True fails if the data, or what the check needs of the
    model, cannot be read. `confirm` gets what the requests name before anything is written; if it returns False,
    nothing is filed and the receipts and refusals are empty. A line that lacks what the policy at `policy_uri` needs
    gets a warning.
    """
    matches = match_requests(store, submissions, check_data, policy_uri)
    if not confirm(matches):
        return Filed([], []), matches
    ledger = Ledger(store, clock, dry_run)
    filed = submit_all(ledger, submissions, actor, done)
    accepted = set() if dry_run else {receipt.id for receipt in filed.receipts}
    for match in matches:
        if match.unknown and match.id in accepted:
            _hold(ledger, match, actor)
    return filed, matches


def _hold(ledger: Ledger, match: Match, actor: str) -> None:
    state = ledger.state(match.id)
    if state.status is Status.QUEUED and state.last is not None and state.last.n == 1:
        reason = unmatched(match.unknown, match.in_training or 0)
        with suppress(ConflictError):  # a twin of this call or a sweep was faster
            ledger.move(state, Transition(Status.ON_HOLD, actor, reason, outcome=Review.UNMATCHED))


def match_requests(
    store: FileStore, submissions: Sequence[Submission], check_data: bool | None = None, policy_uri: str = AUTO
) -> Sequence[Match]:
    """Return what requests name in their model lines; nothing is written.

    The arguments are those of `file_requests`.
    """
    known: dict[str, _Line | SalunError] = {}
    found: list[Match] = []
    faults: list[tuple[str, SalunError]] = []
    for item in submissions:
        try:
            if item.model_line not in known:
                known[item.model_line] = _open(store, item.model_line, check_data, policy_uri)
            line = known[item.model_line]
            if isinstance(line, SalunError):
                raise line
            found.append(line.match(item))
        except StoreError:
            raise
        except SalunError as error:
            faults.append((item.id, error))
    if len(submissions) == 1 and faults:
        raise faults[0][1]
    if faults:
        some = "; ".join(f"{name}: {error.what}: {error.why}" for name, error in faults[:_SHOWN])
        remedies = dict.fromkeys(error.remedy for _, error in faults[:_SHOWN] if error.remedy)
        raise UsageError(
            f"{len(faults)} of {len(submissions)} requests do not fit their model line",
            some,
            f"nothing was filed; {'; '.join(remedies)}",
        )
    return found


def _open(store: FileStore, line: str, check_data: bool | None, policy_uri: str) -> _Line | SalunError:
    try:
        return _Line(store, line, check_data, policy_uri)
    except StoreError:
        raise
    except SalunError as error:
        return error


class _Line:
    """HEAD of a model line with its data, for matching requests."""

    def __init__(self, store: FileStore, line: str, check_data: bool | None, policy_uri: str) -> None:
        self._line, self._check_data, self._denied = OpenLine(store, line), check_data, False
        if self._line.head is None:
            raise unknown_line(line, lines(store))
        try:
            card, _ = self._line.card, self._line.split
        except StoreDeniedError:
            if check_data:
                raise
            self._denied = True
        else:
            self._policy = policy_for(policy_uri, card)

    @cached_property
    def _data(self) -> tuple[Table | None, str | None]:
        """The rows of the data set; None with the reason if they were not read."""
        spec = self._line.card.data
        if spec is None:
            return None, "the model came without data"
        if self._check_data is False:
            return None, "--no-check-data"
        remote = any((source or "").startswith("s3://") for source in (spec.source, spec.test_source))
        if remote and self._check_data is None:
            return None, "the data are in S3, and --check-data was not given"
        try:
            return load_data(spec, self._line.split).table, None
        except (SalunError, OSError) as error:
            if self._check_data:
                raise
            return None, f"this machine cannot read the data ({getattr(error, 'what', error)})"

    @cached_property
    def _subjects(self) -> dict[str, str]:
        table, _ = self._data
        return (
            {}
            if table is None
            else {
                sample: subject
                for sample, subject in zip(table.ids, table.subjects, strict=True)
                if subject is not None
            }
        )

    def match(self, item: Submission) -> Match:
        fields: dict[str, Any] = {"id": item.id, "model_line": item.model_line, "version": self._line.digest}
        if self._denied:
            return Match(**fields, names=summarise(item.target), unchecked=_DENIED)
        target, classes = fetched(item.target), self._line.card.classes
        self._line.task.check_targets([target])
        table, unchecked = self._data
        fields |= {"names": summarise(target), "warnings": self._warnings(target)}
        if isinstance(target, ConceptTarget):
            return Match(**fields)
        if isinstance(target, ClassTarget) and classes:
            index = find_class(target, classes)
            fields |= {"class_name": classes[index], "class_index": index}
        if table is None:
            return Match(**fields, unchecked=unchecked, **self._of_split(target))
        return Match(**fields, **self._of_data(target, table))

    def _of_split(self, target: Target) -> dict[str, Any]:
        """Return what the split alone says: which of the ids were trained on."""
        digest = getattr(target, "dataset_digest", None)
        if digest is not None:
            check_digest("the data set of a forget target", digest, self._line.split.dataset_digest)
        if not isinstance(target, SamplesTarget):
            return {}
        return {"in_training": len(self._line.split.train.find(target.ids or ()))}

    def _of_data(self, target: Target, table: Table) -> dict[str, Any]:
        found, unknown = TableResolver(table, self._line.split, self._line.task).look_up(target)
        trained = self._line.split.train.find(found)
        if trained and len(trained) >= len(self._line.split.train):
            raise UsageError(
                "the request names all of the training data", "no model would be left", "delete the model line instead"
            )
        persons = {self._subjects[sample] for sample in found if sample in self._subjects}
        subjects = len(persons) if self._subjects else None
        return {"samples": len(found), "subjects": subjects, "in_training": len(trained), "unknown": unknown}

    def _warnings(self, target: Target) -> list[str]:
        prompts = target.prompts if isinstance(target, ConceptTarget) else ()
        measured = Measurement(kind_of(target), prompts)
        return list(map(str, missing_ingredients(self._line.card, self._policy, measured, self._line.store)))


def counted(matches: Sequence[Match]) -> Counter[str]:
    """Return the sums of many matches: samples, in_training, unknown (requests), unchecked (requests)."""
    total: Counter[str] = Counter()
    for match in matches:
        total["samples"] += match.samples or 0
        total["in_training"] += match.in_training or 0
        total["unknown"] += bool(match.unknown)
        total["unchecked"] += match.unchecked is not None
    return total
