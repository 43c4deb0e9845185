"""Describes the effect of each difference in docs/research/deviations.md, between its markers."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.studies.deviations.effects import best, differences

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "research" / "deviations.md"
RESULTS = ROOT / "lab" / "results"
RESULT = RESULTS / "deviations.json"
Found = Mapping[str, Any]
NAMES = {"salun": "SalUn", "random_label": "RL", "original": "original"}


def percent(values: Sequence[float], digits: int = 0) -> str:
    """Return the mean of ratios in percent."""
    return f"{100 * statistics.mean(values):.{digits}f} %"


def summary(found: Found, what: str, sides: tuple[str, str] = ("here", "there")) -> str:
    """Summarise the comparison of one method, each side at its best rate."""
    values = differences(found["cells"], what)
    gap, count = values["gap"], len(values["gap"].values)
    clear = ", ".join(f"{metric} {value}" for metric, value in values.items() if value.seen and value is not gap)
    unclear = ", ".join(f"{metric} {value}" for metric, value in values.items() if value.unclear)
    if gap.seen:
        text = [f"gap {gap.ours:.1f} {sides[0]}, {gap.theirs:.1f} {sides[1]} ({gap})", clear]
    elif gap.unclear:
        text = [clear]
    else:
        seen = f"on the gap ({gap}" if clear or unclear else f"(gap {gap}"
        text = [clear, f"no effect seen {seen} points, {count} seeds)"]
    text.append(unclear and f"unclear: {unclear}")
    return f"{NAMES.get(what, what)}: {'; '.join(part for part in text if part)}"


def rates(found: Found, what: str) -> str:
    """Return the best rates of both sides, and whether they are the highest that were tried."""
    shown = []
    for side, where in (("ours", "here"), ("theirs", "there")):
        tried = [float(name.split()[-1]) for name in found["cells"] if name.startswith(f"{side} {what}")]
        rate = float(best(found["cells"], f"{side} {what}")[0].split()[-1])
        shown.append(f"{rate:g} {where}{' (the highest)' * (rate == max(tried))}")
    return f"best of {len(tried)} rates: {', '.join(shown)}"


def split(found: Found) -> str:
    """Of base models from another split."""
    unseen = percent(found["facts"]["never seen"], 1)
    return f"{unseen} of D_f were never seen. {summary(found, 'original')}. {summary(found, 'salun')}"


def wrong_labels(found: Found) -> str:
    """Of labels that may be true."""
    true = percent(found["facts"]["true"], 1)
    return f"{true} of the labels were true. {summary(found, 'random_label')}. {summary(found, 'salun')}"


def order(found: Found) -> str:
    """Of mixed batches."""
    return f"{summary(found, 'salun', ('sequential', 'mixed'))}; {rates(found, 'salun')}"


def batch_norm(found: Found) -> str:
    """Of running statistics that move."""
    return f"{summary(found, 'salun', ('frozen', 'updated'))}; {rates(found, 'salun')}"


def reduction(found: Found) -> str:
    """Of sums of batch means."""
    shares = {
        size: " and ".join(
            percent(found["facts"][f"batch {size}, density {density}: bits that differ"], 1) for density in (0.1, 0.5)
        )
        for size in (64, 256)
    }
    return (
        f"at densities 0.1 and 0.5 {shares[64]} of the bits differ where the last batch has 2 of 64 images, "
        f"{shares[256]} where it has 194 of 256. {summary(found, 'salun')} (2 of 64)"
    )


def augmented(found: Found) -> str:
    """Of augmented images."""
    facts = {
        key: " and ".join(f"{statistics.mean(found['facts'][f'{key}, density {d}: Jaccard']):.2f}" for d in (0.1, 0.5))
        for key in ("two draws", "not augmented")
    }
    return (
        f"masks of two draws overlap by {facts['two draws']} (Jaccard, densities 0.1 and 0.5), with the mask of plain "
        f"images by {facts['not augmented']}. {summary(found, 'salun')}"
    )


def masked_step(found: Found) -> str:
    """Of gradients alone that are masked."""
    facts = found["facts"]
    changed, moved = percent(facts["frozen that changed"]), percent(facts["relative change"], 1)
    text = f"gradient alone masked: {changed} of the frozen weights change, by {moved} of their norm"
    return f"{text}; {summary(found, 'salun')}"


def restored(found: Found) -> str:
    """Of restoring after each step, measured by another script."""
    rows = json.loads((RESULTS / "masked-step.json").read_text())["rows"].values()
    bits = "the same bits as here" if all(row["equal to mask and restore"] for row in rows) else "other bits than here"
    times = [
        f"{min(row[name] for row in rows):.1f} to {max(row[name] for row in rows):.1f}"
        for name in ("mask and restore / plain", "masked / plain")
    ]
    return (
        f"restored: {bits}; a step of ResNet-18 takes {times[0]} times a plain one, here {times[1]} "
        "(`python -m lab.studies.masked_step`)"
    )


def mask(found: Found) -> str:
    """Of mask files, measured by another script."""
    rows = json.loads((RESULTS / "mask.json").read_text())["rows"]
    usual, ours = rows["usual, ten densities"], rows["ours, ten densities"]
    return (
        f"ResNet-18, ten densities: {usual['cpu_s']:.1f} s of CPU there, {ours['cpu_s']:.2f} s here; a file has "
        f"{usual['file_bytes'] / 1e6:.1f} and {ours['file_bytes'] / 1e6:.2f} MB (`python -m lab.studies.mask`)"
    )


def attack(found: Found) -> str:
    """Of the faulty entropy."""
    facts = found["facts"]
    models = ("original", "retrained", "unlearned")
    values = [", ".join(percent(facts[f"{model}: {rule}"], 1) for model in models) for rule in ("defined", "faulty")]
    return (
        "share of D_f called never seen in the original, retrained and SalUn model, by the reference's classifier: "
        f"{values[1]} with the faulty formula, {values[0]} with the definition"
    )


def soft(found: Found) -> str:
    """Of a share that falls once an epoch."""
    moved = percent(found["facts"]["moved"], 1)
    return f"order mixed: {summary(found, 'salun_soft')}; {moved} of the weights end moved"


def influence(found: Found) -> str:
    """Of one running vector."""
    facts = {name: statistics.mean(values) for name, values in found["facts"].items()}
    sides = []
    for side in ("running vector", "one sweep"):
        cosine, error = facts[f"{side}, cosine of the correction"], facts[f"{side}, error of the correction"]
        sides.append(f"{cosine:.2f} (error {100 * error:.0f} %)")
    return (
        f"cosine of the correction k - v to the exact one, 200 images: {sides[0]} there, {sides[1]} here; "
        f"the exact one has {100 * facts['correction']:.1f} % of v's norm. {summary(found, 'influence')}, "
        "default strength"
    )


def expanding(found: Found) -> str:
    """Of the kept logit."""
    rate = best(found["cells"], "ours boundary_expanding")[0].split()[-1]
    forget, test = (percent(found["facts"][f"{rate}: {name}"]) for name in ("forget", "test"))
    text = f"{summary(found, 'boundary_expanding')}; {rates(found, 'boundary_expanding')}"
    return f"{text}. At {rate} the kept logit takes {forget} of D_f and {test} of the test images"


def shrink(found: Found) -> str:
    """Of true labels as targets."""
    facts = {name: percent(values, 1) for name, values in found["facts"].items()}
    true, rounded = facts["true is nearest"], facts["changed by rounding"]
    return (
        f"{true} of D_f are trained towards the truth; rounding changes {rounded} of the labels. "
        f"{summary(found, 'boundary_shrink')}; {rates(found, 'boundary_shrink')}"
    )


def sfr(found: Found) -> str:
    """Of SFR-on's mask."""
    differ, ua = percent(found["facts"]["bits that differ"], 1), differences(found["cells"], "sfr_on")["UA"]
    return (
        f"of the mask, {differ} of the bits differ. {summary(found, 'sfr_on')}, at a rate of 0.01 where neither "
        f"forgets much (UA {ua.ours:.1f} % here, {ua.theirs:.1f} % there). "
        "Steps and clipping: not measured (another loop)"
    )


EFFECTS: dict[str, Callable[[Found], str]] = {
    "split": split,
    "wrong-labels": wrong_labels,
    "order": order,
    "batch-norm": batch_norm,
    "reduction": reduction,
    "augmented": augmented,
    "masked-step": masked_step,
    "attack": attack,
    "salun_soft": soft,
    "influence": influence,
    "boundary_expanding": expanding,
    "boundary_shrink": shrink,
    "sfr_on": sfr,
}
QUOTED: dict[str, Callable[[Found], str]] = {"restored": restored, "mask": mask}


def filled(text: str, document: Found, quoted: bool = True) -> str:
    """Return the page with each effect between its markers; SystemExit if the page has no place for one.

    `quoted` also fills in what other scripts measured.
    """
    for name, effect in (EFFECTS | (QUOTED if quoted else {})).items():
        pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)")
        if not pattern.search(text):
            raise SystemExit(f"{PAGE.name} has no marker {name}")
        said_of = effect(document["deviations"].get(name, {}))
        text = pattern.sub(lambda found, said_of=said_of: f"{found[1]}{said_of}{found[2]}", text)  # type: ignore[misc]
    return text
