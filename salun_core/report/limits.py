"""What the numbers of a report cannot show, in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from salun_core.report import wording

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Evidence, OptionalMetricFacts

_NO_PROOF = (
    "The report shows which procedure was applied and what was measured afterwards. It does not prove that nothing of "
    "the data is left: no test of the weights alone can (Thudi et al., arXiv 2110.11891)."
)
_SAMPLING = "The intervals cover sampling only. They leave out how much a second run with another seed would differ."


def limits(evidence: Evidence) -> list[str]:
    """Return what the evidence cannot show, one or a few sentences per item."""
    reference = (
        "The retrained reference is one training run with one seed; another one would differ slightly."
        if evidence.measured.reference is not None
        else "No retrained model was measured, so the distance to training without the data is unknown."
    )
    specific = _of_images(evidence) if evidence.generation else _of_classifier(evidence)
    optional = (
        _of_optional_metrics(evidence.further, evidence.measured.reference is not None) if evidence.further else []
    )
    return [_NO_PROOF, *specific, reference, _SAMPLING, *optional]


def _precision(evidence: Evidence) -> str:
    """The widest 95 % interval of a ratio."""
    widths = [
        (metric.high - metric.low, wording.words(name, evidence.generation is not None).title)
        for name, metric in evidence.metrics.items()
        if wording.unit_of(name) is None and metric.low is not None and metric.high is not None
    ]
    width, title = max((item for item in widths if math.isfinite(item[0])), default=(0.0, ""))
    if not title:
        return "No interval was measured, so small differences mean nothing."
    return f"The widest 95 % interval ({title}) is ± {width * 50:.2f} points. Smaller differences mean nothing."


def _of_classifier(evidence: Evidence) -> list[str]:
    return [
        "The membership attacks are population attacks, the weakest kind. They evaluate the set as a whole; a stronger "
        "attack on one sample may still find it.",
        f"The forget set has {evidence.forgotten.count:,} samples. {_precision(evidence)}",
        "High accuracy on the forget set is not a failure by itself: a model that never saw a sample may classify it "
        "correctly.",
        *_of_samples(evidence),
    ]


def _of_samples(evidence: Evidence) -> list[str]:
    """What was measured on samples; nothing if all images were."""
    if evidence.sampling is None:
        return []
    names = {"retain": "retained", "test": "test"}
    counts = [f"{item.n:,} of {item.of:,} {names[split]} images" for split, item in evidence.sampling.splits.items()]
    return [
        f"The evaluation measured {' and '.join(counts)}, drawn with seed {evidence.sampling.seed}. The gate judged "
        "the end of each interval that is against the model. Harm to few images outside the sample is not seen."
    ]


def _of_images(evidence: Evidence) -> list[str]:
    made = evidence.generation
    assert made is not None
    attacked = "attack_success" in evidence.metrics
    attack = "One attack was measured; another may succeed more often." if attacked else "No attack was measured here."
    steps = max((point.step for point in made.resurgence), default=0)
    tuned = f"Only {steps:,} steps of fine-tuning were measured" if steps else "Fine-tuning was not measured"
    return [
        "An image classifier decides what an image shows, and it makes mistakes: an image that it does not recognise "
        "may still show the forgotten class to a person, and the reverse.",
        f"Only the classes and prompts above were tested, with {made.images:,} images. Other words, languages or seeds "
        "may still bring back what was forgotten.",
        "Adversarial prompts, written to bring back what was forgotten, succeed far more often than plain ones "
        f"(UnlearnDiffAtk, arXiv 2310.11868). {attack}",
        "Anyone who holds the weights can train them on the class again, with a few images of it or by fine-tuning on "
        f"others. {tuned}, and never with images of what was forgotten.",
        "FID, KID and CLIP score describe the average quality of many images, not a single one. They depend on the "
        "extractor and on the number of images: compare them only if both are the same.",
        "Whether a single training image can be told from unseen ones was not tested.",
        _precision(evidence),
    ]


def _of_optional_metrics(facts: OptionalMetricFacts, reference: bool) -> list[str]:
    expected = (
        "Compare it with the retrained model's value."
        if reference
        else "Without a retrained model no value is known to be normal."
    )
    steps = max((point.step for points in facts.relearning.values() for point in points), default=0)
    texts = {
        "lira": f"LiRA used {facts.shadow_models} shadow models and {facts.unseen:,} unseen samples. The shadow models "
        "were trained, not unlearned: an attacker who knows the method and also unlearns them is stronger. With few "
        "shadow models or samples, the share found at 1 % false alarms is coarse.",
        "relearn": f"Relearning was measured for {steps:,} steps at one learning rate. A model that never saw a sample "
        f"also learns from similar ones. {expected}",
        "probe": "A linear probe that fails does not show that the features contain nothing; a nonlinear one may "
        f"succeed. Features learned from other classes also separate a forgotten class. {expected}",
        "decile": "The most familiar tenth is defined by the margin alone, which differs between samples in any model. "
        "The largest drop is the worst of several and relies on the test samples of one class: among many classes a "
        "drop by chance is likely.",
        "kl": "The divergence is from one retrained model. Two retrained models also diverge from each other.",
        "tow": "ToW compares three accuracies. Two models with equal accuracies may fail on different samples.",
        "seeds": f"{len(facts.seeds)} seeds repeat the unlearning of one original model. Their intervals leave out the "
        "seed of the original, the draw of the split, and a search for the configuration.",
    }
    return [texts[name] for name in facts.asked if name in texts]
