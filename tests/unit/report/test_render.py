"""The page: its numbers, its safety and its size, read back with a parser."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from salun_core.errors import SalunError
from salun_core.evaluation.evidence import Curve, Evidence, Metric
from salun_core.gate import decide
from salun_core.report import ReportContext, render_report, write_report
from salun_core.report.render import MAX_BYTES
from tests.support import pictures

VOID = {"meta", "br", "path", "use", "rect", "img", "link", "input", "hr"}
FORBIDDEN = {
    "script",
    "img",
    "image",
    "link",
    "iframe",
    "object",
    "embed",
    "form",
    "base",
    "audio",
    "video",
    "foreignobject",
}


class Page(HTMLParser):
    """Collects tags, attributes, the text of each element kind and the rows of tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.rows = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag in ("pre", "strong", "title", "li", "text"):
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in ("pre", "strong", "title", "li", "text"):
            if tag in self.open:
                self.texts[tag][-1] += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def percent(value):
    return f"{value * 100:.2f}\N{NO-BREAK SPACE}%"


def metric_rows(page):
    """Rows of the table of metrics by title; further rules of a metric follow as rows of their own."""
    start = next(place for place, row in enumerate(page.rows) if row[:2] == ["Metric", "Before"])
    return [row for row in page.rows[start + 1 :] if row[0] != "Check"]


@pytest.fixture(autouse=True, scope="module")
def _pictures():
    """Draw the pictures of two pages only: those of `text` are looked at, and those of the largest page count."""
    with pictures.left_out():
        yield


@pytest.fixture(scope="session")
def text(evidence, decision, context):
    with pictures.drawn():
        return render_report(evidence, decision, context)


@pytest.fixture(scope="session")
def page(text):
    return Page(text)


def test_every_metric_shows_before_after_interval_reference_and_n(page, evidence):
    rows = metric_rows(page)
    for name, title in [
        ("UA", "Unlearning accuracy"),
        ("RA", "Retain"),
        ("TA", "Test"),
        ("MIA", "Membership"),
        ("gap", "Average gap"),
    ]:
        metric, row = evidence.metrics[name], next(row for row in rows if row[0].startswith(title))
        assert row[1] == percent(metric.before)
        assert row[2].startswith(percent(metric.after))
        assert f"n {metric.n:,}" in row[2]
        assert row[3] == ("–" if metric.reference is None else percent(metric.reference))
        if metric.low is not None:
            assert f"[{metric.low * 100:.2f}, {percent(metric.high)}]" in row[2]
        else:
            assert "[" not in row[2]


def test_an_auc_is_not_a_percentage(page):
    row = next(row for row in metric_rows(page) if row[0].startswith("Attack AUC"))
    assert [row[1], row[3]] == ["0.8398", "0.4955"]
    assert row[2].startswith("0.5123[0.5020, 0.5226]")
    assert row[4].startswith("≤ 0.5500")
    assert row[5] == "+0.0377"


def test_each_rule_has_threshold_margin_and_result(page):
    rows = metric_rows(page)
    first = next(place for place, row in enumerate(rows) if row[0].startswith("Unlearning accuracy"))
    within, least = rows[first], rows[first + 1]
    assert within[4].startswith("within 6.00\N{NO-BREAK SPACE}% ± 3.00\N{NO-BREAK SPACE}pp")
    assert within[5:] == ["+2.22\N{NO-BREAK SPACE}pp", "✓ holds"]
    assert least[0].startswith("≥ 1.00\N{NO-BREAK SPACE}%")
    assert least[1:] == ["+4.22\N{NO-BREAK SPACE}pp", "✓ holds"]
    assert next(row for row in rows if row[0].startswith("Test accuracy"))[6] == "no rule"


def test_a_rule_that_one_sample_decides_says_so(evidence, decision, context):
    close = [item.model_copy(update={"close": item.rule == "RA >="}) for item in decision.verdicts]
    shown = Page(render_report(evidence, decision.model_copy(update={"verdicts": close}), context))
    assert [any("by less than one sample" in cell for cell in row) for row in shown.rows].count(True) == 1


def test_the_banner_shows_passed_with_the_number_of_checks(page, text, decision):
    assert page.texts["strong"] == ["PASSED"]
    assert ("div", {"class": "banner passed", "role": "status"}) in page.tags
    assert f"All {len(decision.verdicts)} checks of policy" in text
    assert page.texts["li"][0].startswith(f"Assurance level {decision.level}")
    levels = [f"Requests for {kind}: {found.figures}." for kind, found in decision.kinds.items()]
    assert len(levels) == 2
    assert page.texts["li"][1:3] == levels


def test_a_refused_decision_shows_refused_and_each_reason(evidence, policy, context):
    metrics = {
        **evidence.metrics,
        "RA": Metric(before=0.9998, after=0.91, n=40500),
        "UA": Metric(before=0.1, after=None, n=0),
    }
    worse = evidence.model_copy(
        update={"metrics": metrics, "integrity": evidence.integrity.model_copy(update={"frozen_changed": 3})}
    )
    decision = decide(worse, policy)
    page = Page(render_report(worse, decision, context))
    reasons = page.texts["li"][:4]
    assert page.texts["strong"] == ["REFUSED"]
    assert page.texts["title"][0].endswith("REFUSED")
    assert not decision.passed
    assert any("weights outside the mask changed" in reason for reason in reasons)
    assert any("kept data stays known (RA 0.9100, required >= 0.9798, n 40500)" in reason for reason in reasons)
    assert any("(integrity)" in reason for reason in reasons)
    assert any(reason == f"Next: {decision.next}" for reason in page.texts["li"])
    assert any("UA is missing or not a number" in reason for reason in reasons)
    fails = [row for row in page.rows if "✗ fails" in " ".join(row)]
    assert len(fails) == sum(not verdict.passed for verdict in decision.verdicts)


def test_a_decision_on_other_evidence_never_shows_as_passed(evidence, decision, context):
    other = evidence.model_copy(update={"created_at": "2026-01-02T03:04:06Z"})
    page = Page(render_report(other, decision, context))
    assert decision.passed
    assert page.texts["strong"] == ["REFUSED"]


def test_a_decision_on_evidence_with_a_nan_never_shows_as_passed(evidence, decision, context):
    metrics = {**evidence.metrics, "UA": Metric(before=0.1, after=float("nan"), n=3)}
    page = Page(render_report(evidence.model_copy(update={"metrics": metrics}), decision, context))
    assert page.texts["strong"] == ["REFUSED"]


def test_user_text_stays_text(page, text):
    assert not FORBIDDEN & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<script" not in text.lower()
    assert "49" not in [label.strip() for label in page.texts["text"]]
    labels = "".join(page.texts["text"])
    assert "<script>alert" in labels
    assert "$\\frac{$" in labels
    assert "{{ 7 * 7 }}" in labels
    assert "猫" in labels


def test_control_and_direction_characters_do_not_reach_the_picture(page):
    assert not re.search("[\x00-\x08\x0b-\x1f‮]", "".join(page.texts["text"]))


def test_nothing_is_loaded_from_anywhere(page, text):
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert name not in ("src", "srcset", "action", "data", "poster", "xlink:href"), (tag, name)
            if name == "href":
                assert value.startswith("#"), (tag, value)
            if name not in ("aria-label", "title"):
                assert "//" not in (value or ""), (tag, name, value)
                assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", value or ""))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    policies = [attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_every_reference_resolves(page, text):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert used
    assert set(used) <= set(ids)


def test_every_picture_has_alternative_text_with_numbers(page):
    pictures = page.of("svg")
    assert len(pictures) == 6
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert re.search(r"\d", attrs["aria-label"]), attrs["aria-label"]
    assert all("scope" in attrs for attrs in page.of("th"))


def test_the_page_has_the_same_numbers_as_json(page, evidence, decision):
    document = json.loads(page.texts["pre"][-1])
    shown = Evidence.model_validate(document["evidence"])
    measured = evidence.measured.model_copy(update={"forget_set": shown.measured.forget_set})
    assert shown == evidence.model_copy(update={"measured": measured})
    judged = json.loads(decision.model_dump_json())
    assert document["decision"] == judged | {"evidence_digest": document["decision"]["evidence_digest"]}


def test_no_digest_is_shown_by_which_a_small_forget_set_could_be_found(text, evidence, decision):
    assert evidence.measured.forget_set not in text
    assert decision.evidence_digest not in text


def test_the_page_has_provenance_lineage_and_debt(text, page, evidence, context):
    for name, digest in evidence.measured.model_dump().items():
        assert (digest in text) is (name != "forget_set")
    assert context.parent in text
    assert context.child in text
    assert context.reproduce in page.texts["pre"][1]
    assert '"epochs": 3' in page.texts["pre"][0]
    assert "2 unlearning runs and 19.00\N{NO-BREAK SPACE}% of the training data" in text  # (5000 + 4500) / 50000
    assert "Retraining recommended</span>" in text
    assert "454,500" in text
    assert "2110.11891" in text
    assert (
        "The forget set has 4,500 samples. The widest 95 % interval (Membership attack (MIA)) is ± 1.02 points." in text
    )


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(text, evidence, decision, context, tmp_path):
    program = (
        "import sys, pathlib\n"
        "from salun_core.evaluation.evidence import Evidence\n"
        "from salun_core.gate import GateDecision\n"
        "from salun_core.report import ReportContext, write_report\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "read = lambda kind, name: kind.model_validate_json((here / name).read_text())\n"
        "write_report(here / sys.argv[2], read(Evidence, 'e'), read(GateDecision, 'd'), read(ReportContext, 'c'))\n"
    )
    for name, document in {"e": evidence, "d": decision, "c": context}.items():
        (tmp_path / name).write_text(document.model_dump_json())
    environment = {**os.environ, "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "1", "TZ": "UTC+1"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path), "other"], env=environment, check=True)
    assert (tmp_path / "other").read_text() == text


OPTIONAL = {
    "distributions": ({"distributions": {}}, "distributions of loss and confidence"),
    "per_class": ({"per_class": []}, "accuracy by class"),
    "roc": ({"roc": {}}, "curve of the membership attack"),
    "empty curve": ({"roc": {"after": Curve(fpr=[], tpr=[], auc=0.5)}}, "curve of the membership attack"),
}


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_missing_part_is_named_and_left_out(part, evidence, policy, context):
    update, title = OPTIONAL[part]
    less = evidence.model_copy(update=update)
    text = render_report(less, decide(less, policy), context)
    page = Page(text)
    assert re.search(rf"Left out, because it was not measured or given: [^<]*{title}", text)
    assert len(page.of("svg")) == (4 if part == "distributions" else 5)


def test_bare_evidence_without_decision_renders(evidence):
    bare = Evidence(
        created_at="2026-01-02T03:04:05Z",
        measured=evidence.measured.model_copy(update={"reference": None, "mask": None}),
        forgotten=evidence.forgotten.model_copy(update={"kinds": [], "train_count": 0, "count": 0}),
        integrity=evidence.integrity.model_copy(update={"weights": 0, "weights_changed": 0, "frozen_changed": None}),
        metrics={
            "UA": Metric(before=None, after=None, n=0),
            "RA": Metric(before=float("nan"), after=float("inf"), n=1),
        },
    )
    text = render_report(bare, None, ReportContext(model_line="line", created_at="now"))
    page = Page(text)
    rows = metric_rows(page)
    assert page.texts["strong"] == ["NO DECISION"]
    assert page.of("svg") == []
    assert rows[0][1:4] == ["–", "–n 0", "–"]
    assert rows[1][1:4] == ["–", "–n 1", "–"]
    assert "No retrained reference was measured." in text


def test_a_rule_on_a_metric_that_is_missing_has_its_row(evidence, policy, context):
    metrics = {name: metric for name, metric in evidence.metrics.items() if name != "attack_auc"}
    less = evidence.model_copy(update={"metrics": metrics})
    page = Page(render_report(less, decide(less, policy), context))
    row = next(row for row in metric_rows(page) if row[0].startswith("Attack AUC"))
    assert row[1:4] == ["–", "–n –", "–"]
    assert "the evidence has no metric attack_auc" in row[4]
    assert row[6] == "✗ fails"


def test_a_histogram_that_does_not_fit_its_bins_is_left_out(evidence, context):
    loss = evidence.distributions["loss"]
    broken = evidence.model_copy(update={"distributions": {"loss": loss.model_copy(update={"edges": [0.0, 1.0]})}})
    page = Page(render_report(broken, None, context))
    assert len(page.of("svg")) == 4


@pytest.mark.slow
def test_a_huge_evidence_still_fits(evidence, decision, context):
    line = [place / 20000 for place in range(20001)]
    one = evidence.per_class[0]
    huge = evidence.model_copy(
        update={
            "roc": dict.fromkeys(("before", "after", "reference"), Curve(fpr=line, tpr=line, auc=0.5)),
            "confusion": [[1000 + place for place in range(1000)] for _ in range(1000)],
            "per_class": [one.model_copy(update={"class_id": i, "name": f"class {i}"}) for i in range(1000)],
            "run": evidence.run.model_copy(
                update={"density_by_parameter": {f"block{i}.weight": 0.5 for i in range(2000)}}
            ),
        }
    )
    with pictures.drawn():
        text = render_report(huge, decision, context)
    assert len(text.encode()) < MAX_BYTES
    assert "The 40 classes that changed most of 1000." in text
    assert json.loads(Page(text).texts["pre"][-1])["evidence"]["per_class"][999]["name"] == "class 999"


def test_a_page_that_would_be_too_large_is_an_error(evidence, context, tmp_path):
    long = context.model_copy(update={"reproduce": "x" * MAX_BYTES})
    with pytest.raises(SalunError, match="too large"):
        write_report(tmp_path / "report.html", evidence, None, long)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_write_replaces_the_file_atomically(evidence, decision, context, tmp_path):
    target = tmp_path / "deep" / "report.html"
    write_report(target, evidence, None, context)
    write_report(target, evidence, decision, context)
    assert target.read_text(encoding="utf-8") == render_report(evidence, decision, context)
    assert [item.name for item in target.parent.iterdir()] == ["report.html"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("blocked", ["folder in the way", "parent is a file"])
def test_a_path_that_cannot_be_written_is_one_clear_error(blocked, evidence, context, tmp_path):
    target = tmp_path / "report.html"
    if blocked == "folder in the way":
        (target / "child").mkdir(parents=True)
    else:
        target = tmp_path / "file" / "report.html"
        (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SalunError, match="cannot write") as caught:
        write_report(target, evidence, None, context)
    assert caught.value.exit_code == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_import_is_cheap():
    heavy = "{'torch', 'matplotlib', 'numpy', 'jinja2', 'sklearn'}"
    program = f"import sys, salun_core.report; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def _luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_enough_contrast_in_both_themes(text):
    """WCAG 2.2: 4.5 for text, 3 for parts of a picture."""
    themes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", text)
    ]
    assert len(themes) == 2
    for theme in themes:
        for name, ground, least in [
            *((ink, ground, 4.5) for ink in ("ink", "muted") for ground in ("card", "page")),
            *((state, f"{state}-soft", 4.5) for state in ("good", "bad", "open")),
            *((series, "card", 3.0) for series in ("forget", "retain", "test", "before", "after", "reference")),
        ]:
            light, dark = sorted((_luminance(theme[name]), _luminance(theme[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground, theme[name])
