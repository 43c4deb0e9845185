"""The page of results: made from JSON alone, between markers, and checked."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from salun_core.bench.page import filled, read_results, results_json, section, write_page
from salun_core.bench.plot import plot
from salun_core.bench.results import Figures, ResultRow, Results
from salun_core.errors import ConflictError, UsageError


def figures(seed, ua, ra, seconds):
    return Figures(seed=seed, values={"UA": ua, "RA": ra, "FID": 12.5, "KID": 0.01}, seconds=seconds, passes=9600)


RESULTS = Results(
    suite="toy-class",
    size="cpu",
    title="Toy",
    about="Two rows.",
    kind="text-to-image",
    command="salun bench run toy-class --size cpu",
    settings={},
    extractor="judge:0123",
    images=500,
    environment={"torch": "2", "threads": "2"},
    machine="A processor, 2 cores",
    rows=[
        ResultRow(name="original", figures=[figures(0, 0.0, 0.96, None)]),
        ResultRow(
            name="SalUn",
            method="salun",
            mask="saliency",
            density=0.5,
            figures=[figures(0, 1.0, 0.97, 40.0), figures(1, 0.98, 0.95, 42.0)],
        ),
    ],
    missing=["esd-0"],
)


def test_the_table_of_generated_images():
    assert section(RESULTS).split("\n\n")[2].splitlines() == [
        "| method | UA | RA | FID | KID | RTE, s | passes |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| original | 0.00 | 96.00 | 12.50 | 0.0100 | – | 9,600 |",
        "| SalUn (50%) | 99.00 ± 1.41 | 96.00 ± 1.41 | 12.50 ± 0.00 | 0.0100 ± 0.0000 | 41.0 ± 1.4 | 9,600 |",
    ]


def test_a_section_has_its_command_and_the_missing_cells():
    text = section(RESULTS)
    assert "    salun bench run toy-class --size cpu" in text
    assert "Not measured: esd-0." in text
    assert "2 seeds; A processor, 2 cores; torch 2, 2 threads." in text


def test_only_text_between_the_markers_changes():
    begin, end = "<!-- suite:toy-class:cpu -->", "<!-- /suite:toy-class:cpu -->"
    page = filled(f"# Mine\n\nbefore\n{begin}\nold\n{end}\nafter\n", [RESULTS])
    assert page.startswith(f"# Mine\n\nbefore\n{begin}\n### Toy (cpu)")
    assert page.endswith(f"{end}\nafter\n")
    assert "old" not in page
    assert filled(page, [RESULTS]) == page


def test_a_page_without_markers_gets_them_appended():
    page = filled("# Results\n", [RESULTS])
    assert page.index("# Results") < page.index("<!-- suite:toy-class:cpu -->") < page.index("### Toy (cpu)")


@pytest.mark.parametrize("page", ["<!-- suite:toy-class:cpu -->\n", "<!-- suite:toy-class:cpu -->\n" * 2])
def test_broken_markers_are_refused(page):
    with pytest.raises(UsageError, match="markers of suite:toy-class:cpu are broken"):
        filled(page, [RESULTS])


def test_the_page_is_written_from_json_and_checked(tmp_path):
    folder, page = tmp_path / "results", tmp_path / "docs" / "results.md"
    folder.mkdir()
    (folder / "toy-class-cpu.json").write_bytes(results_json(RESULTS))
    (folder / "other.json").write_text('{"format": "else"}')
    with pytest.raises(ConflictError, match="out of step"):
        write_page(page, folder, check=True)
    assert not page.exists()
    assert write_page(page, folder) == ["toy-class:cpu"]
    assert write_page(page, folder, check=True) == ["toy-class:cpu"]
    changed = RESULTS.model_copy(update={"machine": "Another"})
    (folder / "toy-class-cpu.json").write_bytes(results_json(changed))
    with pytest.raises(ConflictError, match="toy-class:cpu"):
        write_page(page, folder, check=True)
    (folder / "toy-class-cpu.json").unlink()
    with pytest.raises(ConflictError, match="toy-class:cpu"):  # a table without its results
        write_page(page, folder, check=True)


def test_results_with_a_fault_are_refused(tmp_path):
    (tmp_path / "broken.json").write_text('{"format": "salun.bench/v1", "suit": "x"}')
    with pytest.raises(UsageError, match="did you mean 'suite'"):
        read_results(tmp_path)


def test_the_picture_is_a_standalone_svg_with_alternative_text():
    picture = plot(RESULTS)
    root = ET.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["aria-label"] == "Distance from the goal against cost: SalUn 4.00 at 41.0 s."
    assert "var(--" not in picture
