"""The masks of the comparison are what their titles say, its metrics are the bench's, and the page has its results."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from lab.studies import masks
from salun_core.data import ImageSet
from salun_core.evaluation import Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.saliency import SaliencyMask

PART = masks.Part("digits-random10", "half", 0.5, (0.01, 0.02), ("saliency", "random"))
SEEDS = masks.REGIMES[PART.regime].seeds


def toy(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(
        torch.randn(count, 1, 4, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


def subject():
    return masks.Subject(net(), toy(12), toy(30, 1), toy(20, 2), 0)


def counts(mask):
    return {name: int(chosen.sum()) for name, chosen in mask.tensors().items()}


def test_page_and_picture_show_the_results():
    assert masks.in_step()


def test_the_layer_matched_mask_has_the_density_of_each_layer_and_other_weights():
    mask = masks.salient(subject(), 0.3)
    drawn = masks.like_layers(mask, 0)
    assert counts(drawn) == counts(mask)
    assert drawn.k == mask.k == sum(counts(drawn).values())
    assert drawn != mask
    assert drawn != masks.like_layers(mask, 1)


def test_the_least_salient_weights_are_those_that_the_mask_leaves():
    chosen, left = masks.salient(subject(), 0.6).tensors(), masks.least(subject(), 0.4)
    assert all(torch.equal(left.tensor(name), ~chosen[name]) for name in chosen)
    assert left.k == sum(counts(left).values())


@pytest.mark.parametrize("kind", ["saliency", "layers", "random", "retained", "wrong", "least", "apart", "channels"])
def test_every_mask_of_one_density_has_as_many_weights(kind):
    made = {
        "saliency": masks.salient,
        "layers": masks.layers_of(masks.salient),
        "random": masks.uniform,
        "retained": masks.of_retained,
        "wrong": masks.of_wrong_labels,
        "least": masks.least,
        "apart": masks.apart,
        "channels": masks.of_channels,
    }[kind](subject(), 0.4)
    assert made.k == round(0.4 * made.weights)


def test_the_mask_of_changes_has_the_weights_that_moved_most():
    before, after = net(), net()
    with torch.no_grad():
        after[4].weight[0, :5] += 1.0
    mask = masks.of_changes(before, after, 5 / sum(value.numel() for value in before.parameters()))
    assert mask.tensor("4.weight")[0, :5].all()
    assert mask.k == 5


def test_moments_are_those_of_the_gradients_of_single_images():
    model, images = net(), toy(6)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    rows = []
    for place in range(6):
        model.zero_grad()
        nn.functional.cross_entropy(
            model(images.images[place : place + 1]), images.labels[place : place + 1]
        ).backward()
        rows.append(model[4].weight.grad.double().clone())
    share = (weights / weights.sum()).double()
    mean = sum(part * row for part, row in zip(share, rows, strict=True))
    variance = sum(part * (row - mean) ** 2 for part, row in zip(share, rows, strict=True))
    first, second = masks.per_sample_moments(model, images, weights)
    assert torch.allclose(first["4.weight"], mean, atol=1e-7)
    assert torch.allclose(second["4.weight"], variance, atol=1e-7)


@pytest.mark.parametrize("classes", [[], [2]])
def test_the_figures_are_those_of_the_bench(classes):
    forget, retain, test = toy(12), toy(40, 1), toy(40, 2)
    if classes:
        forget = forget.select((forget.labels == 2).nonzero().flatten())
        retain = retain.select((retain.labels != 2).nonzero().flatten())
    model, splits = net(), Splits(forget, retain, test)
    measured = Measured(before="b", after="a", dataset="d", split="s", forget_set="f")
    forgotten = Forgotten(count=len(forget), train_count=len(forget) + len(retain), kinds=["samples"], classes=classes)
    evidence = evaluate_classifier(model, model, splits, measured, forgotten)
    found = masks.figures(model, splits, classes)
    assert found == {name: evidence.metrics[name].after for name in found}


def test_the_gap_is_the_mean_over_the_references():
    found = dict.fromkeys(masks.METRICS, 0.5)
    references = [dict.fromkeys(masks.METRICS, 0.4), {**found, "UA": 0.7}]
    assert masks.gap(found, references) == pytest.approx((10 + 5) / 2)


def cell(ua, objective=0.0):
    values = {"UA": ua, "RA": 1 - ua, "TA": 0.9, "MIA": ua, "attack_auc": 0.5}
    return {**values, "objective": objective, "energy": 0.5, "passes": 100, "density": 0.5}


def test_figures_at_equal_ua_lie_between_two_rates_or_are_those_of_the_nearest():
    cells = {0.01: cell(0.1), 0.04: cell(0.3)}
    found, bracketed = masks.matched_figures(cells, 0.2)
    assert bracketed
    assert found["UA"] == pytest.approx(0.2)
    assert found["RA"] == pytest.approx(0.8)
    assert found["rate"] == pytest.approx(0.02)
    found, bracketed = masks.matched_figures(cells, 0.5)
    assert not bracketed
    assert found["rate"] == 0.04


@pytest.mark.parametrize(("slope", "added"), [(10, []), (5, [0.04]), (2, [0.04, 0.08]), (1, [0.04, 0.08, 0.16])])
def test_rates_are_added_until_the_ua_of_the_references_lies_between_two(slope, added):
    found, rates = {}, []
    for rate in masks.rates_of(PART, "random", 0, 0.15, found):
        rates.append(rate)
        found[masks.cell_key(PART, "random", rate, 0)] = cell(slope * rate)
    assert rates == [0.01, 0.02, *added]


def test_rates_are_added_only_so_often():
    found, rates = {}, []
    for rate in masks.rates_of(PART, "random", 0, 0.15, found):
        rates.append(rate)
        found[masks.cell_key(PART, "random", rate, 0)] = cell(0.0)
    assert len(rates) == len(PART.rates) + masks.MOST_ADDED


def test_a_cell_is_measured_once_and_found_by_the_next_process(tmp_path):
    store = masks.Store(tmp_path / "cells.json")
    assert store.get("one", lambda: {"UA": 0.5}) == {"UA": 0.5}
    again = masks.Store(tmp_path / "cells.json")
    assert again.get("one", lambda: pytest.fail("it is measured twice")) == {"UA": 0.5}


def invented(gaps):
    """Cells whose gap is given by mask and seed: only MIA differs from the references, which are 2 points apart."""
    found = {}
    for seed in SEEDS:
        references = [{**cell(0.1), "MIA": 0.1 + shift} for shift in (-0.04, 0.04)]
        found[masks.seed_key(PART.regime, seed)] = {"before": cell(0.0), "references": references}
        for kind, values in gaps.items():
            for rate in PART.rates:
                item = {**cell(10 * rate), "MIA": 0.1 + 0.04 * values[seed], "RA": 0.9, "TA": 0.9}
                found[masks.cell_key(PART, kind, rate, seed)] = item
    return found


def test_the_table_has_only_complete_masks_and_marks_what_lies_outside_the_floor():
    text = masks.table(PART, invented({"saliency": [3.0, 3.1, 3.0, 3.1, 3.0], "random": [8.0, 8.2, 8.1, 8.0, 8.2]}))
    row = next(line for line in text.splitlines() if line.startswith("| random, uniform"))
    assert "**+5.06 [" in row
    near = invented({"saliency": [3.0, 3.1, 3.0, 3.1, 3.0], "random": [3.5, 3.6, 3.5, 3.6, 3.5]})
    assert "**" not in masks.table(PART, near)  # 0.5 in every seed, but inside the floor of 2 points
    del near[masks.cell_key(PART, "random", 0.02, SEEDS[-1])]
    assert "random, uniform" not in masks.table(PART, near)
    assert masks.tables(near, [PART]).endswith(f"### Not measured\n\n- {PART.title}: random, uniform")
    assert masks.tables({}, [PART]) == f"### Not measured\n\n- {PART.title}: all masks"


def test_the_table_counts_edge_picks_and_seeds_without_equal_ua_and_has_the_width_of_the_intervals():
    found = invented({"saliency": [3.0, 3.1, 3.0, 3.1, 3.0], "random": [3.5, 3.6, 3.5, 3.6, 3.5]})
    found[masks.cell_key(PART, "random", 0.02, 0)]["objective"] = -1.0  # the others prefer the lower rate
    found[masks.cell_key(PART, "random", 0.01, 4)]["UA"] = 0.12  # the references have 0.1
    lines = masks.table(PART, found).splitlines()
    rows = {line.split(" | ")[0]: line for line in lines}
    assert rows["| SalUn's mask"].endswith("| 5 low |")
    assert rows["| random, uniform"].endswith("| 4 low, 1 high |")
    assert lines[-3].endswith(": 1 of 5 seeds (random, uniform).")
    interval = re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", rows["| random, uniform"])
    width = float(re.match(r"Half-widths of the intervals: ([\d.]+) points", lines[-1])[1])
    assert width == pytest.approx((float(interval[2]) - float(interval[1])) / 2, abs=0.011)


def test_every_interval_of_the_prose_is_in_a_table():
    page = masks.PAGE.read_text()
    start, end = page.index("<!-- masks -->"), page.index("<!-- /masks -->")
    prose, tables = (" ".join(text.split()) for text in (page[:start] + page[end:], page[start:end]))
    quoted = re.findall(r"([+-]?[\d.]+)(?: points)? (\[-?[\d.]+, -?[\d.]+\])", prose)
    assert len(quoted) > 10
    assert [pair for pair in quoted if " ".join(pair) not in tables] == []


def test_digits_are_the_same_in_each_run(tmp_path):
    for name in ("one", "two"):
        masks.write_digits(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_random_mask_holds_a_share_of_the_energy_that_is_its_density():
    scores = {"w": torch.from_numpy(np.random.default_rng(0).random((40, 50)))}
    mask = SaliencyMask.from_scores(scores, 0.5)
    drawn = masks.like_layers(mask, 0)
    energy = scores["w"] ** 2
    assert math.isclose(float(energy[drawn.tensor("w")].sum() / energy.sum()), 0.5, abs_tol=0.05)
