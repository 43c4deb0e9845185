"""The values that the template shows; it only formats them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from salun_core.evaluation.metrics import MetricRow, rows_of
from salun_core.report import wording
from salun_core.report.plots import label

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import DiffusionFacts, Evidence, Metric, PartCount, RecognitionFacts, Share
    from salun_core.gate import GateDecision, Verdict

_BECAME = 6  # most frequent classes that the page names


class Banner(NamedTuple):
    """The decision and its reasons; the state is its CSS class."""

    state: str
    title: str
    why: str
    reasons: list[str]


def banner(decision: GateDecision | None, evidence: Evidence) -> Banner:
    """Return the banner: passed, refused, or no decision; a decision on other evidence counts as a refusal."""
    if decision is None:
        return Banner("open", "NO DECISION", "These are measurements only: no gate decision was given.", [])
    if decision.evidence_digest != evidence.digest:
        why = "The decision was made on other evidence than the numbers below. Treat the model as refused."
        return Banner("refused", "REFUSED", why, [])
    checks, failed = len(decision.verdicts), [verdict for verdict in decision.verdicts if not verdict.passed]
    if decision.passed:
        why = f"All {checks} checks of policy “{decision.policy}” hold."
        assurance = decision.assurance()
        reasons = [f"Assurance level {assurance.figures}. {assurance.text}"]
        reasons += [f"Requests for {kind}: {found.figures}." for kind, found in decision.kinds.items()]
        return Banner("passed", "PASSED", why, reasons)
    why = f"{len(failed)} of {checks} checks of policy “{decision.policy}” failed. Do not publish the model."
    reasons = [refusal.text for refusal in decision.refusals]
    reasons += [f"Next: {decision.next}"] if decision.next else []
    return Banner("refused", "REFUSED", why, reasons or [decision.summary])


class TableRow(NamedTuple):
    """One metric with all rules on it."""

    name: str
    words: MetricRow
    metric: Metric | None
    verdicts: list[Verdict]


def rows(evidence: Evidence, decision: GateDecision | None) -> list[TableRow]:
    """Return one row per metric, and one for each metric that a rule needs and the evidence lacks."""
    verdicts = decision.verdicts if decision else []
    generated = evidence.generation is not None
    known = [name for name in rows_of(generated) if name in evidence.metrics]
    names = dict.fromkeys([*known, *evidence.metrics, *(verdict.metric for verdict in verdicts if verdict.metric)])
    return [
        TableRow(
            name, wording.words(name, generated), evidence.metrics.get(name), [v for v in verdicts if v.metric == name]
        )
        for name in names
    ]


def tiles(evidence: Evidence) -> list[tuple[str, str, Metric]]:
    """Return title, name and metric of each headline figure that was measured."""
    rows = rows_of(evidence.generation is not None).values()
    return [
        (row.tile, row.name, evidence.metrics[row.name]) for row in rows if row.tile and row.name in evidence.metrics
    ]


def forgotten(evidence: Evidence) -> str:
    """Return how much was forgotten: samples of all training samples, or images generated of a concept."""
    facts = evidence.forgotten
    if facts.kinds == ["concept"]:
        return f"{facts.count:,} generated images of a concept"
    more = " and generated images" if "concept" in facts.kinds else ""
    return f"{facts.count:,} of {facts.train_count:,} training samples{more}"


def changed_weights(evidence: Evidence) -> str:
    """Return the result of comparing the weights bit by bit, in one sentence."""
    facts = evidence.integrity
    share = facts.weights_changed / facts.weights if facts.weights else 0.0
    frozen = "weights outside the mask were not compared"
    if facts.frozen_changed is not None:
        frozen = f"{facts.frozen_changed:,} outside the mask changed"
    return (
        f"{facts.weights_changed:,} of {facts.weights:,} weights changed ({share:.2%}); {frozen}; "
        f"{facts.buffers_changed:,} buffer values changed; {facts.non_finite:,} are not finite."
    )


def parts(counts: Mapping[str, PartCount]) -> list[tuple[str, int, int, str]]:
    """Return name, detections before and after, and change of each body part, most frequent first, and their sum."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1].before, item[0]))
    found = [(label(name.replace("_", " ").lower(), 60), item.before, item.after) for name, item in ordered]
    if len(found) > 1:
        found.append(("all parts", sum(item[1] for item in found), sum(item[2] for item in found)))
    return [
        (name, before, after, f"{(after - before) / before:+.1%}" if before else wording.MISSING)
        for name, before, after in found
    ]


def generation(made: DiffusionFacts) -> dict[str, str]:
    """Return how the images were generated and evaluated, by heading; a dash for what was not used."""
    compared = f"{made.real_images:,} real images"
    if made.original_images is not None:
        compared = f"{made.original_images:,} images of the original from other seeds"
    extractor = f"{made.extractor}, against {compared}" if made.extractor else None
    return {
        "Images": f"{made.images:,} by each model",
        "Sampler": f"{made.sampler}, {made.steps:,} steps per image",
        "Guidance scale": f"{made.guidance_scale:g}" + (" (none)" if made.guidance_scale == 1 else ""),
        "Seeds": f"from {made.seed}, one per image, the same for every model",
        "Image classifier": made.judge or wording.MISSING,
        **(_recognition(made.recognition) if made.recognition else {}),
        "Extractor of FID and KID": extractor or wording.MISSING,
        "CLIP model": made.clip or wording.MISSING,
        "Nudity detector": made.detector or wording.MISSING,
    }


def _recognition(facts: RecognitionFacts) -> dict[str, str]:
    """Return what the image classifier's results rest on, by heading."""
    shares = {
        "Accuracy on real held-out images": facts.real,
        "Accuracy on the original's images": facts.original,
        "Accuracy on the original's images of what was forgotten": facts.original_forgotten,
        "Real images taken for none of the classes": facts.real_rejected,
    }
    became = ", ".join(f"{label(item.name, 60)} {item.before:,} → {item.after:,}" for item in facts.became[:_BECAME])
    by_seed = ", ".join(f"{item.before:.1%} → {item.after:.1%} (n {item.n:,})" for item in facts.seeds)
    return {
        **{name: _share(share) for name, share in shares.items()},
        "Images of what was forgotten, by what they show": became or wording.MISSING,
        "UA by batch of seeds": by_seed or wording.MISSING,
    }


def _share(share: Share | None) -> str:
    if share is None:
        return "not measured"
    return f"{share.value:.1%} of {share.n:,} ({share.low:.1%} to {share.high:.1%})"
