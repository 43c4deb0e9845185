"""The report of generated images: its grids, its units, and images that must not be embedded."""

import base64
import hashlib
import io
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from salun_core.evaluation.evidence import CurvePoint, DiffusionFacts, Grid, Metric, PartCount
from salun_core.evaluation.metrics import GENERATED
from salun_core.gate import decide, load_policy
from salun_core.report import ReportContext, images, plots, render_report, view, wording
from salun_core.report.render import MAX_BYTES

NBSP = wording.NBSP


class Page(HTMLParser):
    """Collects tags with their attributes, and the text of rows, headings, tiles and list items."""

    KINDS = ("tr", "li", "h2", "dd", "strong")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], {kind: [] for kind in self.KINDS}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in self.KINDS:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.KINDS:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for kind in self.open:
            self.texts[kind][-1] += f"{data} "

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def row(self, start):
        return " ".join(next(row for row in self.texts["tr"] if row.split("\n")[0].startswith(start)).split(" "))


@pytest.fixture(scope="session")
def text(generated, generated_decision, context):
    return render_report(generated, generated_decision, context)


@pytest.fixture(scope="session")
def page(text):
    return Page(text)


def png(width, height, pixels=b""):
    """Return a PNG by hand whose header may tell another size than its data has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_the_grids_are_shown_side_by_side_with_the_forgotten_row_marked(page, text, grid):
    shown = page.of("img")
    assert [image["src"] for image in shown] == [grid.before, grid.after] * 2
    assert {(image["width"], image["height"]) for image in shown} == {("272", "340")}
    assert text.count(grid.before) == 1 * 2
    marked = [attrs for attrs in page.of("li") if attrs.get("class") == "gone"]
    assert [attrs["title"] for attrs in marked] == ["3"] * 4
    assert "Same seeds, before and after " in page.texts["h2"]
    assert text.count("(blurred intentionally)") == 1


def test_alternative_texts_have_state_rows_and_blur(page):
    first, _, third, fourth = (image["alt"] for image in page.of("img"))
    assert first.startswith("Before: 10 rows of generated images, digits. From the top: 0; 1; <script>")
    assert "3 (to be forgotten); 4;" in first
    assert third.startswith("Before: 10 rows of blurred generated images, prompts.")
    assert fourth.startswith("After: ")


def test_headline_figures_are_those_of_generated_images(page):
    tiles = [" ".join(tile.split(" ")) for tile in page.texts["li"][1:6]]  # after the assurance level
    for tile, title, before, after in zip(
        tiles,
        [row.tile for row in GENERATED.values() if row.tile],
        ("12.00 %", "87.10 %", "30.00 %", "16.71", "31.12"),
        ("99.00 %", "86.60 %", "1.00 %", "18.04", "30.97"),
        strict=True,
    ):
        words = tile.replace(NBSP, " ")
        assert title in words
        assert words.index(before) < words.index(after)
        assert ("%" in words.partition("retrained")[0]) is ("%" in after)


def test_distances_and_scores_are_not_percentages(page):
    fid, kid, clip = page.row("Fréchet distance"), page.row("Kernel distance"), page.row("CLIP score")
    assert "16.71" in fid
    assert "[17.50, 18.75]" in fid
    assert "≤ 25.07" in fid  # 1.5 * 16.71
    assert "+7.03" in fid
    assert "0.0044" in kid
    assert "30.97" in clip
    assert not any("%" in row for row in (fid, kid, clip))
    assert f"87.10{NBSP}%" in page.row("Accuracy of the other classes")


def test_the_reasons_of_a_refusal_have_units(generated, context):
    metrics = {**generated.metrics, "FID": Metric(before=16.0, after=40.0, n=900)}
    worse = generated.model_copy(update={"metrics": metrics})
    page = Page(render_report(worse, decide(worse, load_policy("stable-diffusion")), context))
    assert page.texts["strong"][0].strip() == "REFUSED"
    assert "real ones by more than half (FID 40.0000, required <= 24.0000, n 900)" in page.texts["li"][0]


def test_the_page_may_load_only_its_own_images(page, text):
    policies = [attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "<script" not in text.lower()
    for tag, attrs in page.tags:
        assert "onerror" not in attrs
        assert tag != "img" or re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", attrs["src"])
        assert tag == "img" or "src" not in attrs


def test_parts_of_classifiers_do_not_count_as_missing(text, generated, context):
    assert "Left out, because it was not measured" not in text
    assert "Membership attack" not in text
    bare = generated.model_copy(
        update={
            "generation": generated.generation.model_copy(update={"grids": [], "resurgence": [], "parts": {}}),
            "run": generated.run.model_copy(update={"history": [], "density_by_parameter": {}}),
            "per_class": [],
        }
    )
    less = render_report(bare, None, ReportContext(model_line="line", created_at="now"))
    listed = re.search(r"Left out, because it was not measured or given: ([^<]*)\.", less).group(1)
    assert listed.split("; ") == [
        "images before and after",
        "accuracy by class of the generated images",
        "UA while the model is fine-tuned on retained data",
        "density of the mask by layer",
        "training curve",
        "lineage and debt",
    ]
    assert "img-src" not in less


def test_the_json_has_the_numbers_without_images(text, generated, grid):
    block = re.search(r'<pre tabindex="0">(.*?)</pre>', text, re.DOTALL).group(1)
    document = json.loads(block.replace("&#34;", '"').replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">"))
    made = document["evidence"]["generation"]
    assert "base64" not in block
    assert hashlib.sha256(grid.before.encode()).hexdigest() in made["grids"][0]["before"]
    read = DiffusionFacts.model_validate(made)
    assert read.model_copy(update={"grids": generated.generation.grids}) == generated.generation
    assert generated.generation.grids[0].before == grid.before


def test_the_page_has_sampling_facts_and_limits(page, text, generated):
    facts = page.texts["dd"]
    assert "DDIMScheduler, 50 steps per image " in facts
    assert "from 2026, one per image, the same for every model " in facts
    assert f"{generated.generation.extractor}, against 5,000 real images " in facts
    assert "must not be compared" in text
    limits = " ".join(page.texts["li"])
    for word in (
        "An image classifier decides",
        "1,000 images",
        "Adversarial prompts",
        "Only 400 steps",
        "was not tested",
    ):
        assert word in limits
    assert "membership attacks" not in limits


@pytest.mark.parametrize(
    ("kinds", "count", "expected"),
    [
        (["concept"], 64, "64 generated images of a concept forgotten"),
        (["class", "concept"], 564, "564 of 5,000 training samples and generated images forgotten"),
        (["class"], 9, "9 of 5,000 training samples forgotten"),
    ],
)
def test_a_concept_has_no_samples(kinds, count, expected, generated):
    facts = generated.forgotten.model_copy(update={"kinds": kinds, "count": count})
    assert f"{view.forgotten(generated.model_copy(update={'forgotten': facts}))} forgotten" == expected


GOOD = png(2, 2, b"\0ab\0cd")
BAD = {
    "another address": "https://evil.test/x.png",
    "a script": "data:text/html;base64,PHNjcmlwdD4=",
    "an SVG": "data:image/svg+xml;base64,PHN2Zy8+",
    "capital letters": GOOD.replace("data:", "DATA:"),
    "not base64": GOOD[:-4] + '">x=',
    "a line break": GOOD[:40] + "\n" + GOOD[40:],
    "empty": "data:image/png;base64,",
    "a PNG that says JPEG": GOOD.replace("png", "jpeg"),
    "text that says PNG": "data:image/png;base64," + base64.b64encode(b"<svg onload=x>").decode(),
    "a PNG cut short": "data:image/png;base64," + base64.b64encode(base64.b64decode(GOOD[22:])[:40]).decode(),
    "a huge side": png(4097, 1, b"\0"),
    "a bomb": png(60_000, 60_000),
    "too long": "data:image/png;base64," + "A" * images.MAX_IMAGE_CHARS,
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("state", ["before", "after"])
def test_an_invalid_image_is_left_out_with_a_line(bad, state):
    grid = Grid(title="rows <b>", rows=["a"], **{"before": GOOD, "after": GOOD, state: BAD[bad]})
    (picture,) = images.pictures([grid])
    assert picture.images == []
    assert picture.problem.startswith(f"“rows <b>” left out: the image {state} ")


def test_a_refused_image_leaves_only_its_line_in_the_page(generated, context):
    grid = Grid(title="rows <b>", rows=["a"], before=GOOD, after=BAD["another address"], forgotten=[0, 7])
    made = generated.generation.model_copy(update={"grids": [grid]})
    text = render_report(generated.model_copy(update={"generation": made}), None, context)
    assert "“rows &lt;b&gt;” left out: the image after is not a data: URI" in text
    assert "evil.test/x.png" not in text
    assert Page(text).of("img") == []


def test_four_grids_of_the_largest_size_fit_and_more_are_left_out(generated, context):
    pixels = np.random.default_rng(5).integers(0, 256, (500, 508), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    assert 0.99 * 340_000 < len(uri) <= 340_000
    grids = [Grid(title=f"grid {place}", rows=["a"], before=uri, after=uri) for place in range(6)]
    made = generated.generation.model_copy(update={"grids": grids})
    run = generated.run.model_copy(
        update={"density_by_parameter": {f"b{i // 50}.w{i}.weight": 0.5 for i in range(2000)}}
    )
    text = render_report(generated.model_copy(update={"generation": made, "run": run}), None, context)
    assert len(text.encode()) <= MAX_BYTES
    assert len(Page(text).of("img")) == 8
    assert "2 more left out: a page shows 4 grids." in text


def test_a_page_that_is_too_large_leaves_the_json_out(generated, context):
    uri = "data:image/png;base64," + base64.b64encode(base64.b64decode(GOOD[22:]) + bytes(250_000)).decode()
    grids = [Grid(title=f"grid {place}", rows=["a"], before=uri, after=uri) for place in range(4)]
    made = generated.generation.model_copy(update={"grids": grids})
    large = generated.model_copy(update={"generation": made, "confusion": [[1] * 500] * 500})
    text = render_report(large, None, context)
    assert len(text.encode()) <= MAX_BYTES
    assert len(Page(text).of("img")) == 8
    assert "Too long for one page: see evidence.json" in text


def test_parts_are_sorted_and_summed(page):
    counts = {"A_B": PartCount(before=0, after=1), "C": PartCount(before=8, after=2), "D": PartCount(before=2, after=2)}
    assert view.parts(counts) == [
        ("c", 8, 2, "-75.0%"),
        ("d", 2, 2, "+0.0%"),
        ("a b", 0, 1, "–"),
        ("all parts", 10, 5, "-50.0%"),
    ]
    assert [name for name, *_ in view.parts({"C": PartCount(before=1, after=1)})] == ["c"]
    assert "40 2 -95.0%" in page.row("female breast exposed").replace("\n", "")


def test_the_curve_of_fine_tuning_has_its_points_in_order():
    points = [CurvePoint(step=200, ua=0.5), CurvePoint(step=0, ua=0.9), CurvePoint(step=100, ua=float("nan"))]
    words = ElementTree.fromstring(plots.resurgence(points)).attrib["aria-label"]
    assert words == "UA by steps of fine-tuning: 90.0% at 0, 50.0% at 200."


@pytest.mark.parametrize(
    ("metric", "value", "shown", "margin"),
    [
        ("FID", 18.044, "18.04", "+18.04"),
        ("KID", 0.00314, "0.0031", "+0.0031"),
        ("CLIP", 30.0, "30.00", "+30.00"),
        ("nudity", 0.014, f"1.40{NBSP}%", f"+1.40{NBSP}pp"),
    ],
)
def test_each_metric_has_its_unit(metric, value, shown, margin):
    assert wording.number(metric, value) == shown
    assert wording.margin(metric, value) == margin
    assert wording.threshold(metric, f"<= {value:.4f}") == f"≤ {shown}"
