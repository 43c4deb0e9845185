"""What an audit measures: the outputs of all models on the same samples, read here from files of predictions."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salun_core.data.parquet import arrow_table
from salun_core.data.targets import ClassTarget, RandomTarget, SamplesTarget, read_targets
from salun_core.digest import sha256_file
from salun_core.errors import DataError, UsageError, reported_as
from salun_core.evaluation.likelihood_ratio import Shadows, logit_scaled
from salun_core.evaluation.outputs import TINY, Outputs

if TYPE_CHECKING:
    from salun_core.audit.folders import Networks

SUFFIXES = (".parquet", ".csv", ".npz")
NAME_CHARACTERS = 200  # of a file, as a statement may hold them
MAX_BYTES = 2 * 1024**3  # of one file of predictions: 50 million numbers as text, more than any audit needs
FEWEST_SHADOWS = 2  # models on a side, without which a sample has no variance
_SUM_TOLERANCE = 1e-3  # of probabilities that were rounded
_FORMAT = "see docs/reference/audit.md for the columns"

BySet = Mapping[str, Outputs]
"""Set (forget, unseen) -> outputs of one model, in the same order for all models."""


@dataclass(frozen=True)
class Audited:
    """What is measured."""

    before: BySet
    after: BySet
    references: Sequence[BySet] = ()
    shadows: Shadows | None = None
    emptied: Sequence[int] = ()
    retained: int = 0
    networks: Networks | None = None
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictions:
    """The rows of one file, in the order of its unique ids.

    `member` is whether a shadow model was trained on each sample, None if the file does not contain it.
    """

    source: Path
    ids: Sequence[str]
    outputs: Outputs
    member: np.ndarray | None = None


def is_predictions(name: str) -> bool:
    """Whether a name is that of a file of predictions, and not of a model."""
    return Path(name).suffix.lower() in SUFFIXES


def read_predictions(path: Path) -> Predictions:
    """Read a file of predictions: Parquet, CSV or npz.

    The columns are `id`, `label` and either `logit_0`, `logit_1`, ... or `probability_0`, ...; Parquet may also have
    one list column `logits` or `probabilities`. An npz has the arrays `id`, `label` and `logits` or `probabilities`.
    `member` (0 or 1) is for shadow models. DataError: a column is missing, an id occurs twice, a label is not a class,
    or a value is not finite.
    """
    if not path.is_file():
        raise UsageError(f"there are no predictions {path}", "the file does not exist", "check the path")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is too large", f"over {MAX_BYTES} bytes", "leave out samples that the audit ignores")
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        ".parquet": _parquet,
        ".csv": _csv,
        ".npz": _npz,
    }
    if path.suffix.lower() not in readers:
        raise UsageError(f"{path} is not a file of predictions", f"its suffix is {path.suffix!r}", _FORMAT)
    return _rows(path, readers[path.suffix.lower()](path))


def _rows(path: Path, columns: Mapping[str, np.ndarray]) -> Predictions:
    """Check the columns of a file."""
    for name in ("id", "label"):
        if name not in columns:
            raise DataError(f"{path} has no column {name!r}", f"it has {', '.join(columns) or 'none'}", _FORMAT)
    ids = [str(value) for value in columns["id"].tolist()]
    if len(set(ids)) < len(ids):
        count = len(ids) - len(set(ids))
        raise DataError(f"{path} names {count} samples twice", "each sample needs one row", "remove the repeated rows")
    if not ids:
        raise DataError(f"{path} has no rows", "no sample is in it", "predict the forget set and held-out data")
    scores, logits = _scores(path, columns)
    labels = _whole(path, "label", columns["label"])
    if len(labels) != len(ids) or len(scores) != len(ids):
        raise DataError(f"{path} has columns of different lengths", f"{len(ids)} ids, {len(scores)} outputs", _FORMAT)
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        why = f"labels are from {labels.min()} to {labels.max()}, and there are {scores.shape[1]} outputs"
        raise DataError(f"{path} has labels outside its classes", why, "give class ids from 0, in the order of outputs")
    member = _whole(path, "member", columns["member"]) if "member" in columns else None
    if member is not None and not np.isin(member, (0, 1)).all():
        raise DataError(f"{path} has a member that is not 0 or 1", "", "write 1 if the shadow model saw the sample")
    return Predictions(path, ids, outputs_from(scores, labels, logits=logits), None if member is None else member == 1)


def outputs_from(scores: np.ndarray, labels: np.ndarray, *, logits: bool) -> Outputs:
    """Return outputs from logits, or from probabilities, float64 [N, K]."""
    if logits:
        shifted = scores - scores.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    else:
        logs = np.log(scores / scores.sum(axis=1, keepdims=True) + TINY)
    losses = -logs[np.arange(len(labels)), labels]
    return Outputs(np.exp(logs), losses, labels, scores if logits else None)


def _scores(path: Path, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, bool]:
    """Return the outputs of a file, float64 [N, K], and whether they are logits."""
    found = {}
    for name, single in (("logits", "logit_"), ("probabilities", "probability_")):
        numbered = {key for key in columns if key.startswith(single)}
        if numbered and numbered != {f"{single}{place}" for place in range(len(numbered))}:
            why = f"{len(numbered)} columns must be {single}0 to {single}{len(numbered) - 1}"
            raise DataError(f"{path} lacks an output of a class", why, _FORMAT)
        if numbered:
            found[name] = np.stack([columns[f"{single}{place}"] for place in range(len(numbered))], axis=1)
        elif name in columns:
            found[name] = columns[name]
    if len(found) != 1:
        what = "both logits and probabilities" if found else "neither logits nor probabilities"
        raise DataError(f"{path} has {what}", "the audit needs one of them", _FORMAT)
    (name, values), *_ = found.items()
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} has outputs that are not numbers", str(error)[:100], _FORMAT) from error
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise DataError(f"{path} has outputs of shape {list(scores.shape)}", "each sample needs one per class", _FORMAT)
    if not np.isfinite(scores).all():
        rows = int((~np.isfinite(scores).all(axis=1)).sum())
        raise DataError(
            f"{path} has outputs that are NaN or infinite", f"in {rows} rows", "predict these samples again"
        )
    if name == "probabilities" and (scores.min() < 0 or np.abs(scores.sum(axis=1) - 1).max() > _SUM_TOLERANCE):
        raise DataError(
            f"{path} has probabilities that do not add up to 1", "", "write logits instead, or apply softmax"
        )
    return scores, name == "logits"


def _whole(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} has a {name} that is not a number", str(error)[:100], _FORMAT) from error
    if not np.isfinite(numbers).all() or (numbers != np.floor(numbers)).any():
        raise DataError(f"{path} has a {name} that is not a whole number", "", _FORMAT)
    return numbers.astype(np.int64)


def _parquet(path: Path) -> dict[str, np.ndarray]:
    table = arrow_table([path])
    found = {}
    for name in table.column_names:
        values = table.column(name).to_pylist()
        if any(value is None for value in values):
            raise DataError(f"{path} has an empty {name}", "a value is missing", "predict these samples again")
        try:
            found[name] = np.array(values)
        except ValueError as error:  # lists of different lengths
            raise DataError(f"{path} has rows of different lengths in {name}", "", _FORMAT) from error
    return found


def _csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            names = list(rows.fieldnames or ())
            columns: dict[str, list[str]] = {name: [] for name in names}
            if len(columns) < len(names):
                raise DataError(f"{path} has two columns of one name", "", "rename one of them")
            for row in rows:
                if None in row or None in row.values():
                    why = f"line {rows.line_num} has another number of values than the first line"
                    raise DataError(f"{path} is damaged", why, "write it again")
                for name in names:
                    columns[name].append(row[name])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}", str(error)[:100], "write it as UTF-8 with commas") from error
    return {name: np.array(values) for name, values in columns.items()}


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise DataError(f"{path} is too large", f"it would unpack to {size:,} bytes", "leave out samples")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"cannot read {path}", str(error)[:100], "write it with numpy.savez") from error


def audited_predictions(
    before: Path,
    after: Path,
    forget: Path,
    held_out: Path | None,
    references: Sequence[Path] = (),
    shadows: Sequence[Path] = (),
) -> Audited:
    """Read predictions of all models on the same samples.

    `forget` is a text file with one id a line, or a target in YAML or JSON; a class target is all samples of the class
    that are not held out. `held_out` are samples that no model was trained on (UsageError without them). Shadow models
    need the column `member`. DataError if the files are not about the same samples and classes.
    """
    if held_out is None:
        why = "without samples that no model was trained on there is nothing to compare the forget set with"
        raise UsageError("no held-out samples are named", why, "give their ids: --held-out FILE")
    given = {"before": [before], "after": [after], "reference": references, "shadow": shadows}
    files = {role: [read_predictions(path) for path in paths] for role, paths in given.items()}
    first = files["before"][0]
    for item in (other for items in files.values() for other in items):
        _require_same(first, item)
    unseen = _chosen(held_out, first, "held-out", set())
    gone, whole = _chosen_with_kind(forget, first, unseen)
    _distinct(files)
    position = {sample: place for place, sample in enumerate(first.ids)}
    rest = [sample for sample in first.ids if sample not in gone and sample not in unseen]
    sets = {"forget": [s for s in first.ids if s in gone], "unseen": [s for s in first.ids if s in unseen]}
    of_forget, of_rest = (
        {int(first.outputs.labels[position[sample]]) for sample in ids} for ids in (sets["forget"], rest)
    )
    emptied = of_forget if whole else of_forget - of_rest if rest else set()

    def by_set(item: Predictions) -> dict[str, Outputs]:
        place = {sample: row for row, sample in enumerate(item.ids)}
        return {name: item.outputs.where(np.array([place[s] for s in ids])) for name, ids in sets.items()}

    pool = [*sets["forget"], *sets["unseen"]]
    digests = {role: digests_of(paths) for role, paths in given.items() if paths}
    return Audited(
        by_set(first),
        by_set(files["after"][0]),
        [by_set(item) for item in files["reference"]],
        _shadows(files["shadow"], pool) if shadows else None,
        sorted(emptied),
        len(rest),
        digests={**digests, "forget": digests_of([forget]), "held_out": digests_of([held_out])},
    )


def digests_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names, which get a number if there are several."""
    many = len(paths) > 1
    names = [f"{number}/{path.name}" if many else path.name for number, path in enumerate(paths, 1)]
    return {name[-NAME_CHARACTERS:]: sha256_file(path) for name, path in zip(names, paths, strict=True)}


def _require_same(first: Predictions, item: Predictions) -> None:
    """Check that a file is about the samples, labels and classes of the first one."""
    missing, more = set(first.ids) - set(item.ids), set(item.ids) - set(first.ids)
    if missing or more:
        why = f"{len(missing)} samples of {first.source} are missing, and {len(more)} are not in it"
        raise DataError(
            f"{item.source} has predictions of other samples", why, "predict the same samples with each model"
        )
    classes = first.outputs.probabilities.shape[1], item.outputs.probabilities.shape[1]
    if classes[0] != classes[1]:
        why = f"it has {classes[1]} classes, and {first.source} has {classes[0]}"
        raise DataError(f"{item.source} is of another kind of model", why, "audit models of the same classes")
    labels = dict(zip(first.ids, first.outputs.labels.tolist(), strict=True))
    if any(labels[sample] != label for sample, label in zip(item.ids, item.outputs.labels.tolist(), strict=True)):
        raise DataError(f"{item.source} has other labels", f"they differ from {first.source}", "write the true labels")


def _distinct(files: Mapping[str, Sequence[Predictions]]) -> None:
    """Refuse a reference that is another model of the audit: it would be compared with itself."""
    seen: dict[bytes, Predictions] = {}
    for role in ("before", "after", "reference"):
        for item in files[role]:
            order = np.argsort(item.ids)
            scores = item.outputs.probabilities if item.outputs.logits is None else item.outputs.logits
            key = scores[order].tobytes()
            if role == "reference" and key in seen:
                raise same_model(str(item.source), str(seen[key].source))
            seen[key] = item


def same_model(reference: str, other: str) -> DataError:
    """Return the error for a reference that is another model of the audit."""
    return DataError(
        f"{reference} is the same model as {other}",
        "a reference must be a retrained model of its own",
        "retrain with another seed, or leave it out",
    )


def _chosen(path: Path, rows: Predictions, name: str, apart: set[str]) -> set[str]:
    return _chosen_with_kind(path, rows, apart, name)[0]


def _chosen_with_kind(path: Path, rows: Predictions, apart: set[str], name: str = "forget") -> tuple[set[str], bool]:
    """Return the samples that a file names, and whether it names whole classes only."""
    known, chosen, kinds = set(rows.ids), set[str](), set[str]()
    with reported_as(f"the file of the {name} samples has faults"):
        for target in read_ids(path):
            kinds.add(target.kind)
            if isinstance(target, ClassTarget):
                if not str(target.named).isdecimal():
                    what = f"{path} names a class by its name"
                    raise UsageError(what, "files of predictions have no names", "write `class_index: N`")
                of_class = rows.outputs.labels == int(target.named)
                ids = {rows.ids[place] for place in np.flatnonzero(of_class).tolist()} - apart
            else:
                ids = set(target.ids or ())
            if lost := ids - known:
                why = f"{len(lost)} of {len(ids)} ids are not in {rows.source}"
                raise DataError(f"predictions of the {name} samples are missing", why, "predict all of them")
            chosen |= ids
        if both := chosen & apart:
            why = f"{len(both)} of them are in both"
            raise DataError("forgotten samples are also held out", why, "name samples that no model was trained on")
        if not chosen:
            raise DataError(f"{path} names no {name} sample of the predictions", "it is empty", "check the ids")
    return chosen, kinds == {"class"}


def read_ids(path: Path) -> list[SamplesTarget | ClassTarget]:
    """Read a text file with one id a line, or targets of samples and classes in YAML or JSON; UsageError for others."""
    if path.suffix in {".yaml", ".yml", ".json"}:
        found = []
        for target in read_targets(path):
            if not isinstance(target, SamplesTarget | ClassTarget) or (
                isinstance(target, SamplesTarget) and target.ids is None
            ):
                draw = " of a random share" if isinstance(target, RandomTarget) else ""
                what = f"{path} does not name samples or classes"
                raise UsageError(what, f"it has a target{draw} that only the store resolves", "list the ids")
            found.append(target)
        return found
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}", str(error)[:100], "give a text file with one id a line") from error
    ids = [line.strip() for line in lines if line.strip()]
    if len(set(ids)) < len(ids):
        raise UsageError(f"{path} names an id twice", f"{len(ids) - len(set(ids))} times", "remove the repeated ids")
    return [SamplesTarget(ids=ids)] if ids else []


def _shadows(files: Sequence[Predictions], pool: Sequence[str]) -> Shadows:
    rows, inside = [], []
    for item in files:
        if item.member is None:
            why = "the attack must know which samples each shadow model was trained on"
            raise DataError(f"{item.source} has no column 'member'", why, "write 1 for these samples, and 0 for others")
        place = {sample: row for row, sample in enumerate(item.ids)}
        chosen = np.array([place[sample] for sample in pool])
        rows.append(logit_scaled(item.outputs.where(chosen)))
        inside.append(item.member[chosen])
    return checked_shadows(Shadows(np.stack(rows), np.stack(inside)))


def checked_shadows(shadows: Shadows) -> Shadows:
    """Check that each sample was left out by at least two shadow models; DataError if not."""
    left_out = (~shadows.inside).sum(axis=0)
    if left_out.min() < FEWEST_SHADOWS:
        count = int((left_out < FEWEST_SHADOWS).sum())
        why = f"{count} samples were left out by fewer than {FEWEST_SHADOWS} of {len(shadows.inside)} models"
        raise DataError("the shadow models do not fit the samples", why, "train more shadow models without them")
    return shadows
