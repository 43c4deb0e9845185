"""Progress of long work: bars on a terminal, nothing in a pipe, and what the work itself reports."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

from salun_core.cli import output
from salun_core.cli.output import bars, progress
from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.diffusion.sampling import images
from salun_core.evaluation.outputs import outputs_of
from salun_core.methods.classification import unlearn
from salun_core.tasks.classification import _chunks
from salun_core.telemetry.progress import report, shown_by, tracked
from tests.support.tiny_diffusion import class_table, class_unet
from tests.unit.diffusion.test_sampling import ddim


class _Stream(io.StringIO):
    terminal = True

    def isatty(self):
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    """Returns a function that replaces standard error; pytest would undo it between the fixture and the test."""
    monkeypatch.setattr(output, "_SHORT_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)

    def replaced(terminal=True):
        stream = _Stream()
        stream.terminal = terminal
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replaced


def test_a_terminal_shows_a_bar_with_a_count_and_an_estimate(stderr):
    stream = stderr()
    with bars():
        for number in tracked(range(3), "images", 3):
            if number == 1:
                output._BARS._progress.refresh()
                progress("a line in between")
    shown = stream.getvalue()
    assert "images" in shown
    assert "1/3" in shown
    assert "-:--:--" in shown or "0:00:" in shown
    assert "a line in between" in shown
    assert shown.rstrip().endswith("\x1b[2K\x1b[?25h")  # the bar was removed
    assert output._BARS._progress is None


def test_short_work_shows_no_bar(stderr, monkeypatch):
    monkeypatch.setattr(output, "_SHORT_SECONDS", 60)
    stream = stderr()
    with bars():
        list(tracked(range(3), "images", 3))
    assert stream.getvalue() == ""


@pytest.mark.parametrize("other", ["pipe", "second process"])
def test_a_pipe_and_another_process_show_nothing(stderr, monkeypatch, other):
    stream = stderr(terminal=other != "pipe")
    if other != "pipe":
        monkeypatch.setenv("RANK", "1")
    with bars():
        list(tracked(range(3), "images", 3))
    assert stream.getvalue() == ""


def _fail():
    report("training", 1, 3)
    assert output._BARS._tasks
    return 1 / 0


def test_a_fault_removes_the_bar(stderr):
    stream = stderr()
    with pytest.raises(ZeroDivisionError), bars():
        _fail()
    assert "training" in stream.getvalue()
    assert output._BARS._progress is None
    assert output._BARS._tasks == {}


@pytest.fixture
def seen():
    found = []
    with shown_by(lambda work, done, total, note: found.append((work, done, total))):
        yield found


def test_work_that_is_given_up_has_ended(seen):
    parts = tracked(range(3), "images", 3)
    next(parts)
    parts.close()
    assert seen == [("images", 0, 3), ("images", 3, 3)]


def _set(count):
    pixels = torch.randint(0, 255, (count, 1, 4, 4), dtype=torch.uint8)
    ids = [str(number) for number in range(count)]
    return ImageSet(pixels, torch.zeros(count, dtype=torch.int64), Normalisation.of(pixels), "none", ids)


def test_training_reports_its_steps(seen):
    data = (torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,)))
    config = {"epochs": 2, "batch_size": 4, "device": "cpu", "augment": False}
    unlearn(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "finetune", forget=data, retain=data, config=config)
    steps = [item for item in seen if item[0] == "training"]
    assert [done for _, done, total in steps if total == 4] == [1, 2, 3, 4]
    assert steps[-1] == ("training", 1, 1)


def test_evaluation_and_scoring_report_their_batches(seen):
    outputs_of(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), _set(10), batch_size=4)
    assert [done for work, done, total in seen if (work, total) == ("evaluating", 3)] == [0, 1, 2, 3, 3]
    seen.clear()
    assert sum(len(batch) for batch, _ in _chunks(_set(10))) == 10
    assert seen[-1][0] == "scoring"
    assert seen[-1][1] == seen[-1][2] >= 1


def test_drawing_reports_its_images(seen):
    pytest.importorskip("diffusers")
    list(images(class_unet(), class_table(), ddim(batch_size=2), [0, 1, 0], [1, 2, 3]))
    assert seen == [("images", done, 3) for done in (0, 2, 3)]


def test_training_is_quiet_in_a_pipe_and_debug_prints_a_line_per_epoch(salun, tmp_path):
    (tmp_path / "data.yaml").write_text("source: digits\ntrain_limit: 40\ntest_limit: 20\n")
    words = ("train", "--data", "data.yaml", "--arch", "resnet8", "--epochs", "2", "--json")
    result = salun(*words, "--out", "a")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["model"] == "a"
    lines = [line for line in salun(*words, "--out", "b", "--debug").stderr.splitlines() if "epoch" in line]
    assert [line.partition(",")[0] for line in lines if line.startswith("train")] == [
        f"train resnet8: epoch {number} of 2" for number in (1, 2)
    ]
    assert "\r" not in result.stderr
