"""The table of metrics that the command prints."""

import pytest

from salun_core.cli.output import print_metrics
from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import DiffusionFacts, Forgotten, Integrity, Measured


@pytest.fixture
def table(capsys):
    def printed(metrics, generation=None):
        print_metrics(
            Evidence(
                created_at="2026-01-02T03:04:05Z",
                measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e"),
                forgotten=Forgotten(count=5, train_count=50, kinds=["class"]),
                integrity=Integrity(weights=200, weights_changed=50, non_finite=0, buffers_changed=0),
                metrics=metrics,
                generation=generation,
            )
        )
        lines = capsys.readouterr().out.splitlines()
        return [lines[0].split(), *[line.split() for line in lines[2:]]]

    return printed


def test_a_classifier_has_ratios_only(table):
    metrics = {"TA": Metric(before=0.5, after=None, n=0), "UA": Metric(before=0.0, after=0.25, n=5)}
    assert table(metrics) == [
        ["metric", "before", "after", "n"],
        ["UA", "0.0000", "0.2500", "5"],
        ["TA", "0.5000", "-", "0"],
    ]


def test_generated_images_have_their_units(table):
    made = DiffusionFacts(sampler="DDIMScheduler", steps=50, guidance_scale=2.0, seed=1, images=20)
    metrics = {
        "CLIP": Metric(before=31.25, after=30.5, n=20),
        "FID": Metric(before=16.0, after=18.5, reference=17.0, n=20),
        "UA": Metric(before=0.0, after=0.25, n=5),
    }
    assert table(metrics, made) == [
        ["metric", "unit", "before", "after", "retrained", "n"],
        ["UA", "ratio", "0.0000", "0.2500", "-", "5"],
        ["FID", *["distance,", "lower", "is", "better"], "16.0000", "18.5000", "17.0000", "20"],
        ["CLIP", *["score", "from", "0", "to", "100"], "31.2500", "30.5000", "-", "20"],
    ]
