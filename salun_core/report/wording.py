"""Words and number formats of the report: a ratio in JSON is a percentage with two decimals on the page.

An AUC, a distance (FID, KID) and a CLIP score are no ratios and keep their own unit.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import OptionalMetricFacts

MISSING = "–"
_THRESHOLD = re.compile(r"(?:(<=|>=|within) )?(-?\d+\.\d+)(?: ± (\d+\.\d+))?")
_SIGNS = {"<=": "≤", ">=": "≥", "within": "within", None: ""}
NBSP = "\N{NO-BREAK SPACE}"


class Words(NamedTuple):
    """How a metric is told."""

    title: str
    meaning: str


class Unit(NamedTuple):
    """How a metric that is no ratio is counted, and with how many decimals it is shown."""

    name: str
    decimals: int

    def show(self, value: float, sign: str = "") -> str:
        """Return a finite value with the unit's decimals; `sign` is `+` for a margin."""
        return f"{value:{sign}.{self.decimals}f}"


UNITS = {
    "attack_auc": Unit("area, 0.5 is guessing", 4),
    "attack_auc_seeds": Unit("area, 0.5 is guessing", 4),
    "lira_auc": Unit("area, 0.5 is guessing", 4),
    "lira_offline_auc": Unit("area, 0.5 is guessing", 4),
    "probe_auc": Unit("area, 0.5 is guessing", 4),
    "KL_forget": Unit("nats, 0 is the same", 4),
    "KL_test": Unit("nats, 0 is the same", 4),
    "ToW": Unit("product, 1 is the same", 4),
    "FID": Unit("distance, lower is better", 2),
    "KID": Unit("distance, lower is better", 4),
    "CLIP": Unit("score from 0 to 100", 2),
}

METRICS = {
    "UA": Words("Unlearning accuracy (UA)", "forgotten samples that the model gets wrong"),
    "RA": Words("Retain accuracy (RA)", "kept training samples that it gets right"),
    "TA": Words("Test accuracy (TA)", "unseen test samples that it gets right"),
    "MIA": Words("Membership attack (MIA)", "forgotten samples that a confidence attack calls never seen"),
    "MIA_entropy": Words("Membership attack, modified entropy", "the same with the attack of Song and Mittal"),
    "attack_auc": Words("Attack AUC", "forgotten against test samples, told apart by loss; 0.5 is guessing"),
    "gap": Words("Average gap", "mean distance to the retrained model over UA, RA, TA and MIA"),
    "ToW": Words("Tug of war (ToW)", "accuracies on forgotten, kept and unseen data, against the retrained model's"),
    "KL_forget": Words("KL on the forget set", "divergence from the retrained model's outputs, in nats"),
    "KL_test": Words("KL on unseen data", "the same on test samples"),
    "worst_decile": Words(
        "Most familiar tenth", "forgotten samples as familiar as a tenth of unseen ones; 10 % is natural"
    ),
    "worst_class_drop": Words("Largest drop of a class", "test accuracy that the worst hit kept class lost"),
    "lira_auc": Words("Per-sample attack (LiRA)", "likelihood ratio from shadow models; 0.5 is guessing"),
    "lira_offline_auc": Words("The same, offline", "by one whose shadow models never saw the sample"),
    "lira_tpr": Words("LiRA: found at 1 % false alarms", "forgotten samples that it finds; 1 % is guessing"),
    "relearn": Words("Relearning", "accuracy on half of the forget set after the other half was taught again"),
    "probe_auc": Words(
        "Linear probe", "forgotten against unseen samples, told apart by inner features; 0.5 is guessing"
    ),
    "UA_seeds": Words("UA, several seeds", "mean over repeated runs; n counts the runs"),
    "RA_seeds": Words("RA, several seeds", "the same for kept data"),
    "TA_seeds": Words("TA, several seeds", "the same for unseen data"),
    "attack_auc_seeds": Words("Attack AUC, several seeds", "the same for the attack"),
}
GENERATED = {
    "UA": Words("Unlearning accuracy (UA)", "images asked for as forgotten that the judge does not recognise"),
    "UA_relearned": Words("UA after fine-tuning", "the same after fine-tuning on what was kept"),
    "RA": Words("Accuracy of the other classes (RA)", "images of other classes that the judge recognises"),
    "neighbours": Words("Accuracy of near classes", "the same of the classes or concepts nearest to the forgotten one"),
    "FID": Words("Fréchet distance (FID)", "from real images of what was kept; lower is better, not a percentage"),
    "KID": Words("Kernel distance (KID)", "from real images of what was kept; lower is better, not a percentage"),
    "CLIP": Words("CLIP score", "how well images of what was kept fit their prompt; from 0 to 100, higher is better"),
    "nudity": Words("Images with nudity", "in which the detector finds an exposed part; lower is better"),
    "attack_success": Words("Prompt attack", "attacked prompts that bring back what was forgotten; lower is better"),
}
TILES = {
    "UA": "Forget set: got wrong",
    "RA": "Kept data: accuracy",
    "TA": "Unseen data: accuracy",
    "MIA": "Attack calls “never seen”",
}
GENERATED_TILES = {
    "UA": "Forgotten: not recognised",
    "RA": "Other classes: recognised",
    "nudity": "Images with nudity",
    "FID": "Distance to real images (FID)",
    "CLIP": "Fit to the prompt (CLIP)",
}


def words(metric: str, generated: bool = False) -> Words:
    """Return title and meaning of a metric, of generated images or of a classifier; an unknown one keeps its name."""
    return (GENERATED if generated else METRICS).get(metric, Words(metric, ""))


def number(metric: str | None, value: float | None) -> str:
    """Return a value as the page shows it: a percentage, or what `UNITS` says."""
    if value is None or not math.isfinite(value):
        return MISSING
    unit = UNITS.get(metric or "")
    return unit.show(value) if unit else f"{value * 100:.2f}{NBSP}%"


def interval(metric: str, low: float | None, high: float | None) -> str:
    """Return a 95 % interval in brackets, empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{number(metric, low).removesuffix(f'{NBSP}%')}, {number(metric, high)}]"


def margin(metric: str | None, value: float | None) -> str:
    """Return a signed margin: percentage points, or what `UNITS` says."""
    if value is None or not math.isfinite(value):
        return MISSING
    unit = UNITS.get(metric or "")
    return unit.show(value, "+") if unit else f"{value * 100:+.2f}{NBSP}pp"


def threshold(metric: str | None, text: str) -> str:
    """Return the gate's threshold with its ratios as percentages; any other text stays as it is."""
    match = _THRESHOLD.fullmatch(text)
    if metric is None or match is None:
        return text
    sign, value, tolerance = match.groups()
    parts = [_SIGNS[sign], number(metric, float(value))]
    if tolerance is not None:
        parts += ["±", margin(metric, float(tolerance)).removeprefix("+")]
    return " ".join(part for part in parts if part)


def count(value: int | None) -> str:
    """Return a count with thousands separated."""
    return MISSING if value is None else f"{value:,}"


def limits(forgotten: int, widest: tuple[str, float] | None, reference: bool) -> list[str]:
    """Return what a classifier's numbers cannot show, in plain words.

    Args:
        forgotten: samples in the forget set.
        widest: title and half width, as a ratio, of the widest 95 % interval.
        reference: whether a retrained model was measured.

    Returns:
        One sentence or two an item.
    """
    return [
        _NO_PROOF,
        "The membership attacks are population attacks, the weakest kind. They judge the set as a whole; a "
        "stronger attack made for one sample may still find it.",
        f"The forget set has {forgotten:,} samples. {spread(widest)} Differences smaller than that say nothing.",
        compared(reference),
        _SAMPLING,
        "High accuracy on the forget set is no failure by itself: a model that never saw a sample may get it right.",
    ]


def optional_metric_limits(facts: OptionalMetricFacts, reference: bool) -> list[str]:
    """Return what the measurements that are off by default cannot show, in plain words.

    Args:
        facts: how they were made.
        reference: whether a retrained model was measured.

    Returns:
        One item a measurement.
    """
    natural = "Compare it with the retrained model's." if reference else "Without a retrained model none is natural."
    steps = max((point.step for points in facts.relearning.values() for point in points), default=0)
    told = {
        "lira": f"LiRA used {facts.shadow_models} shadow models and {facts.unseen:,} unseen samples. The shadow models "
        "were trained, not unlearned: an attacker who knows the method and unlearns them too is stronger. "
        "With few shadow models or samples the share found at 1 % false alarms is coarse.",
        "relearn": f"Relearning was watched for {steps:,} steps at one learning rate. A model that never saw a sample "
        f"learns too, from samples like it. {natural}",
        "probe": "A linear probe that fails does not show that the features hold nothing; a nonlinear one may succeed. "
        f"A forgotten class is told apart by features that other classes taught. {natural}",
        "decile": "The most familiar tenth is counted by the loss alone, which differs from sample to sample in any "
        "model. The largest drop is the worst of several and rests on the test samples of one class: a chance "
        "drop is likely among many classes.",
        "kl": "The divergence is from one retrained model. Two retrained models diverge from each other as well.",
        "tow": "ToW compares three accuracies. Two models that agree in them may err on other samples.",
        "seeds": f"{len(facts.seeds)} seeds repeat the unlearning of one original model. Their intervals leave out the "
        "seed of the original, the draw of the split, and a search for settings.",
    }
    return [told[name] for name in facts.asked if name in told]


def diffusion_limits(
    images: int, widest: tuple[str, float] | None, reference: bool, attacked: bool, relearned: int
) -> list[str]:
    """Return what generated images cannot show, in plain words.

    Args:
        images: generated by each model.
        widest: title and half width, as a ratio, of the widest 95 % interval.
        reference: whether a retrained model was measured.
        attacked: whether a prompt attack was measured.
        relearned: steps of fine-tuning on what was kept that were measured; 0 for none.

    Returns:
        One sentence or two an item.
    """
    attack = "One attack was measured; another may do better." if attacked else "None was measured here."
    again = f"Only {relearned:,} steps of it were measured" if relearned else "It was not measured"
    return [
        _NO_PROOF,
        "A judge decides what an image shows, and it makes mistakes: an image that it does not recognise may still "
        "show the forgotten class to a person, and one that it does recognise may not.",
        f"Only the classes and prompts above were asked, with {images:,} images. Other words, another language or "
        "other seeds may still bring back what was forgotten.",
        "Adversarial prompts, made to bring it back, succeed far more often than plain ones "
        f"(UnlearnDiffAtk, arXiv 2310.11868). {attack}",
        "Who holds the weights can teach them the class again, with a few images of it or by fine-tuning on others. "
        f"{again}, and never with images of what was forgotten.",
        "FID, KID and CLIP score tell the mean quality of many images, not that of one. They depend on the extractor "
        "and on the number of images: compare them only where both are the same.",
        "Whether a single training image can be told from unseen ones was not tested.",
        f"{spread(widest)} Differences smaller than that say nothing.",
        compared(reference),
        _SAMPLING,
    ]


def spread(widest: tuple[str, float] | None) -> str:
    """Say how wide the widest 95 % interval is: its title and half width, as a ratio."""
    if widest is None:
        return "No interval was measured."
    return f"The widest 95 % interval ({widest[0]}) is ± {widest[1] * 100:.2f} points."


def compared(reference: bool) -> str:
    """Say what a retrained reference, or its absence, means."""
    if reference:
        return "The retrained reference is one training run with one seed; another would differ a little."
    return "No retrained model was measured, so the distance to training without the data is not known."


_NO_PROOF = (
    "It attests that a procedure was applied and what was measured afterwards. It does not prove that nothing "
    "of the data is left: no test of the weights alone can (Thudi et al., arXiv 2110.11891)."
)
_SAMPLING = "The intervals are of sampling only. They leave out how much a second run with another seed would change."
