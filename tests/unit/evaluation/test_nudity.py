"""The detector is run for real, on the portrait that matplotlib ships."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from salun_core.errors import DataError, UsageError
from salun_core.evaluation.nudity import (
    EXPOSED,
    HARMLESS,
    NUDITY,
    PARTS,
    PROMPTS,
    NudityDetector,
    count_parts,
)

nudenet = pytest.importorskip("nudenet", reason="the extra `diffusion` is not installed")

FACES = ("FACE_FEMALE", "FACE_MALE")
PORTRAIT = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def portrait():
    """uint8 [1, 3, 600, 512]."""
    pixels = np.array(Image.open(PORTRAIT).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def test_a_face_is_found_as_the_package_finds_it_in_the_file(portrait):
    found = nudenet.NudeDetector().detect(str(PORTRAIT))
    assert [item["class"] for item in found] == ["FACE_FEMALE"]
    score = found[0]["score"]
    blank = torch.full_like(portrait, 200)
    batch = torch.cat([portrait, blank, portrait])
    below = NudityDetector.load(FACES, threshold=score - 0.01)
    assert below.detect(batch) == [{"FACE_FEMALE": 1}, {}, {"FACE_FEMALE": 1}]
    above = NudityDetector.load(FACES, threshold=score + 0.01)
    assert above.detect(batch) == [{}, {}, {}]


def test_a_dressed_portrait_is_not_nude(portrait):
    detector = NudityDetector.load(threshold=0.25)
    assert detector.parts == NUDITY
    assert detector.detect(portrait) == [{}]


def test_small_and_grey_images_are_accepted(portrait):
    detector = NudityDetector.load(FACES)
    assert detector.detect(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)) == [{}, {}]
    assert len(detector.detect(portrait[:, :1])) == 1
    assert detector.detect(portrait[:0]) == []


def test_the_digest_covers_what_is_counted():
    plain = NudityDetector.load()
    assert len(plain.digest) == 64
    assert NudityDetector.load().digest == plain.digest
    assert NudityDetector.load(threshold=0.5).digest != plain.digest
    assert NudityDetector.load(EXPOSED).digest != plain.digest


def test_the_parts_are_those_of_the_package():
    labels = vars(nudenet.nudenet)["__labels"]
    assert sorted(PARTS) == sorted(labels)
    assert {part for part in labels if part.endswith("EXPOSED")} == set(EXPOSED)


@pytest.mark.parametrize(
    ("parts", "threshold", "message"),
    [(["FACE_MALES"], 0.6, "FACE_MALE"), ([], 0.6, "nothing"), (FACES, 0.1, "nothing"), (FACES, 1.1, "nothing")],
)
def test_invalid_parts_and_thresholds_are_refused(parts, threshold, message):
    with pytest.raises(UsageError, match=message):
        NudityDetector.load(parts, threshold)


def test_other_tensors_than_images_are_refused(portrait):
    detector = NudityDetector.load(FACES)
    for bad in (portrait[0], portrait.float()):
        with pytest.raises(DataError, match="not a batch of images"):
            detector.detect(bad)


def test_parts_are_added_up():
    before = [{"A": 2}, {}, {"A": 1, "B": 1}]
    after = [{}, {"C": 4}]
    found = {part: (count.before, count.after) for part, count in count_parts(before, after).items()}
    assert found == {"A": (3, 0), "B": (1, 0), "C": (0, 4)}


def test_the_prompts_are_decent_and_all_different():
    assert len(PROMPTS) == len(set(PROMPTS)) == 20
    assert len(HARMLESS) == len({*HARMLESS, *PROMPTS}) - 20 == 60
    assert not any(
        word in prompt for prompt in (*PROMPTS, *HARMLESS) for word in ("nude", "naked", "nsfw", "sex", "breast")
    )
