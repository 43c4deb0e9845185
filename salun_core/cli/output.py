"""Prints results on standard output and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from salun_core.errors import escaped
from salun_core.evaluation.metrics import CLASSIFIER, rows_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from salun_core.evaluation import Evidence
    from salun_core.evaluation.evidence import EpochRecord
    from salun_core.gate import GateDecision


@dataclass
class Mode:
    """How this call prints: `json` prints one JSON document and nothing else, `debug` tracebacks and logs on stderr."""

    json: bool = False
    debug: bool = False


MODE = Mode()


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text, with the control characters in it escaped: names of users and data must not rule the terminal.

    JSON stays JSON.
    """
    typer.echo(escaped(text), err=err, nl=nl)


def emit(result: Mapping[str, Any] | Sequence[Any], show: Callable[[], None]) -> None:
    """Print a result as JSON if --json was given, else call `show`."""
    if MODE.json:
        echo(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        show()


def emit_facts(facts: Mapping[str, Any], footer: str = "") -> None:
    """Print named values, one a line, and a footer."""

    def show() -> None:
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            echo(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")
        if footer:
            echo(footer)

    emit(facts, show)


def emit_plan(verb: str, facts: Mapping[str, Any]) -> None:
    """Print the result of a dry run: the inputs are valid, and this is what would be written."""
    if MODE.json:
        facts = {"dry_run": True, **facts}
    emit_facts(facts, f"dry run: the inputs are valid, {verb} wrote nothing")


def emit_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print mappings with the same keys, which are the headings of the table."""
    emit(rows, lambda: print_table(list(rows[0]), [list(row.values()) for row in rows]))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under headings, numbers aligned to the right; long rows are folded on a terminal only."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], float) for row in rows)
        table.add_column(column, overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(_cell(cell)) for cell in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()))  # with rich's own bold


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else escaped(str(value), keep="")


def minute(text: str) -> str:
    """Return an ISO 8601 time without its seconds and zone."""
    return text[:16].replace("T", " ")


def print_metrics(evidence: Evidence) -> None:
    """Print the metrics of evidence: before, after, and of the retrained model if there is one.

    Metrics of classifiers are ratios from 0 to 1. Those of generated images have several units, so a column names it.
    """
    generated = evidence.generation is not None
    rows = [row for row in rows_of(generated).values() if row.listed and row.name in evidence.metrics]
    found = {row.name: evidence.metrics[row.name] for row in rows}
    columns: dict[str, list[object]] = {"metric": list(found)}
    if generated:
        columns["unit"] = [row.unit.name if row.unit else "ratio" for row in rows]
    columns |= {"before": [item.before for item in found.values()], "after": [item.after for item in found.values()]}
    if any(item.reference is not None for item in found.values()):
        columns["retrained"] = [item.reference for item in found.values()]
    columns["n"] = [measured_count(item.n, item.population) for item in found.values()]
    print_table(list(columns), list(zip(*columns.values(), strict=True)))


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names of metrics, those that are listed for classifiers first and in that order."""
    order = [row.name for row in CLASSIFIER.values() if row.listed]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def measured_count(n: int, population: int | None) -> int | str:
    """Return the number of images behind a metric, and of a sample also the number that it was drawn from."""
    return n if population is None else f"{n} of {population}"


def print_refusals(decision: GateDecision, told: str = "") -> None:
    """Print each failed rule of a decision with its figures and the cause, and what to do; nothing if it passed.

    `told` is what was printed before; a next step that is in it is not repeated.
    """
    for refusal in decision.refusals:
        echo(f"- {refusal.text}")
    if decision.next and decision.next not in told:
        echo(f"next: {decision.next}")


def progress(text: str) -> None:
    """Print a line of progress."""
    echo(text, err=True)


class _Bars:
    """Bars of long work on a terminal: how far it is, and an estimate of the time left.

    A bar appears after half a second, so that short work does not flicker, and disappears when the work has ended.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._progress: Progress | None = None
        self._begun: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}

    def show(self, work: str, done: int, total: int, note: str = "") -> None:
        """Draw how far a work is; see `telemetry.progress.report`."""
        if done >= total:
            self._end(work)
            return
        now = time.monotonic()
        if now - self._begun.setdefault(work, now) < _SHORT_SECONDS:
            return
        text = ", ".join(filter(None, (self.names.get(work, work), note)))
        self._progress = self._progress or _started_progress()
        if work not in self._tasks:
            self._tasks[work] = self._progress.add_task(text, total=total, completed=done)
        self._progress.update(self._tasks[work], completed=done, total=total, description=text)

    def _end(self, work: str) -> None:
        self._begun.pop(work, None)
        task = self._tasks.pop(work, None)
        if self._progress is not None and task is not None:
            self._progress.remove_task(task)
        if not self._tasks and self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Remove all bars."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._tasks.clear()
        self._begun.clear()


def _started_progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar


_SHORT_SECONDS = 0.5
_BARS = _Bars()


@contextmanager
def bars() -> Iterator[None]:
    """Show the progress of all work in the block, on a terminal only; of several processes the first one shows it."""
    from salun_core.telemetry.progress import shown_by

    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        with shown_by(_BARS.show):
            yield
    finally:
        _BARS.close()


@contextmanager
def epoch_progress(label: str, total: int) -> Iterator[Callable[[EpochRecord], None]]:
    """Give the bar of a training a name. Each measured round gets a line, with --debug each epoch.

    Yields the function for the loop to call after each epoch.
    """

    def show(record: EpochRecord) -> None:
        if record.reading is not None:
            progress(f"{label}: {round_line(record)}")
        elif MODE.debug:
            losses = ", ".join(f"loss {name} {loss:.3f}" for name, loss in record.losses.items())
            progress(f"{label}: epoch {record.epoch} of {total}, {losses}")

    _BARS.names["training"] = label
    try:
        yield show
    finally:
        _BARS.names.pop("training", None)


def round_line(record: EpochRecord) -> str:
    """Describe a measured round in one line."""
    reading = record.reading
    assert reading is not None
    far = [f"AUC {reading.area:.3f}"] if reading.area is not None else []
    far += [f"class recognised {reading.recognised:.1%}"] if reading.recognised is not None else []
    shares = f"retained {reading.retained:.1%}, unseen {reading.unseen:.1%}"
    decision = "kept" if reading.kept else f"undone: {reading.why}"
    return f"round {record.epoch}, rate {record.learning_rate:.2g}: {', '.join(far)}, {shares}; {decision}"


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a download with its speed and the time left, on a terminal only.

    Yields the function to call with the bytes that arrived and their total.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*parts, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def silence_logs() -> None:
    """Show the steps' warnings only, or with --debug all of our own lines; of libraries only warnings.

    Failures are dropped as well: the command reports them itself, in one line.
    """
    import structlog

    from salun_core.telemetry.logs import configure_logging

    def drop_failures(_logger: Any, _method: str, event: Any) -> Any:  # noqa: ANN401 - structlog's own
        if event.get("event") in {"step_failed", "run_ended"}:
            raise structlog.DropEvent
        return event

    configure_logging(level="debug" if MODE.debug else "warning")
    if not MODE.debug:
        structlog.configure(processors=[drop_failures, *structlog.get_config()["processors"]])
