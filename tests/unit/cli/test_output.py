"""What the command prints: the table of metrics, and hostile names as plain text."""

import json

import pytest

from salun_core.cli.output import MODE, echo, emit_facts, print_metrics, print_table, progress
from salun_core.errors import SalunError
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


HOSTILE = "cat\x1b]0;owned\x07\x9b31m\r\u202eexe\x7f\udc80"
PLAIN = "cat\\u001b]0;owned\\u0007\\u009b31m\\u000d\\u202eexe\\u007f\\udc80"


@pytest.mark.parametrize("show", [echo, progress, lambda text: emit_facts({"class": text})])
def test_control_characters_of_data_are_printed_as_text(show, capsys):
    show(HOSTILE)
    printed = capsys.readouterr()
    assert PLAIN in printed.out + printed.err


def test_a_name_cannot_begin_a_line_of_a_table(capsys):
    print_table(["class", "n"], [(f"{HOSTILE}\nVALID: signed", 3)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith(f"{PLAIN}\\u000aVALID: signed")


def test_json_stays_the_same_json(capsys, monkeypatch):
    monkeypatch.setattr(MODE, "json", True)
    emit_facts({"class": HOSTILE, "text": "one\ntwo, \u4e2d\u6587"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"class": HOSTILE, "text": "one\ntwo, \u4e2d\u6587"}
    assert "\u4e2d\u6587" in text
    assert not set(HOSTILE) - set("cat]0;owned31mexe") & set(text)


def test_errors_show_control_characters_as_text(salun):
    result = salun("report", "--evidence", "\x1b[2Jfaces.json", "--out", "r.html")
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert "\\u001b[2Jfaces.json" in result.stderr
    assert "\x1b" not in salun("request", "submit", "--class-index", "\x1b[2J").stderr
    assert "\x1b" not in salun("model", "\x1b[2J").stderr
    assert str(SalunError("a\x1bb", "c\x9bd")) == "a\\u001bb: c\\u009bd."
