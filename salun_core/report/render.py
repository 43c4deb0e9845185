"""Renders the report: evidence, decision and context in, one HTML file out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun_core.errors import IntegrityError, SalunError
from salun_core.report import generated, plots, view, wording
from salun_core.report import plots as histograms
from salun_core.report.context import ReportContext
from salun_core.report.plots import STATES
from salun_core.storage.local_files import write_whole

if TYPE_CHECKING:
    from jinja2 import Template

    from salun_core.evaluation.evidence import Distribution, Evidence
    from salun_core.gate import GateDecision

MAX_BYTES = 3_000_000
_MAX_JSON_CHARS = 1_500_000
_OPTIONAL = {
    "distributions": "distributions of loss and confidence",
    "classes": "accuracy by class",
    "roc": "curve of the membership attack",
    "mask": "density of the mask by layer",
    "training": "training curve",
}
_OPTIONAL_GENERATED = {
    "grids": "images before and after",
    "classes": "accuracy by class of the generated images",
    "resurgence": "what fine-tuning brings back",
    "mask": "density of the mask by layer",
    "training": "training curve",
}
_NUMBERS = re.compile(r"\[[\s\d.,e+-]+\]")  # a list of numbers reads better on one line


def render_report(evidence: Evidence, decision: GateDecision | None, context: ReportContext) -> str:
    """Render the report as one self-contained HTML page.

    Args:
        evidence: what was measured; a part that is missing is left out with a line that says so.
        decision: the gate's answer, or None where nothing judged yet.
        context: model line, lineage, and the command to make the run again.

    Returns:
        The page, at most `MAX_BYTES` in UTF-8, the same bytes for the same input.

    Raises:
        SalunError: the page would be larger than that.
    """
    values, data = _values(evidence, decision, context), _json(evidence, decision)
    page = _template().render(**values, data=data)
    if data and len(page.encode("utf-8")) > MAX_BYTES:  # the JSON also lies beside the report, the pictures do not
        page = _template().render(**values, data=None)
    if len(page.encode("utf-8")) > MAX_BYTES:
        raise SalunError(
            "the report is too large", f"over {MAX_BYTES} bytes", "shorten the configuration or the lineage in it"
        )
    return page


def _values(evidence: Evidence, decision: GateDecision | None, context: ReportContext) -> dict[str, Any]:
    """Return what the template shows, but for the JSON."""
    forgotten, run, made = evidence.forgotten, evidence.run, evidence.generation
    pictures, grids = _pictures(evidence), generated.pictures(made.grids if made else ())
    debt = context.debt(forgotten.count, forgotten.train_count, run.method)
    return {
        "context": context,
        "evidence": evidence,
        "decision": decision,
        "banner": view.banner(
            decision, decision is None or decision.evidence_digest == _digest(evidence), made is not None
        ),
        "forgotten": view.forgotten(evidence),
        "tiles": view.tiles(evidence),
        "rows": view.rows(evidence, decision),
        "built_in": view.built_in(decision),
        "weights": view.changed_weights(evidence),
        "pictures": pictures,
        "grids": grids,
        "parts": generated.parts(made.parts if made else {}),
        "making": generated.making(made) if made else {},
        "absent": _absent(evidence, {**pictures, "grids": grids}) + ([] if debt else ["lineage and debt"]),
        "overlaps": _overlaps(evidence),
        "debt": debt,
        "limits": view.limits(evidence),
        "settings": json.dumps(run.config, indent=2, ensure_ascii=False, default=str, sort_keys=True),
        "words": wording,
    }


def _absent(evidence: Evidence, there: dict[str, Any]) -> list[str]:
    optional = _OPTIONAL_GENERATED if evidence.generation else _OPTIONAL
    return [title for name, title in optional.items() if not there[name]]


def write_report(path: Path, evidence: Evidence, decision: GateDecision | None, context: ReportContext) -> None:
    """Render the report into a file; the file is there whole or not at all.

    Args:
        path: where to; a file there is replaced.
        evidence: as for `render_report`.
        decision: as for `render_report`.
        context: as for `render_report`.

    Raises:
        StoreError: the file cannot be written.
        SalunError: the page would be too large.
    """
    page = render_report(evidence, decision, context).encode("utf-8")
    write_whole(path, page)


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("salun_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _digest(evidence: Evidence) -> str | None:
    from salun_core.gate import digest_of

    try:
        return digest_of(evidence)
    except IntegrityError:  # it holds a NaN, so no decision can name it
        return None


def _pictures(evidence: Evidence) -> dict[str, Any]:
    """Return each picture as markup, or None where its data is missing."""
    from markupsafe import Markup

    run, made = evidence.run, evidence.generation
    measured = any(plots.change(row) is not None for row in evidence.per_class)
    again = [point for point in (made.resurgence if made else []) if math.isfinite(point.ua)]
    quantity = "recognised images" if made else "test accuracy"
    sources: dict[str, tuple[bool, Callable[[], str]]] = {
        "classes": (measured, lambda: plots.class_accuracy(evidence.per_class, evidence.forgotten.classes, quantity)),
        "roc": (any(curve.fpr for curve in evidence.roc.values()), lambda: plots.roc(evidence.roc)),
        "mask": (bool(run.density_by_parameter), lambda: plots.mask_density(run.density_by_parameter, run.density)),
        "training": (any(record.losses for record in run.history), lambda: plots.training(run.history)),
        "resurgence": (bool(again), lambda: plots.resurgence(again)),
    }
    drawn = {name: paint() for name, (there, paint) in sources.items() if there}
    spread = {
        name: histograms.distributions(name, data) for name, data in evidence.distributions.items() if _drawable(data)
    }
    safe = {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - our own SVG, its text escaped
    return {**dict.fromkeys(sources), **safe, "distributions": {name: Markup(svg) for name, svg in spread.items()}}  # noqa: S704


def _drawable(data: Distribution) -> bool:
    series = list(data.splits.values())
    lists = [counts for item in series for counts in (item.before, item.after, item.reference) if counts]
    return any(map(sum, lists)) and all(len(counts) == len(data.edges) - 1 for counts in lists)


def _overlaps(evidence: Evidence) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, data in evidence.distributions.items():
        values = {state: histograms.overlap(data, state) for state in STATES}
        found[name] = {state: value for state, value in values.items() if value is not None}
    return found


def _json(evidence: Evidence, decision: GateDecision | None) -> str | None:
    """Return the numbers as JSON, without the confusion matrix where that makes it too long, or None."""
    for left_out in (set(), {"confusion"}, {"confusion", "roc"}):
        document = {
            "evidence": generated.without_images(json.loads(evidence.model_dump_json(exclude=left_out))),
            "decision": json.loads(decision.model_dump_json()) if decision else None,
        }
        text = _NUMBERS.sub(
            lambda list_: " ".join(list_.group().split()), json.dumps(document, indent=1, ensure_ascii=False)
        )
        if len(text) <= _MAX_JSON_CHARS:
            return text
    return None
