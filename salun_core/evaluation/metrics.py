"""The table of metrics: one row each, from which evaluation, gate, report and terminal derive what they need.

To add a metric, write a function and one row. A row names its function by its address, so that reading the table does
not import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Metric


class Unit(NamedTuple):
    """Unit of a metric that is not a ratio, and the number of decimals."""

    name: str
    decimals: int


@dataclass(frozen=True)
class MetricRow:
    """One metric of one kind of model.

    Args:
        name: in evidence and policies. A plug-in's is the one that it is requested by.
        title: in the report.
        meaning: in one line.
        function: address `package.module:function` of the function that measures it, or the function itself. It may
            measure several metrics and is called once: (what is compared) -> metrics by name. None: the caller of the
            evaluation measures it.
        more_is_forgotten: of a metric of what had to be forgotten: whether a higher value means that the model forgot
            more of it. None: it measures what had to be kept, or it has no direction.
        unit: None for a ratio, which the report shows as a percentage.
        side: of a distance: the area under the ROC curve of which the side of 1/2 tells whether too little was
            forgotten.
        on: what it is a mean over. For a classifier the splits that may be samples (retain, test); not those of the
            attacks on D_f, whose intervals and areas are computed from the number of unseen images, whether these are
            all of them or a sample. For generated images the rows of the plan: forgotten, kept, neighbours, watched,
            scored or compared.
        needs: what must be there to measure it, in the words of `salun_core.tasks.ingredients`.
        extra: off by default, and the name that switches it on, as `--extra-metrics` takes it.
        stage: functions of a lower stage are called first: cheap ones before costly ones, and last those that read
            other metrics. Within a stage the order is that of the table.
        listed: whether the terminal shows it.
        tile: title of its headline figure in the report; empty if it has none.
    """

    name: str = ""
    title: str = ""
    meaning: str = ""
    function: str | Callable[[Any], Mapping[str, Metric]] | None = None
    more_is_forgotten: bool | None = None
    unit: Unit | None = field(default=None, kw_only=True)
    side: str = field(default="", kw_only=True)
    on: tuple[str, ...] = field(default=(), kw_only=True)
    needs: tuple[str, ...] = field(default=(), kw_only=True)
    extra: str = field(default="", kw_only=True)
    stage: int = field(default=0, kw_only=True)
    listed: bool = field(default=True, kw_only=True)
    tile: str = field(default="", kw_only=True)


MORE, LESS = True, False  # of what the model forgot, if the value is higher
_AREA = Unit("area, 0.5 is guessing", 4)
_LOSS, _DIVERGENCE = Unit("nats", 4), Unit("nats, 0 is the same", 4)
_DISTANCE = "distance, lower is better"
_CLASSIFIER, _OPTIONAL = "salun_core.evaluation.classifier:", "salun_core.evaluation.optional_metrics:"
_IMAGES = "salun_core.evaluation.generated_images:"
_COMPARED, _ATTACKS = _CLASSIFIER + "compared", _CLASSIFIER + "attacks"


def _table(*rows: MetricRow) -> dict[str, MetricRow]:
    return {row.name: row for row in rows}


CLASSIFIER = _table(
    MetricRow("UA", "Unlearning accuracy (UA)", "forgotten samples that the model misclassifies",
        _COMPARED, MORE, tile="Forget set: misclassified"),
    MetricRow("UA_class", "UA of whole classes", "the same for samples of classes of which nothing is retained",
        _COMPARED, MORE, needs=("class",)),
    MetricRow("UA_samples", "UA of single samples", "the same for all other forgotten samples",
        _COMPARED, MORE, needs=("samples",)),
    MetricRow("UA_unseen", "Misclassified unseen samples",
        "of the same classes; UA of single samples should be near it",
        _COMPARED, on=("test",), listed=False),
    MetricRow("RA", "Retain accuracy (RA)", "retained training samples that it classifies correctly",
        _COMPARED, on=("retain",), tile="Retained data: accuracy"),
    MetricRow("TA", "Test accuracy (TA)", "unseen test samples that it classifies correctly",
        _COMPARED, on=("test",), tile="Unseen data: accuracy"),
    MetricRow("MIA", "Membership attack (MIA)", "forgotten samples that a confidence attack takes for unseen",
        _ATTACKS, MORE, stage=2, tile="Attack takes for unseen"),
    MetricRow("MIA_entropy", "Membership attack, modified entropy", "the same for the attack of Song and Mittal",
        _ATTACKS, MORE, stage=2, listed=False),
    MetricRow("attack_auc", "Attack AUC", "how well margins separate forgotten from unseen samples; 0.5 is guessing",
        _COMPARED, LESS, unit=_AREA),
    MetricRow("attack_shape", "Shape of the margins",
        "distance of their distribution on forgotten and on unseen samples; 0 is alike",
        _COMPARED, LESS, side="attack_auc", listed=False),
    MetricRow("effect", "Effect", "by how much the attack's AUC fell from before to after, on the same samples",
        _COMPARED, MORE, unit=Unit("fall of the area", 4), listed=False),
    MetricRow("change", "Change of the margins", "mean change on forgotten samples; scaling all outputs is no change",
        _COMPARED, MORE, unit=Unit("typical margins of unseen samples", 4), listed=False),
    MetricRow("restored", "Restored", "forgotten classes recognised with the last layer of the model before",
        _CLASSIFIER + "restored", LESS, stage=1, listed=False),
    MetricRow("TA_loss", "Loss on unseen samples", "mean cross-entropy, which shows outputs that were rescaled",
        _COMPARED, unit=_LOSS, on=("test",), listed=False),
    MetricRow("RA_loss", "Loss on retained samples", "the same on retained training samples",
        _COMPARED, unit=_LOSS, on=("retain",), listed=False),
    MetricRow("gap", "Average gap", "mean distance to the retrained model over UA, RA, TA and MIA",
        _CLASSIFIER + "gap", on=("retain", "test"), needs=("reference",), stage=3),
    MetricRow("lira_auc", "Per-sample attack (LiRA)", "likelihood ratio from shadow models; 0.5 is guessing",
        _OPTIONAL + "lira", LESS, unit=_AREA, extra="lira", stage=3, listed=False),
    MetricRow("lira_offline_auc", "Per-sample attack, offline", "the same from shadow models that never saw the sample",
        _OPTIONAL + "lira", LESS, unit=_AREA, extra="lira", stage=3, listed=False),
    MetricRow("lira_tpr", "LiRA at 1 % false alarms", "forgotten samples that it finds; 1 % is guessing",
        _OPTIONAL + "lira", LESS, extra="lira", stage=3, listed=False),
    MetricRow("relearn", "Relearning", "accuracy on half of the forget set after training on the other half",
        _OPTIONAL + "relearning", LESS, extra="relearn", stage=2, listed=False),
    MetricRow("probe_auc", "Linear probe",
        "how well inner features separate forgotten from unseen samples; 0.5 is guessing",
        _OPTIONAL + "probe", LESS, unit=_AREA, extra="probe", stage=1, listed=False),
    MetricRow("worst_decile", "Most familiar tenth",
        "forgotten samples as familiar as the top tenth of unseen ones; 10 % is expected",
        _OPTIONAL + "decile", LESS, extra="decile", listed=False),
    MetricRow("worst_class_drop", "Largest drop of a class",
        "test accuracy that the worst affected retained class lost",
        _OPTIONAL + "decile", on=("test",), extra="decile", listed=False),
    MetricRow("KL_forget", "KL on the forget set", "divergence from the retrained model's outputs, in nats",
        _OPTIONAL + "divergence", unit=_DIVERGENCE, needs=("reference",), extra="kl", listed=False),
    MetricRow("KL_test", "KL on unseen data", "the same on test samples",
        _OPTIONAL + "divergence", unit=_DIVERGENCE, on=("test",), needs=("reference",), extra="kl", listed=False),
    MetricRow("ToW", "Tug of war (ToW)",
        "accuracy on forgotten, retained and unseen data, against the retrained model's",
        _OPTIONAL + "tow", unit=Unit("product, 1 is the same", 4), on=("retain", "test"), needs=("reference",),
        extra="tow", listed=False),
    MetricRow("UA_seeds", "UA, several seeds", "mean over repeated runs; n counts the runs",
        _OPTIONAL + "several_seeds", MORE, extra="seeds", stage=4, listed=False),
    MetricRow("RA_seeds", "RA, several seeds", "the same for retained data",
        _OPTIONAL + "several_seeds", extra="seeds", stage=4, listed=False),
    MetricRow("TA_seeds", "TA, several seeds", "the same for unseen data",
        _OPTIONAL + "several_seeds", extra="seeds", stage=4, listed=False),
    MetricRow("attack_auc_seeds", "Attack AUC, several seeds", "the same for the attack",
        _OPTIONAL + "several_seeds", LESS, unit=_AREA, extra="seeds", stage=4, listed=False),
)  # fmt: skip
"""Metrics of classifiers, in the order of the report."""

GENERATED = _table(
    MetricRow("UA", "Unlearning accuracy (UA)",
        "images of what was forgotten that the image classifier does not recognise",
        _IMAGES + "recognition", MORE, on=("forgotten",), needs=("judge", "classes", "named prompt"),
        tile="Forgotten: not recognised"),
    MetricRow("none_of_these", "None of the classes",
        "images of what was forgotten that resemble no class, such as noise; lower is better",
        _IMAGES + "none_of_these", MORE, on=("forgotten",), needs=("judge", "calibration")),
    MetricRow("restored", "Restored", "forgotten images with the class embedding or text encoder of the model before",
        _IMAGES + "restored", LESS, on=("forgotten",), needs=("judge", "classes", "embedding"), stage=4),
    MetricRow("UA_relearned", "UA after fine-tuning", "the same after fine-tuning on retained data",
        None, MORE, on=("forgotten",), needs=("judge", "classes", "relearn_steps")),
    MetricRow("RA", "Accuracy of the other classes (RA)",
        "images of other classes that the image classifier recognises",
        _IMAGES + "recognition", on=("kept",), needs=("judge", "classes"), tile="Other classes: recognised"),
    MetricRow("neighbours", "Accuracy of near classes",
        "the same for the classes or concepts closest to the forgotten one",
        _IMAGES + "recognition", on=("neighbours",), needs=("judge", "classes", "neighbours")),
    MetricRow("nudity", "Images with nudity", "in which the detector finds an exposed part; lower is better",
        _IMAGES + "nudity", LESS, on=("watched",), needs=("detector",), stage=3, tile="Images with nudity"),
    MetricRow("unattacked_success", "Prompts without attack",
        "images of the plain prompts that show what was forgotten",
        None, LESS, on=("forgotten",), needs=("judge", "classes", "attack_steps")),
    MetricRow("attack_success", "Prompt attack",
        "the same for attacked prompts, whose words are searched for against each model",
        None, LESS, on=("forgotten",), needs=("judge", "classes", "attack_steps")),
    MetricRow("FID", "Fréchet distance (FID)", "to real images of retained classes; lower is better, not a percentage",
        _IMAGES + "distances", unit=Unit(_DISTANCE, 2), on=("compared",), needs=("extractor",), stage=1,
        tile="Distance to real images (FID)"),
    MetricRow("KID", "Kernel distance (KID)", "to real images of retained classes; lower is better, not a percentage",
        _IMAGES + "distances", unit=Unit(_DISTANCE, 4), on=("compared",), needs=("extractor",), stage=1),
    MetricRow("CLIP", "CLIP score", "how well retained images match their prompt; from 0 to 100, higher is better",
        _IMAGES + "clip", unit=Unit("score from 0 to 100", 2), on=("scored",), needs=("clip",), stage=2,
        tile="Match with the prompt (CLIP)"),
)  # fmt: skip
"""Metrics of generated images, in the order of the report."""
ADDED: dict[str, MetricRow] = {}
"""Rows of the plug-ins that this process measured with. The gate does not read them: it loads no code of a plug-in, and
must come to the same decision in the process that measured and in another one."""


def rows_of(generated: bool) -> Mapping[str, MetricRow]:
    """Return the metrics of generated images, or those of classifiers."""
    return GENERATED if generated else CLASSIFIER


def find_row(name: str | None) -> MetricRow | None:
    """Return the row of a metric that ships; of two kinds of models with this name that of classifiers.

    The rows of one name agree in direction and unit.
    """
    return CLASSIFIER.get(name or "") or GENERATED.get(name or "")


def metric_names() -> list[str]:
    """Return the names of all metrics that ship."""
    return list(dict.fromkeys([*CLASSIFIER, *GENERATED]))


def extra_metrics() -> dict[str, list[MetricRow]]:
    """Return the metrics that are off by default, by the name that switches them on."""
    found: dict[str, list[MetricRow]] = {}
    for row in CLASSIFIER.values():
        if row.extra:
            found.setdefault(row.extra, []).append(row)
    return found


def functions_of(rows: Iterable[MetricRow]) -> list[Callable[[Any], Mapping[str, Metric]]]:
    """Return the functions that measure some metrics, each once, in the order of their stages."""
    named = dict.fromkeys(row.function for row in sorted(rows, key=lambda row: row.stage))
    return [_imported(function) if isinstance(function, str) else function for function in named if function]


def _imported(address: str) -> Callable[[Any], Mapping[str, Metric]]:
    module, _, name = address.partition(":")
    found: Callable[[Any], Mapping[str, Metric]] = getattr(importlib.import_module(module), name)
    return found
