"""The tests of an audit: outputs of the models in, findings with interval, threshold and verdict out.

Each test compares a 95 % interval with what is required. It passes if the whole interval is within, fails if no part
of it is, and is undecided otherwise. The thresholds come from `lab/studies/audit.py`, which measures how often
retrained models pass and forgeries fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from salun_core.audit.predictions import Audited, BySet
from salun_core.config import Document
from salun_core.evaluation.likelihood_ratio import LOW_FPR, caught_at, logit_scaled, offline_scores, online_scores
from salun_core.evaluation.membership import match_classes
from salun_core.evaluation.outputs import Outputs
from salun_core.evaluation.statistics import Z95, auc_interval, effective_size, rank_area, wilson_interval

if TYPE_CHECKING:
    from salun_core.audit.folders import Networks

MARGIN = 0.1
"""Largest distance of an attack's area from 1/2 that counts as guessing, as in the default policy."""
LEAST_CHANGE = 0.03
"""Of the outputs on D_f, scale aside: forgeries reach 0.001, and 0.03 with a last layer that was trained afresh."""
RECOGNISED, OWN_LOGIT, RESTORED = 0.15, 0.8, 0.8
LOST = 0.1
"""Largest loss of accuracy on held-out samples of retained classes."""
HALF_WAY = 0.5
CAUGHT = 0.08
"""Largest share that the attack on each sample may find at a false positive rate of 1 %."""
FEWEST_SAMPLES = 5  # below, no interval is trusted to show anything
FEWEST_ORACLES = 3  # each is compared with the others, and a deviation needs two of them
_CLIP = 100.0  # of the logit-scaled confidence, as Georgiev et al. do
_RESAMPLES, _TREES, _LEAF = 999, 60, 5
_MOST = 4000  # samples on each side that the forest is fitted on

Name = Literal[
    "attack",
    "outputs",
    "change",
    "recognised",
    "own_logit",
    "accuracy",
    "relative",
    "klom",
    "lira",
    "lira_tpr",
    "restored",
    "relearn",
]
Verdict = Literal["pass", "fail", "undecided"]
Number = Annotated[float, Field(allow_inf_nan=False)]

WORDS: Mapping[Name, tuple[str, str]] = {
    "attack": (
        "area of telling forgotten from held-out samples of the same classes by the margin",
        "the forgotten samples must look like held-out ones, neither more familiar nor less",
    ),
    "outputs": (
        "area of telling them by any function of all outputs, learned by a random forest",
        "no pattern in the outputs, such as marks on a part of them, may tell forgotten samples",
    ),
    "change": (
        "change of the outputs for other classes on the forgotten samples, scale aside",
        "the outputs must have changed by more than an edit of one class, noise or a temperature does",
    ),
    "recognised": (
        "share of the samples of forgotten classes that is recognised",
        "a forgotten class must not be recognised",
    ),
    "own_logit": (
        "area of telling the forgotten class by its own output, whatever is added to that",
        "the output of the class must not tell it, or an edit of one bias would bring it back",
    ),
    "accuracy": (
        "loss of accuracy on held-out samples of the other classes",
        "the model must still be of use: a destroyed one also looks as if it had forgotten",
    ),
    "relative": (
        "place of the margins between the model before (0) and the references (1)",
        "the model must be nearer to the references than to the model before",
    ),
    "klom": (
        "KLoM as a multiple of what the references have among each other",
        "each margin must be one that a retrained model may have",
    ),
    "lira": (
        "area of the likelihood-ratio attack, which tests each sample by shadow models",
        "an attack on each sample must not tell forgotten from held-out ones",
    ),
    "lira_tpr": (
        "share of the forgotten samples that this attack finds at a false positive rate of 1 %",
        "an attack on each sample must not find single forgotten ones either",
    ),
    "restored": (
        "share of the forgotten classes that the last layer of the model before recognises in the features",
        "the class must be gone from the features, not only from the last layer",
    ),
    "relearn": (
        "area of telling the other half from held-out samples, after a few steps of training on one half",
        "forgotten samples must not come back when similar ones are learned",
    ),
}
"""What each test measures, and why."""


class Finding(Document):
    """The result of one test."""

    test: Name = Field(description="name of the test")
    value: Number | None = Field(description="what was measured; null: it could not be")
    low: Number | None = Field(description="lower end of its 95 % interval")
    high: Number | None = Field(description="upper end of it")
    n: int = Field(ge=0, description="samples behind it; for `klom` and `lira` those of the forget set")
    at_least: Number | None = Field(default=None, description="required of the whole interval")
    at_most: Number | None = Field(default=None, description="required of the whole interval")
    power: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="of an equivalence test: probability to pass for a model that never saw the samples"
    )
    verdict: Verdict = Field(description="`undecided`: so many samples cannot tell")
    note: str = Field(default="", max_length=300, description="what else has to be known")

    @property
    def holds_value(self) -> bool:
        """Whether the value is within its interval, or none was measured."""
        if self.value is None or self.low is None or self.high is None:
            return self.value is self.low is self.high
        return self.low <= self.value <= self.high

    @property
    def required(self) -> str:
        """The threshold in words."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:.3g} to {self.at_most:.3g}"
        return f">= {self.at_least:.3g}" if self.at_least is not None else f"<= {self.at_most:.3g}"

    @property
    def figures(self) -> str:
        """Value, interval, what is required, and the number of samples."""
        found = "not measured" if self.value is None else f"{self.value:.3f}"
        if self.low is not None and self.high is not None:
            found += f", 95 % interval {self.low:.3f} to {self.high:.3f}"
        return f"{found}, required {self.required}, n {self.n}"


def verdict_of(low: float | None, high: float | None, n: int, at_least: float | None, at_most: float | None) -> Verdict:
    """Return the verdict of a 95 % interval; too few samples pass nothing."""
    if low is None or high is None:
        return "undecided"
    if (at_least is not None and high < at_least) or (at_most is not None and low > at_most):
        return "fail"
    within = (at_least is None or low >= at_least) and (at_most is None or high <= at_most)
    return "pass" if within and n >= FEWEST_SAMPLES else "undecided"


def _finding(
    test: Name,
    value: float | None,
    ends: tuple[float, float] | None,
    n: int,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = "",
    power: float | None = None,
) -> Finding:
    known = ends is not None and value is not None and np.isfinite([value, *ends]).all()
    low, high = (None, None)
    if known and ends is not None and value is not None:
        low, high = min(ends[0], value), max(ends[1], value)  # rounding: 1 - cos^2 of equal outputs may be -1e-16
    return Finding(
        test=test,
        value=value if known else None,
        low=low,
        high=high,
        n=n,
        at_least=at_least,
        at_most=at_most,
        power=power,
        verdict=verdict_of(low, high, n, at_least, at_most),
        note=note if known else note or "it cannot be computed from these outputs",
    )


def examine(audited: Audited, seed: int = 0) -> list[Finding]:
    """Run all tests that the inputs allow; `seed` is that of resampling, forest and halves.

    Single samples and classes that were forgotten as a whole have different tests; a forget set with both has both.
    """
    whole = np.isin(audited.after["forget"].labels, audited.emptied)
    findings = [_change(audited)]
    if not whole.all():
        findings += _of_samples(audited, ~whole, seed)
    if whole.any():
        findings += _of_classes(audited, whole)
    findings.append(_accuracy(audited))
    if audited.references:
        findings.append(_relative(audited, seed))
    if len(audited.references) >= FEWEST_ORACLES:
        findings.append(_klom(audited))
    if audited.shadows is not None:
        findings += _lira(audited, ~whole if not whole.all() else whole)
    if audited.networks is None and whole.any():
        findings.append(unseen_features(int(whole.sum())))
    if audited.networks is not None:
        findings += list(_restoration(audited, audited.networks, whole, seed))
    return findings


def _area(
    test: Name, area: float, n: int, others: float, both: bool = False, note: str = "", centre: float = 0.5
) -> Finding:
    """Return the finding of an attack's area; `both`: it must not be far below the centre, either."""
    ends = auc_interval(area, n, others)
    power = None
    if both:
        deviation = (ends[1] - ends[0]) / (2 * Z95)
        power = max(0.0, math.erf((MARGIN / deviation - Z95) / math.sqrt(2))) if deviation > 0 else None
    least = centre - MARGIN if both else None
    return _finding(test, area, ends, n, at_least=least, at_most=centre + MARGIN, note=note, power=power)


# single samples: do they look like samples that no model saw?


def _of_samples(audited: Audited, single: np.ndarray, seed: int) -> list[Finding]:
    forget, unseen = audited.after["forget"].where(single), audited.after["unseen"]
    chosen, weights = match_classes(forget.labels, unseen.labels)
    forget, size = forget.where(chosen), effective_size(weights)
    lacking = int((~chosen).sum())
    note = f"{lacking} samples are left out: no sample of their class is held out" if lacking else ""
    if not np.isin(forget.labels, unseen.labels).all():
        note = "no sample of these classes is held out, so classes are not matched"
    area = rank_area(forget.margins, unseen.margins, weights)
    centre = _centre([(i["forget"].where(single).where(chosen), i["unseen"]) for i in audited.references], weights)
    return [
        _area("attack", area, len(forget), size, both=True, note=note, centre=centre),
        _area("outputs", _forest_area(forget, unseen, weights, seed), len(forget), size, note=note),
    ]


def _centre(references: Sequence[tuple[Outputs, Outputs]], weights: np.ndarray) -> float:
    """Return the area that a model has which never saw D_f: 1/2, or the references' if the draw is hard or easy.

    References that are further away than the margin saw D_f, or are not alike: they move the centre no further.
    """
    if not references:
        return 0.5
    areas = [rank_area(forget.margins, unseen.margins, weights) for forget, unseen in references]
    return float(np.clip(np.mean(areas), 0.5 - MARGIN, 0.5 + MARGIN))


def _features(outputs: Outputs) -> np.ndarray:
    """Return outputs in a form that tells marks: the true class first, then the others by class and by size."""
    scores = _scores(outputs)
    rows, size = np.arange(len(scores)), scores.shape[1]
    rolled = scores[rows[:, None], (outputs.labels[:, None] + np.arange(size)) % size]
    ordered = -np.sort(-rolled[:, 1:], axis=1)
    return np.concatenate([rolled, ordered, outputs.margins[:, None]], axis=1)


def _scores(outputs: Outputs) -> np.ndarray:
    """Return logits less their mean, float64 [N, K]; of probabilities the logarithms, which are the same."""
    scores = np.log(outputs.probabilities + 1e-30) if outputs.logits is None else outputs.logits
    return np.asarray(scores - scores.mean(axis=1, keepdims=True))


def _forest_area(forget: Outputs, unseen: Outputs, weights: np.ndarray, seed: int) -> float:
    """Return the area of telling samples by a random forest; each is scored by trees that did not see it.

    Source:
        Lopez-Paz & Oquab, "Revisiting Classifier Two-Sample Tests", ICLR 2017; Breiman, "Random Forests", Machine
        Learning 2001, for the samples out of the bag.
    """
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(seed)
    forget = forget.where(np.sort(rng.permutation(len(forget))[:_MOST]))
    rows = np.sort(rng.permutation(len(unseen))[:_MOST])
    unseen, weights = unseen.where(rows), weights[rows]
    if weights.sum() == 0:
        return 0.5
    truth = np.concatenate([np.ones(len(forget)), np.zeros(len(unseen))])
    forest = RandomForestClassifier(_TREES, min_samples_leaf=_LEAF, bootstrap=True, oob_score=True, random_state=seed)
    found = np.concatenate([_features(forget), _features(unseen)]).clip(-1e30, 1e30)
    # Without weights: a bootstrap by weights leaves hardly a sample of a small set out. The area has the weights.
    forest.fit(found.astype(np.float32), truth)
    scores = forest.oob_decision_function_[:, 1]
    return rank_area(scores[: len(forget)], scores[len(forget) :], weights)


def _change(audited: Audited) -> Finding:
    """1 - cos^2 of the outputs before and after: 0 if one is the other times a number."""
    sides = [_others(item["forget"]) for item in (audited.before, audited.after)]
    products = [(sides[0] * sides[1]).sum(axis=1), (sides[0] ** 2).sum(axis=1), (sides[1] ** 2).sum(axis=1)]
    both, first, second = (float(values.sum()) for values in products)
    n = len(products[0])
    if first == 0 or second == 0:
        return _finding(
            "change", None, None, n, at_least=LEAST_CHANGE, note="a model has equal outputs for all classes"
        )
    cosine = both / math.sqrt(first * second)
    value = max(0.0, 1 - cosine**2)
    # The delta method: what each sample adds to the cosine. It needs no resampling, and a value of 0 has no spread.
    added = n * (products[0] / math.sqrt(first * second) - cosine / 2 * (products[1] / first + products[2] / second))
    half = 2 * abs(cosine) * _half(added)
    return _finding("change", value, (max(0.0, value - half), min(1.0, value + half)), n, at_least=LEAST_CHANGE)


def _others(outputs: Outputs) -> np.ndarray:
    """Return the scores of all classes but the true one, less their mean; of two classes the margin."""
    size = outputs.probabilities.shape[1]
    if size < 3:
        return outputs.margins[:, None]
    others = np.ones((len(outputs), size), dtype=bool)
    others[np.arange(len(outputs)), outputs.labels] = False
    scores = _scores(outputs)[others].reshape(len(outputs), size - 1)
    return np.asarray(scores - scores.mean(axis=1, keepdims=True))


def _half(values: np.ndarray) -> float:
    """Return half of the width of the 95 % interval of a mean; 0 for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return 0.0
    return float(t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))


# whole classes: is the class still recognised, or could it be at once?


def _of_classes(audited: Audited, whole: np.ndarray) -> list[Finding]:
    forget, unseen = audited.after["forget"].where(whole), audited.after["unseen"]
    kept = ~np.isin(unseen.labels, audited.emptied)
    n = len(forget)
    share = float(forget.correct.mean())
    findings = [_finding("recognised", share, wilson_interval(share, n), n, at_most=RECOGNISED)]
    if kept.any():
        areas = [
            (rank_area(_own(forget.where(forget.labels == label), label), _own(unseen.where(kept), label)), label)
            for label in np.unique(forget.labels)
        ]
        area, label = max(areas)
        count = int((forget.labels == label).sum())
        findings.append(
            _finding("own_logit", area, auc_interval(area, count, int(kept.sum())), count, at_most=OWN_LOGIT)
        )
    return findings


def _own(outputs: Outputs, label: int) -> np.ndarray:
    """Return the score of a class less the mean of the others: a constant added to it moves all samples alike."""
    scores = _scores(outputs)
    return np.asarray(scores[:, label] - np.delete(scores, label, axis=1).mean(axis=1))


def _accuracy(audited: Audited) -> Finding:
    """The loss of accuracy of the same samples, with the interval of the paired difference."""
    kept = ~np.isin(audited.after["unseen"].labels, audited.emptied)
    sides = [item["unseen"].where(kept).correct.astype(float) for item in (audited.before, audited.after)]
    if not kept.any():
        return _finding("accuracy", None, None, 0, at_most=LOST, note="no sample of another class is held out")
    lost = sides[0] - sides[1]
    value, half = float(lost.mean()), _half(lost)
    return _finding("accuracy", value, (max(-1.0, value - half), min(1.0, value + half)), len(lost), at_most=LOST)


# references: is the model like one that never saw the data?


def _scaled(item: BySet) -> np.ndarray:
    """Return the margins of D_f in units of the typical held-out margin, so that a temperature changes nothing."""
    typical = float(np.abs(item["unseen"].margins).mean())
    return item["forget"].margins / (typical or 1.0)


def _relative(audited: Audited, seed: int) -> Finding:
    """Where the model is on the way from the model before to the mean of the references.

    The squared distance to the model before is larger than that to the references if this is above 1/2.

    Source:
        Bounliphone et al., "A Test of Relative Similarity For Model Selection in Generative Models", ICLR 2016: the
        three-sample question. Here samples are paired, so that a bootstrap over them gives the interval; Efron,
        "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 1979.
    """
    before, after = _scaled(audited.before), _scaled(audited.after)
    way = np.mean([_scaled(item) for item in audited.references], axis=0) - before
    along, length = (after - before) * way, way**2
    n = len(way)
    if not length.sum() > 0:
        note = "the references do not differ from the model before on these samples"
        return _finding("relative", None, None, n, at_least=HALF_WAY, note=note)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(n, size=n)
        if (total := float(length[rows].sum())) > 0:
            drawn.append(float(along[rows].sum()) / total)
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    value = float(along.sum() / length.sum())
    return _finding("relative", value, (min(low, value), max(high, value)), n, at_least=HALF_WAY)


def klom(model: np.ndarray, oracles: np.ndarray) -> float:
    """Return the KL divergence of a model's margins from the oracles', as a mean over samples, in nats.

    model: float64 [N]; oracles: float64 [R, N], R at least 2.

    Georgiev et al. compare histograms of many unlearned models with those of many oracles. One model has no histogram:
    both are taken as normal with the spread of the oracles, of which few share one spread over all samples.

        KL(N(m_i, s) || N(mu_i, s)) = (m_i - mu_i)^2 / (2 s^2)

    Source:
        Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025 (arXiv
        2410.23232), section 2.3.
    """
    spread = float(oracles.var(axis=0, ddof=1).mean())
    return float(((model - oracles.mean(axis=0)) ** 2).mean() / (2 * spread + 1e-12))


def _klom(audited: Audited) -> Finding:
    """KLoM of the model, in units of what each oracle has against the others.

    The interval is Student's for one more oracle, on a logarithmic scale. With few oracles it is at most that of an F
    distribution with 1 degree of freedom above: no correlation of the samples makes a wider one. The threshold is half
    of the way, on that scale, to the model before. So the model before is the positive control: if the oracles cannot
    tell it, nothing is decided.
    """
    from scipy.stats import f, t

    sides = [logit_scaled(item["forget"]).clip(-_CLIP, _CLIP) for item in (audited.before, audited.after)]
    oracles = np.stack([logit_scaled(item["forget"]).clip(-_CLIP, _CLIP) for item in audited.references])
    count, n = oracles.shape
    own = np.log([klom(oracles[row], np.delete(oracles, row, axis=0)) + 1e-12 for row in range(count)])
    before, after = (math.log(klom(side, oracles) + 1e-12) - float(own.mean()) for side in sides)
    spread = float(own.std(ddof=1)) * math.sqrt(1 + 1 / count)
    half = min(float(t.ppf(0.975, count - 1)) * spread, math.log(float(f.ppf(0.975, 1, count - 1))))
    note, ends = f"of {count} oracles; the model before has {math.exp(before):.3g}", (after - half, after + half)
    if before <= half:
        note += ", which they cannot tell from their own"
        ends = (-math.inf, math.inf)
    if not np.isfinite(ends).all():
        return _finding("klom", None, None, n, at_most=math.exp(before / 2), note=note)
    interval = (math.exp(ends[0]), math.exp(ends[1]))
    return _finding("klom", math.exp(after), interval, n, at_most=math.exp(before / 2), note=note)


# shadow models: an attack on each sample


def _lira(audited: Audited, asked: np.ndarray) -> list[Finding]:
    """The online attack if each sample has two models on each side, and the offline one otherwise."""
    shadows = audited.shadows
    assert shadows is not None
    forget, unseen = audited.after["forget"], audited.after["unseen"]
    attacked = np.concatenate([logit_scaled(forget), logit_scaled(unseen)])
    online = bool((shadows.inside.sum(axis=0) >= 2).all())
    scores = (online_scores if online else offline_scores)(attacked, shadows)
    members, others = scores[: len(forget)][asked], scores[len(forget) :]
    chosen, weights = match_classes(forget.labels[asked], unseen.labels)
    others, weights = others[weights > 0], weights[weights > 0]
    members = members[chosen]
    note = f"{'online' if online else 'offline'}, {len(shadows.inside)} shadow models"
    share = caught_at(members, others)
    found = wilson_interval(share, len(members))
    few = LOW_FPR * len(others) < 1
    return [
        _area("lira", rank_area(members, others, weights), len(members), effective_size(weights), both=True, note=note),
        _finding(
            "lira_tpr",
            None if few else share,
            None if few else found,
            len(members),
            at_most=CAUGHT,
            note=f"{note}; fewer than 100 held-out samples" if few else note,
        ),
    ]


# the models themselves: can it be brought back?


def unseen_features(n: int) -> Finding:
    """Return that a class cannot be shown to be forgotten by predictions.

    A last layer that was trained afresh without the class, or a filter, gives the outputs of a retrained model.
    """
    return _finding(
        "restored", None, None, n, at_most=RESTORED, note="predictions do not show the features: give models"
    )


def _restoration(audited: Audited, networks: Networks, whole: np.ndarray, seed: int) -> Iterator[Finding]:
    if whole.any():
        metric = networks.restored(np.flatnonzero(whole))
        ends = None if metric.low is None or metric.high is None else (metric.low, metric.high)
        yield _finding("restored", metric.after, ends, metric.n, at_most=RESTORED)
    if not whole.all() and (~whole).sum() >= 2:
        other, unseen = networks.relearned(np.flatnonzero(~whole), seed)
        chosen, weights = match_classes(other.labels, unseen.labels)
        area = rank_area(other.margins[chosen], unseen.margins, weights)
        yield _area("relearn", area, int(chosen.sum()), effective_size(weights))


def level_of(findings: Sequence[Finding]) -> Literal["measured", "procedure", "refused"]:
    """Return the level: refused if a test fails, measured if all pass, and otherwise procedure."""
    verdicts = {finding.verdict for finding in findings}
    if "fail" in verdicts or not findings:
        return "refused"
    return "procedure" if "undecided" in verdicts else "measured"
