"""Evidence with every part in it, and a policy's decision on it."""

import pytest

from salun_core.evaluation.evidence import (
    ClassAccuracy,
    Curve,
    Distribution,
    EpochRecord,
    Evidence,
    Forgotten,
    Integrity,
    Measured,
    Metric,
    RunFacts,
    Series,
)
from salun_core.gate import Policy, Relative, Rule, decide
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
