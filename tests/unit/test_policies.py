"""The policies of diffusion models: good evidence passes, and each rule alone refuses."""

import math
import subprocess
import sys

import pytest

from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import (
    DiffusionFacts,
    Forgotten,
    Integrity,
    Measured,
    RecognitionFacts,
    RunFacts,
    Share,
)
from salun_core.evaluation.statistics import wilson_interval
from salun_core.gate import decide, load_policy

NAMES = ("ddpm", "stable-diffusion", "nsfw")
KIND = {"ddpm": "class", "stable-diffusion": "class", "nsfw": "concept"}


def share(before, found, n):
    """Return a ratio with the interval that the evaluation gives it."""
    low, high = wilson_interval(found / n, n)
    return Metric(before=before, after=found / n, n=n, low=low, high=high)


GOOD = {
    "UA": share(0.12, 100, 100),
    "none_of_these": share(0.04, 10, 100),
    "restored": share(0.88, 2, 100),
    "RA": share(0.87, 780, 900),
    "FID": Metric(before=16.0, after=18.0, n=900),
    "CLIP": Metric(before=31.1, after=29.0, n=900),
    "nudity": share(0.6, 2, 142),
}


def evidence(kind, judged=None, **metrics):
    found = {name: metric for name, metric in {**GOOD, **metrics}.items() if metric is not None}
    return Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=Measured(before="a", after="b", dataset="c", split="d", forget_set="e", mask="f"),
        forgotten=Forgotten(count=500, train_count=5000, kinds=[kind], classes=[1] if kind == "class" else []),
        integrity=Integrity(weights=200, weights_changed=50, frozen_changed=0, non_finite=0, buffers_changed=0),
        metrics=found,
        generation=DiffusionFacts(
            sampler="DDIMScheduler",
            steps=50,
            guidance_scale=2.0,
            seed=1,
            images=1000,
            recognition=RecognitionFacts(**judged) if judged else None,
        ),
    )


def refused(name, **metrics):
    """Return the rules that fail, by position in the policy."""
    policy = load_policy(name)
    decision = decide(evidence(KIND[name], **metrics), policy)
    builtin = len(decision.verdicts) - len(policy.rules)
    assert all(verdict.passed for verdict in decision.verdicts[:builtin])
    return [place for place, verdict in enumerate(decision.verdicts[builtin:]) if not verdict.passed]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddpm", "class"), ("stable-diffusion", "class"), ("stable-diffusion", "concept"), ("nsfw", "concept")],
)
def test_good_evidence_passes(name, kind):
    policy = load_policy(name)
    decision = decide(evidence(kind), policy)
    assert decision.passed, decision.summary
    assert policy.name == name
    assert decision.policy == name


FORGETTING = [
    (0, {"UA": Metric(before=0.12, after=0.94, n=5000, low=0.93, high=0.95)}),
    (2, {"UA": share(0.51, 100, 100)}),
    (3, {"none_of_these": share(0.04, 70, 100)}),
]
QUALITY = [
    (5, {"FID": Metric(before=16.0, after=24.01, n=900)}),
    (5, {"FID": Metric(before=16.0, after=16.0, n=99)}),
    (5, {"FID": Metric(before=None, after=16.0, n=900)}),
]
WRONG = {
    "ddpm": [
        *FORGETTING,
        (4, {"restored": share(0.88, 45, 100)}),
        (5, {"RA": share(0.87, 737, 900)}),
        (5, {"RA": share(0.87, 90, 99)}),
        *((place + 1, metrics) for place, metrics in QUALITY),
    ],
    "stable-diffusion": [
        *FORGETTING,
        (4, {"RA": share(0.87, 755, 900)}),
        (4, {"RA": share(0.87, 90, 99)}),
        *QUALITY,
    ],
    "nsfw": [
        (0, {"nudity": share(0.6, 60, 1000)}),
        (2, {"nudity": share(0.09, 0, 142)}),
        (3, {"CLIP": Metric(before=31.1, after=28.0, n=900)}),
        (3, {"CLIP": Metric(before=31.1, after=31.0, n=99)}),
        (4, {"FID": Metric(before=16.0, after=32.1, n=900)}),
        (4, {"FID": Metric(before=16.0, after=16.0, n=99)}),
    ],
}


@pytest.mark.parametrize(("name", "place", "metrics"), [(name, *case) for name in NAMES for case in WRONG[name]])
def test_each_rule_alone_refuses(name, place, metrics):
    assert refused(name, **metrics) == [place]


def test_every_rule_has_a_case():
    """A rule that may stay undecided refuses only with the rule on the value; it decides the level."""
    for name in NAMES:
        rules = load_policy(name).rules
        undecided = {place for place, rule in enumerate(rules) if rule.undecided == "procedure"}
        assert {place for place, _ in WRONG[name]} == set(range(len(rules))) - undecided
        assert len(undecided) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_that_is_missing_is_refused(name):
    rules = load_policy(name).rules
    for metric in {rule.metric for rule in rules}:
        wanted = [place for place, rule in enumerate(rules) if rule.metric == metric]
        assert refused(name, **{metric: None}) == wanted
        assert refused(name, **{metric: Metric(before=None, after=None, n=0)}) == wanted


@pytest.mark.parametrize(
    ("found", "n", "level"),
    [
        (100, 100, "measured"),
        (95, 100, "measured"),
        (94, 100, None),
        (48, 50, "measured"),
        (47, 50, None),
        (22, 22, "measured"),
        (21, 21, "procedure"),
        (5, 5, "procedure"),
    ],
)
@pytest.mark.parametrize("name", ["ddpm", "stable-diffusion"])
def test_a_few_unrecognised_images_show_only_that_the_procedure_was_applied(name, found, n, level):
    decision = decide(evidence(KIND[name], UA=share(0.12, found, n)), load_policy(name))
    assert decision.level == level
    assert decision.n == min(n, 100)


@pytest.mark.parametrize(
    ("found", "n", "level"),
    [
        (0, 100, "measured"),
        (4, 100, "measured"),
        (5, 100, "procedure"),
        (50, 1000, "measured"),
        (51, 1000, None),
        (0, 5, "procedure"),
    ],
)
def test_a_few_harmless_images_show_only_that_the_procedure_was_applied(found, n, level):
    decision = decide(evidence("concept", nudity=share(0.6, found, n)), load_policy("nsfw"))
    assert (decision.level, decision.n) == (level, n)


def test_images_that_cannot_hold_the_share_are_refused_however_few():
    found = Metric(before=0.12, after=1.0, n=5, low=0.0, high=0.8)
    assert refused("ddpm", UA=found) == [1]


@pytest.mark.parametrize(("name", "kind"), [*KIND.items(), ("stable-diffusion", "concept")])
def test_a_policy_publishes_the_levels_of_what_it_judges(name, kind):
    policy = load_policy(name)
    assert policy.levels[kind] == ["retrained", "measured", "procedure"]
    assert {*policy.levels} == {target for rule in policy.rules for target in rule.targets}
    assert policy.digest != policy.model_copy(update={"levels": {}}).digest


@pytest.mark.parametrize("name", ["ddpm", "stable-diffusion"])
def test_a_retrained_model_is_exact_whatever_it_shows_for_a_name_that_it_never_saw(name):
    """It draws noise for it, which the image classifier may even take for the class."""
    noise = {"UA": share(0.12, 44, 100), "none_of_these": share(0.04, 100, 100)}
    assert not decide(evidence("class", **noise), load_policy(name)).passed
    claimed = evidence("class", **noise).model_copy(update={"run": RunFacts(method="retrain")})
    near, far = (
        claimed.model_copy(update={"integrity": claimed.integrity.model_copy(update={"distance": distance})})
        for distance in (0.05, 1.3)
    )
    assert not decide(near, load_policy(name)).passed
    assert decide(far, load_policy(name)).level == "retrained"
    damaged = far.model_copy(update={"metrics": {**far.metrics, "RA": share(0.87, 700, 900)}})
    assert not decide(damaged, load_policy(name)).passed


def test_power_is_the_chance_that_so_many_images_show_it_if_none_shows_what_was_forgotten():
    judged = {"real": Share(value=0.98, n=500, low=0.96, high=0.99)}
    judged["real_rejected"] = Share(value=0.05, n=500, low=0.03, high=0.07)
    powers = [
        decide(evidence("class", judged, UA=share(0.12, n, n)), load_policy("ddpm")).power for n in (21, 22, 50, 200)
    ]
    assert powers[0] == 0  # no result of 21 images can show it
    assert powers[1] == pytest.approx(0.98**22)
    # 48 of 50 and more show it: at most two errors
    assert powers[2] == pytest.approx(sum(math.comb(50, k) * 0.02**k * 0.98 ** (50 - k) for k in range(3)))
    assert powers[1] < powers[2] < powers[3]
    assert decide(evidence("concept", nudity=share(0.6, 0, 35)), load_policy("nsfw")).power == 1
    assert decide(evidence("concept", nudity=share(0.6, 0, 34)), load_policy("nsfw")).power == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddpm", "samples"), ("ddpm", "concept"), ("stable-diffusion", "samples"), ("nsfw", "samples"), ("nsfw", "class")],
)
def test_another_kind_of_target_is_refused(name, kind):
    decision = decide(evidence(kind), load_policy(name))
    assert not decision.passed
    assert [v.reason for v in decision.verdicts if v.rule == "a rule applies"] == [
        "the policy does not cover the forget set's kind"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_covers_forgetting_and_quality_with_reasons(name):
    rules = load_policy(name).rules
    assert {rule.metric for rule in rules} & {"UA", "nudity"}
    assert "FID" in {rule.metric for rule in rules}
    assert len({rule.reason for rule in rules}) == len(rules)


@pytest.mark.parametrize("module", ["gate", "pods.summary"])
def test_evidence_is_judged_and_summarised_without_torch(module):
    program = f"import sys, salun_core.{module}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
