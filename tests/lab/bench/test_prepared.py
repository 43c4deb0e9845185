"""What the cells of a seed share: the draw, the models, their evaluation; and a diffusion model from end to end."""

from __future__ import annotations

import json

import pytest

from lab.bench.plan import SuiteRun
from lab.bench.prepared import drawn, identity
from lab.bench.results import collect
from lab.bench.runner import run_suite
from lab.bench.suite import load_suite
from salun_core.data.split import read_split
from salun_core.errors import UsageError
from salun_core.tasks import read_card

pytestmark = pytest.mark.slow

CONFIG = {"steps": 2, "epochs": 1, "batch_size": 8}
CONCEPT = {
    "format": "salun.suite/v1",
    "name": "tiny",
    "title": "Tiny",
    "kind": "text-to-image",
    "methods": [
        {"name": "SalUn", "method": "salun", "mask": "saliency", "density": 0.5, "config": CONFIG},
        {"name": "random", "method": "salun", "mask": "random", "density": 0.5, "config": CONFIG},
        {"name": "RL", "method": "random_label", "config": CONFIG},
    ],
    "sizes": {
        "cpu": {
            "data": {"source": "digits", "size": 16, "channels": 3, "train_limit": 100, "test_limit": 50},
            "model": {
                "per_seed": False,
                "prompt": "a picture of a {label}",
                "training": {
                    "steps": 2,
                    "epochs": 1,
                    "channels": [8, 16],
                    "autoencoder_steps": 2,
                    "autoencoder_channels": [8, 8],
                },
            },
            "judge": {"training": {"epochs": 1}},
            "forget": {
                "kind": "concept",
                "prompts": ["a picture of a 3"],
                "anchor_prompt": "a picture of a 5",
                "images": 4,
            },
            "seeds": [7],
            "threads": 1,
            "evaluation": {"suite": "concept", "images_per_class": 2, "steps": 2, "real_images": 20},
        }
    },
}


def suite_at(folder, data, only=("SalUn",)):
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(data))
    return SuiteRun(load_suite(path), "cpu", folder, only=only)


def test_a_draw_has_the_requested_size_and_follows_its_seed(resumed):
    split = read_split(resumed[0] / "base")
    draws = [drawn(split, 0.1, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == len(set(draws[0])) == round(0.1 * len(split.train))
    assert set(draws[0]) < set(split.train)
    assert len(drawn(split, 1e-6, 0)) == 1


def test_the_reference_is_trained_without_the_forget_file(resumed):
    out = resumed[0]
    assert json.loads((out / "forget-0.json").read_text()) == {"kind": "class", "class_id": "3"}
    before, after = (read_split(out / name) for name in ("base", "reference-0"))
    assert set(after.train) < set(before.train)
    assert read_card(out / "reference-0").method == "retrain"


def test_a_diffusion_model_forgets_a_concept_and_a_second_bench_reuses_its_folder(tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra `diffusion`")
    plan, out = suite_at(tmp_path / "suite", CONCEPT), tmp_path / "out"
    assert run_suite(plan, out, lambda text: None).measured == ["salun-7"]
    card = read_card(out / "base")
    assert card.evaluation.judge == str(out / "judge")
    assert card.evaluation.images_per_class == 2
    assert card.prompt == "a picture of a {label}"
    results = collect(plan, out)
    assert results.missing == ["random-7", "rl-7"]
    assert results.images == 20
    assert set(results.rows[1].figures[0].values) >= {"UA", "RA", "FID", "KID"}
    evidence = json.loads((out / "cells/salun-7/evidence.json").read_text())
    assert evidence["run"]["seed"] == 7
    assert evidence["integrity"]["frozen_changed"] == 0

    size = CONCEPT["sizes"]["cpu"]
    other = size | {"model": {"folder": "../out/base"}, "judge": {"folder": "../out/judge"}}
    other |= {"evaluation": size["evaluation"] | {"images_per_class": 1}}
    plan = suite_at(tmp_path / "suite", CONCEPT | {"sizes": {"cpu": other}}, only=("random",))
    again = tmp_path / "again"
    assert run_suite(plan, again, lambda text: None).measured == ["random-7"]
    assert identity(again / "base") == identity(out / "base")
    assert read_card(again / "base").evaluation.images_per_class == 1
    assert read_card(out / "base").evaluation.images_per_class == 2


def test_a_missing_model_folder_is_reported(tmp_path):
    size = CONCEPT["sizes"]["cpu"] | {"model": {"folder": "models/none"}, "judge": None}
    plan = suite_at(tmp_path, CONCEPT | {"sizes": {"cpu": size}})
    with pytest.raises(UsageError, match="there is no model folder"):
        run_suite(plan, tmp_path / "out", lambda text: None)
