"""Compares a candidate with the last full training of its line too, so that many small losses do not add up unseen."""

from __future__ import annotations

from salun_core.evaluation import Evidence
from salun_core.storage.lineage import VersionManifest, parse_stored
from salun_core.storage.lookup import Version, read_file, read_version
from salun_core.storage.objects import ObjectStore

EVIDENCE = "evidence.json"
_KEPT = "TA"  # of all metrics this one alone is measured on the same samples for every version


def with_origin(store: ObjectStore, line: str, parent: str, measured: Evidence) -> Evidence:
    """Return evidence in which the test accuracy also says what the last full training had.

    The first child of that training was measured together with it, and carries the figure.

    Args:
        store: where the line is.
        line: the model line.
        parent: the version that the candidate was made from.
        measured: the evidence.

    Raises:
        IntegrityError: a version on the way, or its evidence, is missing or damaged.
    """
    metric = measured.metrics.get(_KEPT)
    if metric is None:
        return measured
    child, manifest = None, read_version(store, line, parent)
    while manifest.lineage.runs_since_training and manifest.parent:
        child, manifest = manifest, read_version(store, line, manifest.parent)
    origin = metric.before if child is None else _before(store, child)
    metrics = {**measured.metrics, _KEPT: metric.model_copy(update={"origin": origin})}
    return measured.model_copy(update={"metrics": metrics})


def _before(store: ObjectStore, manifest: VersionManifest) -> float | None:
    """Return the test accuracy of a version's parent, from the version's own evidence; None where it has none."""
    if EVIDENCE not in manifest.files:
        return None
    data = read_file(store, Version(manifest.digest, manifest), EVIDENCE)
    found = parse_stored(Evidence, data, EVIDENCE).metrics.get(_KEPT)
    return found.before if found else None
