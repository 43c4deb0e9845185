"""The page of results: made from JSON alone, between markers, and checked."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from lab.bench.page import filled, read_results, results_json, section, table, write_page
from lab.bench.plot import plot
from lab.bench.results import Figures, ResultRow, Results, best_rows
from lab.studies.readme_tables import STUDY, starts_table, study_table
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


def classifier(name, gaps, references=None, chosen=None):
    """A row of a classification table. Its four metrics all have the given gap (points above 0), one per seed."""
    items = []
    for seed, gap in enumerate(gaps):
        values = dict.fromkeys(("UA", "RA", "TA", "MIA"), gap / 100)
        items.append(Figures(seed=seed, values=values, gap=gap / 100, passes=10, chosen=chosen))
    if references is not None:  # of each seed, at -floor/2 and +floor/2: `floor` points apart
        items = [
            Figures(
                seed=seed, values=dict.fromkeys(("UA", "RA", "TA", "MIA"), value), gap=floor / 100, reference=number
            )
            for seed, floor in enumerate(references)
            for number, value in enumerate((-floor / 200, floor / 200))
        ]
    method = None if name in ("original", "Retrain") else "salun"
    return ResultRow(name=name, method=method, figures=items)


def compared(*rows, floor=None):
    """Invented results of a search on three seeds, with a floor or, as committed ones have, a single reference."""
    retrained = classifier("Retrain", [0, 0, 0], references=floor)
    chosen = {"learning_rate": 0.1}
    methods = [classifier(name, gaps, chosen=chosen) for name, gaps in rows]
    update = {"kind": "classification", "rows": [classifier("original", [30, 30, 30]), retrained, *methods]}
    return RESULTS.model_copy(update=update)


CLOSE = (("A", [3.0, 3.1, 3.2]), ("B", [3.3, 3.4, 3.6]), ("C", [9.0, 9.1, 9.3]))  # B is 0.33 behind A in every seed


def bold(text):
    return {line.split(" | ")[0].strip("| ") for line in text.splitlines() if "**" in line}


@pytest.mark.parametrize(
    ("floor", "wanted"),
    [([1.0, 1.0, 1.0], {"A", "B"}), ([0.1, 0.1, 0.1], {"A"}), (None, set()), ([9.0, 9.0, 9.0], set())],
)
def test_rows_whose_difference_lies_inside_the_floor_are_not_told_apart_by_bold(floor, wanted):
    results = compared(*CLOSE, floor=floor)
    assert bold(table(results)) == wanted
    documents = dict.fromkeys(STUDY.values(), results.model_dump(mode="json"))
    assert bold(study_table(documents)) == wanted


def test_rows_that_are_close_and_whose_paired_interval_contains_zero_are_tied():
    gaps = {"A": {0: 3.0, 1: 3.0, 2: 3.0}, "B": {0: 3.1, 1: 4.9, 2: 3.4}, "C": {0: 3.5, 1: 3.6, 2: 3.7}}
    assert best_rows(gaps, 0.1) == {"A", "B"}  # B: 0.8 behind, above the floor; the interval is -1.6 to 3.2
    shifted = {name: {seed: gap + 20 * seed for seed, gap in of.items()} for name, of in gaps.items()}
    assert best_rows(shifted, 0.1) == {"A", "B"}  # what all rows of a seed share cancels out: C is still told apart
    assert best_rows({name: {0: of[0]} for name, of in gaps.items()}, 0.1) == set()  # one seed tells nothing apart


def test_a_row_that_fails_at_one_seed_is_not_tied_although_its_interval_contains_zero():
    gaps = {"A": {0: 3.0, 1: 3.0, 2: 3.0}, "B": {0: 3.0, 1: 60.0, 2: 3.1}}
    assert best_rows(gaps, 0.1) == {"A"}


def test_the_floor_is_a_row_and_is_named_below_the_table():
    text = section(compared(*CLOSE, floor=[0.8, 1.0, 1.2]))
    line = next(line for line in text.splitlines() if line.startswith("| Retrain against Retrain |"))
    assert "0.00 ± 0.00 (1.00)" in line  # mean of the references, and the distance of each to the other
    assert "| 1.00 ± 0.20 | – |" in line
    assert "| **3.43 ± 0.15** | 0.33 [0.19, 0.48] |" in text
    assert "Each seed has 2 retrained models of other seeds" in text
    assert "1.00 points, is the floor" in text


def test_results_with_one_reference_have_no_floor_and_nothing_bold():
    results = compared(*CLOSE)
    assert results.floor is None
    text = section(results)
    assert "No floor was measured" in text
    assert "Retrain against Retrain" not in text
    assert "**" not in text
    documents = dict.fromkeys(STUDY.values(), results.model_dump(mode="json"))
    assert "No floor was measured" in study_table(documents)
    mixed = documents | {list(STUDY.values())[-1]: compared(*CLOSE, floor=[0.1, 0.1, 0.1]).model_dump(mode="json")}
    row = next(line for line in study_table(mixed).splitlines() if line.startswith("| Retrain against Retrain |"))
    assert row == f"| Retrain against Retrain |{' – |' * (len(STUDY) - 1)} 0.10 ± 0.00 |"


def test_selected_settings_that_every_search_tries_first_are_counted():
    default = {"batch_norm": "freeze", "density": 0.5, "learning_rate": 0.003, "order": "sequential"}
    mirror = {"batch_norm": "update", "density": 0.1, "learning_rate": 0.015, "order": "mixed"}
    found = {"batch_norm": "freeze", "density": 0.5, "learning_rate": 0.0031, "order": "sequential"}

    def row(name, method, *chosen):
        items = [figures(seed, 0.0, 1.0, 1.0).model_copy(update={"chosen": one}) for seed, one in enumerate(chosen)]
        return ResultRow(name=name, method=method, figures=items)

    of = {"method": "salun"}
    rows = [
        row("SalUn", "salun", default | {"epochs": 2.0}, mirror | {"epochs": 5.0}, found | {"epochs": 5.0}),
        row(
            "search",
            "auto",
            of | default | {"epochs": 5.0},
            of | mirror | {"epochs": 5.0},
            of | found | {"epochs": 5.0},
        ),
        row("as written", "salun"),
    ]
    documents = dict.fromkeys(STUDY.values(), RESULTS.model_copy(update={"rows": rows}).model_dump(mode="json"))
    one, several = starts_table(documents).splitlines()[2:]
    assert one == f"| searches of one method |{' 1 of 3 |' * len(STUDY)} {len(STUDY)} of {3 * len(STUDY)} |"
    assert several == f"| search over methods |{' 2 of 3 |' * len(STUDY)} {2 * len(STUDY)} of {3 * len(STUDY)} |"
