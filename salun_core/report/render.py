"""Renders the report: evidence, decision and context in, one HTML file out."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun_core.errors import SalunError
from salun_core.registry.manifest import DEBT_LIMIT, RUNS_LIMIT
from salun_core.report import images, plots, view, wording
from salun_core.report.context import ReportContext
from salun_core.report.limits import limits
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
    "resurgence": "UA while the model is fine-tuned on retained data",
    "mask": "density of the mask by layer",
    "training": "training curve",
}
# Kubeflow keeps the page, and with the digest of a small set anybody could try which samples are in it.
_HIDDEN = "not shown, because a small forget set could be found from it"
_NUMBERS = re.compile(r"\[[\s\d.,e+-]+\]")  # a list of numbers reads better on one line


def render_report(evidence: Evidence, decision: GateDecision | None, context: ReportContext) -> str:
    """Render the report as one self-contained HTML page; the same input gives the same bytes.

    A part that was not measured is left out with a line that names it. Raises SalunError if the page would be larger
    than `MAX_BYTES` in UTF-8.
    """
    values = _values(evidence, decision, context)
    page = _template().render(**values, data=_json(evidence, decision))
    if len(page.encode("utf-8")) > MAX_BYTES:  # the JSON is also a file next to the report, the pictures are not
        page = _template().render(**values, data=None)
    if len(page.encode("utf-8")) > MAX_BYTES:
        raise SalunError(
            "the report is too large", f"over {MAX_BYTES} bytes", "shorten the configuration or the lineage in it"
        )
    return page


def write_report(path: Path, evidence: Evidence, decision: GateDecision | None, context: ReportContext) -> None:
    """Render the report into a file, replacing an existing one; the file is complete or does not exist."""
    write_whole(path, render_report(evidence, decision, context).encode("utf-8"))


@lru_cache(maxsize=1)  # a run writes the page twice, and to compile it takes longer than to fill it in
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


def _values(evidence: Evidence, decision: GateDecision | None, context: ReportContext) -> dict[str, Any]:
    """Return everything that the template shows, except the JSON."""
    forgotten, run, made = evidence.forgotten, evidence.run, evidence.generation
    pictures, grids = _pictures(evidence), images.pictures(made.grids if made else ())
    debt = context.debt(forgotten.count, forgotten.train_count, run.method)
    optional = _OPTIONAL_GENERATED if made else _OPTIONAL
    absent = [title for name, title in optional.items() if not {**pictures, "grids": grids}[name]]
    overlaps = {
        name: {state: value for state in plots.STATES if (value := plots.overlap(data, state)) is not None}
        for name, data in evidence.distributions.items()
    }
    return {
        "context": context,
        "evidence": evidence,
        "decision": decision,
        "banner": view.banner(decision, evidence),
        "forgotten": view.forgotten(evidence),
        "tiles": view.tiles(evidence),
        "rows": view.rows(evidence, decision),
        "weights": view.changed_weights(evidence),
        "pictures": pictures,
        "grids": grids,
        "parts": view.parts(made.parts if made else {}),
        "generation": view.generation(made) if made else {},
        "absent": absent + ([] if debt else ["lineage and debt"]),
        "overlaps": overlaps,
        "debt": debt,
        "debt_limit": DEBT_LIMIT,
        "runs_limit": RUNS_LIMIT,
        "limits": limits(evidence),
        "hidden": _HIDDEN,
        "settings": json.dumps(run.config, indent=2, ensure_ascii=False, default=str, sort_keys=True),
        "words": wording,
    }


_drawn: dict[str, dict[str, Any]] = {}  # pictures by digest of their evidence: of the last one only


def _pictures(evidence: Evidence) -> dict[str, Any]:
    """Return each picture as markup, or None if its data is missing.

    A run in one process writes the page twice, before and after the gate; its pictures take a second, and are the same.
    """
    digest = evidence.digest
    found = _drawn.get(digest)
    if found is None:
        found = _draw(evidence)
        _drawn.clear()
        _drawn[digest] = found
    return found


def _draw(evidence: Evidence) -> dict[str, Any]:
    from markupsafe import Markup

    run, made = evidence.run, evidence.generation
    points = [point for point in (made.resurgence if made else []) if math.isfinite(point.ua)]
    quantity = "recognised images" if made else "test accuracy"
    found: dict[str, str | None] = dict.fromkeys(("classes", "roc", "mask", "training", "resurgence"))
    if any(plots.change(row) is not None for row in evidence.per_class):
        found["classes"] = plots.class_accuracy(evidence.per_class, evidence.forgotten.classes, quantity)
    if any(curve.fpr for curve in evidence.roc.values()):
        found["roc"] = plots.roc(evidence.roc)
    if run.density_by_parameter:
        found["mask"] = plots.mask_density(run.density_by_parameter, run.density)
    if any(record.losses for record in run.history):
        found["training"] = plots.training(run.history)
    if points:
        found["resurgence"] = plots.resurgence(points)
    spread = {name: plots.distributions(name, data) for name, data in evidence.distributions.items() if _drawable(data)}
    # Markup switches escaping off: this SVG is drawn here, and its text is escaped.
    return {
        **{name: svg and Markup(svg) for name, svg in found.items()},  # noqa: S704
        "distributions": {name: Markup(svg) for name, svg in spread.items()},  # noqa: S704
    }


def _drawable(data: Distribution) -> bool:
    lists = [counts for item in data.splits.values() for counts in (item.before, item.after, item.reference) if counts]
    return any(map(sum, lists)) and all(len(counts) == len(data.edges) - 1 for counts in lists)


def _json(evidence: Evidence, decision: GateDecision | None) -> str | None:
    """Return the numbers as JSON, without confusion matrix and ROC if they make it too long, or None."""
    for left_out in (set(), {"confusion"}, {"confusion", "roc"}):
        document: dict[str, Any] = {
            "evidence": images.without_images(json.loads(evidence.model_dump_json(exclude=left_out))),
            "decision": json.loads(decision.model_dump_json()) if decision else None,
        }
        document["evidence"]["measured"]["forget_set"] = _HIDDEN
        if decision:
            document["decision"]["evidence_digest"] = _HIDDEN
        text = json.dumps(document, indent=1, ensure_ascii=False)
        text = _NUMBERS.sub(lambda numbers: " ".join(numbers.group().split()), text)
        if len(text) <= _MAX_JSON_CHARS:
            return text
    return None
