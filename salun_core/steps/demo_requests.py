"""The demo's deletion requests: what they name, and the people whom the digits are said to be of."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from salun_core.data import DataSpec, LoadedData
from salun_core.data.forget_set import ClassTarget, SamplesTarget, SubjectTarget, Target

SAMPLES, DIGITS, WRITERS = 12, 1797, 43
_NOBODY = "no-such-sample"


def with_writers(spec: DataSpec, folder: Path) -> DataSpec:
    """Return the digits with a table of who wrote them.

    Their true writers, 43 of them, are not in the data set; which digit is whose is made up here.

    Args:
        spec: the digits.
        folder: where to write the table.
    """
    path = folder / "writers.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "writer"])
        rows.writerows([f"{index:06d}", f"writer-{index % WRITERS:02d}"] for index in range(DIGITS))
    return spec.model_copy(update={"metadata": str(path.resolve()), "subject_column": "writer"})


def demo_targets(data: LoadedData) -> Mapping[str, Target]:
    """Return what five requests name: two some samples, one a class, one a person, one nothing that there is.

    Of two classes none is forgotten as a whole, and where the data name no people, some more samples are.
    """
    split, table = data.split, data.table
    classes, labels = list(table.classes), table.labels
    chosen = min(3, len(classes) - 1) if len(classes) > 2 else None
    ids = [sample for sample in split.ids("train") if labels[table.position[sample]] != chosen]
    count = max(1, min(SAMPLES, len(split.train) // 50))
    parts = [
        SamplesTarget(dataset_digest=split.dataset_digest, ids=ids[start : start + count])
        for start in range(0, 4 * count, count)
    ]
    person = next((table.subjects[table.position[sample]] for sample in reversed(ids) if any(table.subjects)), None)
    return {
        "samples-a": parts[0],
        "samples-b": parts[1],
        "class": ClassTarget(dataset_digest=split.dataset_digest, class_id=classes[chosen])
        if chosen is not None
        else parts[2],
        "person": SubjectTarget(subject_ref=person) if person else parts[3],
        "nothing": SamplesTarget(ids=[_NOBODY]),
    }
