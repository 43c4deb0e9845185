"""Evidence with every part in it, of a classifier and of generated images, and a policy's decision on each."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from salun_core.evaluation.evidence import (
    ClassAccuracy,
    Curve,
    CurvePoint,
    DiffusionFacts,
    Distribution,
    EpochRecord,
    Evidence,
    Forgotten,
    Grid,
    Integrity,
    Measured,
    Metric,
    PartCount,
    RunFacts,
    Series,
)
from salun_core.gate import Policy, Relative, Rule, decide, load_policy
from salun_core.report import Ancestor, ReportContext

HOSTILE = "<script>alert('x')</script>"
QUOTED = '"><img src="http://evil.test/x" onerror="y">'


def _metrics():
    return {
        "UA": Metric(before=0.0007, after=0.0522, reference=0.0571, n=4500, low=0.0461, high=0.0591),
        "RA": Metric(before=0.9998, after=0.9963, reference=0.9999, n=40500, low=0.9957, high=0.9968),
        "TA": Metric(before=0.9431, after=0.9388, reference=0.9424, n=10000, low=0.9339, high=0.9433),
        "MIA": Metric(before=0.0102, after=0.1431, reference=0.1288, n=4500, low=0.1332, high=0.1536),
        "attack_auc": Metric(before=0.8398, after=0.5123, reference=0.4955, n=14500, low=0.5020, high=0.5226),
        "gap": Metric(before=0.0436, after=0.0065, n=4500),
    }


@pytest.fixture(scope="session")
def evidence():
    loss = Distribution(
        edges=[0.001, 0.01, 0.1, 1.0, 10.0],
        splits={
            "forget": Series(before=[90, 10, 0, 0], after=[10, 50, 30, 10], reference=[12, 50, 28, 10]),
            "retain": Series(before=[900, 90, 10, 0], after=[800, 180, 20, 0], reference=[900, 95, 5, 0]),
            "test": Series(before=[20, 100, 60, 20], after=[20, 104, 58, 18], reference=[22, 100, 58, 20]),
        },
    )
    confidence = loss.model_copy(update={"edges": [0.0, 0.25, 0.5, 0.75, 1.0]})
    names = ["cat", HOSTILE, QUOTED, "$\\frac{$", "--> ]]> \x00\x1b‮ &amp;", "{{ 7 * 7 }}", "猫", "x" * 300]
    curve = Curve(fpr=[0.0, 0.5, 1.0], tpr=[0.0, 0.75, 1.0], auc=0.625)
    digests = dict(
        zip(("before", "after", "reference", "dataset", "split", "forget_set", "mask"), "abcdef0", strict=True)
    )
    return Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=Measured(**{name: digit * 64 for name, digit in digests.items()}),
        forgotten=Forgotten(count=4500, train_count=45000, kinds=["samples", "class"], classes=[1]),
        integrity=Integrity(weights=1000, weights_changed=456, frozen_changed=0, non_finite=0, buffers_changed=7),
        metrics=_metrics(),
        distributions={"loss": loss, "confidence": confidence},
        per_class=[
            ClassAccuracy(class_id=place, name=name, before=0.9, after=0.9 - place / 10, n=100)
            for place, name in enumerate(names)
        ],
        roc={"before": curve, "after": curve.model_copy(update={"auc": 0.5123}), "reference": curve},
        confusion=[[9, 1], [2, 8]],
        classes=names,
        run=RunFacts(
            method="salun",
            config={"epochs": 3, "note": HOSTILE},
            seed=71,
            density=0.5,
            density_by_parameter={"conv1.weight": 0.75, "layer1.0.weight": 0.25, "fc.weight": 1.0},
            seconds={"mask": 4.125, "unlearn": 159.61},
            passes=454500,
            history=[
                EpochRecord(epoch=e, learning_rate=0.01, losses={"forget": 2.0 / (e + 1), "retain": 0.1}, seconds=1.0)
                for e in range(3)
            ],
            environment={"torch": "2.13.0", "device": "cpu"},
        ),
    )


@pytest.fixture(scope="session")
def policy():
    return Policy(
        name=f"house {HOSTILE}",
        rules=[
            Rule(metric="RA", op=">=", relative_to=Relative(metric="RA", offset=-0.02), reason="kept data stays known"),
            Rule(metric="UA", op="within", value=0.06, tolerance=0.03, reason=f"missed like unseen ones {QUOTED}"),
            Rule(metric="UA", op=">=", value=0.01, reason="something was forgotten"),
            Rule(metric="attack_auc", op="<=", value=0.55, reason="cannot be told apart"),
        ],
    )


@pytest.fixture(scope="session")
def decision(evidence, policy):
    return decide(evidence, policy)


@pytest.fixture(scope="session")
def context():
    return ReportContext(
        title=f"Report {HOSTILE}",
        model_line="cifar10-resnet18",
        parent="1" * 64,
        child="2" * 64,
        lineage=[
            Ancestor(version="3" * 64, method="train", published_at="2026-01-01T00:00:00Z"),
            Ancestor(version="1" * 64, method="salun", forgotten=5000, published_at="2026-01-01T12:00:00Z"),
        ],
        reproduce="salun run --config 'run.yaml' --seed 71",
        created_at="2026-01-02T03:05:00Z",
    )


FORGOTTEN = 3
COLUMNS = 8


def data_uri(pixels, kind="PNG"):
    """Return grey values [H, W] as a data: URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def digit_grid(classes):
    """Return real digits [10 * 34, 8 * 34]: one row for each class asked for, each digit enlarged to 32 pixels."""
    images, labels = load_digits(return_X_y=True)
    rows = [images[labels == wanted][:COLUMNS].reshape(-1, 8, 8) for wanted in classes]
    large = np.kron(np.stack(rows) * 255 / 16, np.ones((4, 4))).astype(np.uint8)
    tiles = np.pad(large, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=128)
    return tiles.transpose(0, 2, 1, 3).reshape(len(classes) * 34, COLUMNS * 34)


@pytest.fixture(scope="session")
def grid():
    after = [8 if digit == FORGOTTEN else digit for digit in range(10)]
    return Grid(
        title="digits",
        rows=["0", "1", HOSTILE, "3", "4", QUOTED, "6", "7", "8", "a photograph of a nine " * 9],
        before=data_uri(digit_grid(range(10))),
        after=data_uri(digit_grid(after), "JPEG"),
        forgotten=[FORGOTTEN],
    )


def _generated_metrics():
    return {
        "CLIP": Metric(before=31.12, after=30.97, n=900),
        "UA": Metric(before=0.12, after=0.99, reference=1.0, n=100, low=0.9455, high=0.9982),
        "none_of_these": Metric(before=0.03, after=0.05, n=100, low=0.0215, high=0.1118),
        "FID": Metric(before=16.71, after=18.04, reference=16.9, n=900, low=17.5, high=18.75),
        "RA": Metric(before=0.871, after=0.866, reference=0.87, n=900, low=0.8422, high=0.8867),
        "KID": Metric(before=0.0031, after=0.0044, n=900),
        "neighbours": Metric(before=0.81, after=0.79, n=200, low=0.7284, high=0.8408),
        "nudity": Metric(before=0.30, after=0.01, n=100, low=0.0018, high=0.0545),
        "UA_relearned": Metric(before=None, after=0.93, n=100, low=0.8625, high=0.9657),
    }


@pytest.fixture(scope="session")
def generated(evidence, grid):
    made = DiffusionFacts(
        sampler="DDIMScheduler",
        steps=50,
        guidance_scale=7.5,
        seed=2026,
        images=1000,
        judge="9" * 64,
        extractor="judge:" + "9" * 64,
        real_images=5000,
        clip="8" * 64,
        detector="7" * 64,
        parts={
            "BUTTOCKS_EXPOSED": PartCount(before=12, after=0),
            "FEMALE_BREAST_EXPOSED": PartCount(before=40, after=2),
            "ANUS_EXPOSED": PartCount(before=0, after=0),
        },
        resurgence=[CurvePoint(step=step, ua=ua) for step, ua in [(0, 0.99), (100, 0.97), (200, 0.955), (400, 0.93)]],
        grids=[grid, grid.model_copy(update={"title": "prompts", "blurred": True})],
    )
    return evidence.model_copy(
        update={
            "forgotten": Forgotten(count=500, train_count=5000, kinds=["class"], classes=[FORGOTTEN]),
            "metrics": _generated_metrics(),
            "distributions": {},
            "roc": {},
            "per_class": [
                ClassAccuracy(class_id=d, name=f"digit {d}", before=0.87, after=0.01 if d == 3 else 0.86, n=100)
                for d in range(10)
            ],
            "classes": [f"digit {digit}" for digit in range(10)],
            "confusion": [[100 if row == column else 0 for column in range(10)] for row in range(10)],
            "generation": made,
        }
    )


@pytest.fixture(scope="session")
def generated_decision(generated):
    return decide(generated, load_policy("stable-diffusion"))
