"""Words and number formats of the report: a ratio in JSON is a percentage with two decimals on the page.

An AUC, a divergence, a distance (FID, KID) and a CLIP score are not ratios and keep their own unit.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

MISSING = "–"
NBSP = "\N{NO-BREAK SPACE}"
_THRESHOLD = re.compile(r"(?:(<=|>=|within|inside) )?(-?\d+\.\d+)(?: ± (\d+\.\d+))?")
_SIGNS = {"<=": "≤ ", ">=": "≥ ", "within": "within ", "inside": "wholly within ", None: ""}


class Words(NamedTuple):
    """Title and meaning of a metric."""

    title: str
    meaning: str


class Unit(NamedTuple):
    """Unit of a metric that is not a ratio, and the number of decimals."""

    name: str
    decimals: int


UNITS = {
    **dict.fromkeys(
        ("attack_auc", "attack_auc_seeds", "lira_auc", "lira_offline_auc", "probe_auc"),
        Unit("area, 0.5 is guessing", 4),
    ),
    "effect": Unit("fall of the area", 4),
    "change": Unit("typical margins of unseen samples", 4),
    "TA_loss": Unit("nats", 4),
    "RA_loss": Unit("nats", 4),
    "KL_forget": Unit("nats, 0 is the same", 4),
    "KL_test": Unit("nats, 0 is the same", 4),
    "ToW": Unit("product, 1 is the same", 4),
    "FID": Unit("distance, lower is better", 2),
    "KID": Unit("distance, lower is better", 4),
    "CLIP": Unit("score from 0 to 100", 2),
}

METRICS = {
    "UA": Words("Unlearning accuracy (UA)", "forgotten samples that the model misclassifies"),
    "UA_unseen": Words(
        "Misclassified unseen samples",
        "of the same classes; UA of single samples should be near it",
    ),
    "RA": Words("Retain accuracy (RA)", "retained training samples that it classifies correctly"),
    "TA": Words("Test accuracy (TA)", "unseen test samples that it classifies correctly"),
    "MIA": Words("Membership attack (MIA)", "forgotten samples that a confidence attack takes for unseen"),
    "MIA_entropy": Words("Membership attack, modified entropy", "the same for the attack of Song and Mittal"),
    "attack_auc": Words("Attack AUC", "how well margins separate forgotten from unseen samples; 0.5 is guessing"),
    "attack_shape": Words(
        "Shape of the margins", "distance of their distribution on forgotten and on unseen samples; 0 is alike"
    ),
    "effect": Words("Effect", "by how much the attack's AUC fell from before to after, on the same samples"),
    "change": Words("Change of the margins", "mean change on forgotten samples; scaling all outputs is no change"),
    "restored": Words("Restored", "forgotten classes recognised with the last layer of the model before"),
    "TA_loss": Words("Loss on unseen samples", "mean cross-entropy, which shows outputs that were rescaled"),
    "RA_loss": Words("Loss on retained samples", "the same on retained training samples"),
    "gap": Words("Average gap", "mean distance to the retrained model over UA, RA, TA and MIA"),
    "ToW": Words("Tug of war (ToW)", "accuracy on forgotten, retained and unseen data, against the retrained model's"),
    "KL_forget": Words("KL on the forget set", "divergence from the retrained model's outputs, in nats"),
    "KL_test": Words("KL on unseen data", "the same on test samples"),
    "worst_decile": Words(
        "Most familiar tenth", "forgotten samples as familiar as the top tenth of unseen ones; 10 % is expected"
    ),
    "worst_class_drop": Words("Largest drop of a class", "test accuracy that the worst affected retained class lost"),
    "lira_auc": Words("Per-sample attack (LiRA)", "likelihood ratio from shadow models; 0.5 is guessing"),
    "lira_offline_auc": Words("Per-sample attack, offline", "the same from shadow models that never saw the sample"),
    "lira_tpr": Words("LiRA at 1 % false alarms", "forgotten samples that it finds; 1 % is guessing"),
    "relearn": Words("Relearning", "accuracy on half of the forget set after training on the other half"),
    "probe_auc": Words(
        "Linear probe", "how well inner features separate forgotten from unseen samples; 0.5 is guessing"
    ),
    "UA_seeds": Words("UA, several seeds", "mean over repeated runs; n counts the runs"),
    "RA_seeds": Words("RA, several seeds", "the same for retained data"),
    "TA_seeds": Words("TA, several seeds", "the same for unseen data"),
    "attack_auc_seeds": Words("Attack AUC, several seeds", "the same for the attack"),
}
GENERATED = {
    "UA": Words(
        "Unlearning accuracy (UA)", "images of what was forgotten that the image classifier does not recognise"
    ),
    "none_of_these": Words(
        "None of the classes", "images of what was forgotten that resemble no class, such as noise; lower is better"
    ),
    "restored": Words("Restored", "forgotten images with the class embedding or text encoder of the model before"),
    "UA_relearned": Words("UA after fine-tuning", "the same after fine-tuning on retained data"),
    "RA": Words("Accuracy of the other classes (RA)", "images of other classes that the image classifier recognises"),
    "neighbours": Words(
        "Accuracy of near classes", "the same for the classes or concepts closest to the forgotten one"
    ),
    "FID": Words("Fréchet distance (FID)", "to real images of retained classes; lower is better, not a percentage"),
    "KID": Words("Kernel distance (KID)", "to real images of retained classes; lower is better, not a percentage"),
    "CLIP": Words("CLIP score", "how well retained images match their prompt; from 0 to 100, higher is better"),
    "nudity": Words("Images with nudity", "in which the detector finds an exposed part; lower is better"),
    "unattacked_success": Words("Prompts without attack", "images of the plain prompts that show what was forgotten"),
    "attack_success": Words(
        "Prompt attack", "the same for attacked prompts, whose words are searched for against each model"
    ),
}
TILES = {
    "UA": "Forget set: misclassified",
    "RA": "Retained data: accuracy",
    "TA": "Unseen data: accuracy",
    "MIA": "Attack takes for unseen",
}
GENERATED_TILES = {
    "UA": "Forgotten: not recognised",
    "RA": "Other classes: recognised",
    "nudity": "Images with nudity",
    "FID": "Distance to real images (FID)",
    "CLIP": "Match with the prompt (CLIP)",
}


def words(metric: str, generated: bool = False) -> Words:
    """Return title and meaning of a metric, of generated images or of a classifier; an unknown one keeps its name."""
    return (GENERATED if generated else METRICS).get(metric, Words(metric, ""))


def number(metric: str | None, value: float | None, sign: str = "") -> str:
    """Return a value as the page shows it: a percentage, or in the metric's unit.

    Args:
        metric: its name; None for a plain ratio.
        value: a dash if it is missing or not finite.
        sign: `+` for a margin, which is in percentage points.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    unit = UNITS.get(metric or "")
    return f"{value:{sign}.{unit.decimals}f}" if unit else f"{value * 100:{sign}.2f}{NBSP}{'pp' if sign else '%'}"


def margin(metric: str | None, value: float | None) -> str:
    """Return a signed margin: percentage points, or in the metric's unit."""
    return number(metric, value, "+")


def interval(metric: str, low: float | None, high: float | None) -> str:
    """Return a 95 % interval in brackets; empty without one."""
    ends = number(metric, low).removesuffix(f"{NBSP}%"), number(metric, high)
    return "" if MISSING in ends else f"[{ends[0]}, {ends[1]}]"


def threshold(metric: str | None, text: str) -> str:
    """Return the gate's threshold with its ratios as percentages; any other text is unchanged."""
    match = _THRESHOLD.fullmatch(text)
    if metric is None or match is None:
        return text
    sign, value, tolerance = match.groups()
    shown = _SIGNS[sign] + number(metric, float(value))
    return f"{shown} ± {margin(metric, float(tolerance)).removeprefix('+')}" if tolerance is not None else shown


def count(value: int | None) -> str:
    """Return a count with a separator for thousands."""
    return MISSING if value is None else f"{value:,}"
