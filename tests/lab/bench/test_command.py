"""`salun bench`, as it is typed."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test

pytestmark = pytest.mark.slow

REFUSED = "Error: salun bench has no command "


def call(*words):
    result = invoke("bench", *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*words):
    """Return the exit code and its standard error; nothing else is printed."""
    result = invoke("bench", *words)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_a_dry_run_lists_cells_and_costs_and_writes_nothing(suite_file, resumed, tmp_path):
    plain = json.loads(call("run", suite_file, "--dry-run", "--out", tmp_path / "none", "--json"))
    assert [row["seconds"] for row in plain["cells"]] == [None] * 6
    assert plain["cells"][0]["cost"] == "1 epochs"
    assert not (tmp_path / "none").exists()
    chosen = ("--only", "SalUn", "--seeds", "1")
    known = json.loads(call("run", suite_file, "--dry-run", "--out", resumed[0], *chosen, "--json"))
    assert [row["cell"] for row in known["cells"]] == ["salun-0"]
    assert known["cells"][0]["seconds"] > 0


def test_render_only_prints_the_table_and_writes_the_page(suite_file, resumed, tmp_path):
    page, kept = tmp_path / "docs" / "results.md", tmp_path / "results"
    text = call("run", suite_file, "--render-only", "--out", resumed[0], "--into", page, "--results", kept)
    assert text.startswith("| method | UA |")
    assert (resumed[0] / "table.md").read_text() == text
    assert (kept / "digits-cpu.json").read_bytes() == (resumed[0] / "results.json").read_bytes()
    assert (resumed[0] / "plot.svg").read_text().startswith("<svg xmlns=")
    assert text.strip() in page.read_text()
    assert "    salun bench run digits --size cpu\n" in page.read_text()
    written = page.read_bytes()
    page.unlink()
    assert call("render", "--into", page, "--results", kept).strip() == f"{page}: digits:cpu"
    assert page.read_bytes() == written
    assert call("render", "--into", page, "--results", kept, "--check").strip() == f"{page}: digits:cpu"


def test_a_check_reports_a_stale_page_and_the_command_that_fixes_it(suite_file, resumed, tmp_path):
    page, kept = tmp_path / "results.md", tmp_path / "results"
    call("run", suite_file, "--render-only", "--out", resumed[0], "--into", page, "--results", kept)
    page.write_text(page.read_text().replace("| RL |", "| LR |"))
    before = page.read_bytes()
    code, message = refused("render", "--into", page, "--results", kept, "--check")
    assert code == 4
    assert "out of step" in message
    assert f"run `salun bench render --into {page}`" in message
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("sd-class", "--size", "cpu"), "`salun bench run sd-class --size cpu`"),
        (("my suite.yaml", "--only", "SalUn"), "`salun bench run 'my suite.yaml' --only SalUn`"),
        (("--render-only", "--into", "page.md", "--check"), "`salun bench render --into PAGE`"),
        (("--size", "cpu", "sd-class"), "`salun bench run SUITE`"),
    ],
)
def test_a_call_without_a_verb_names_the_verb_in_one_line(words, expected):
    code, message = refused(*words)
    assert code == 2
    assert message.startswith(REFUSED + repr(words[0]))
    assert expected in message
    assert message.count("\n") == 1


def test_a_typo_in_a_verb_gets_the_nearest_one():
    code, message = refused("rendr", "--into", "page.md")
    assert code == 2
    assert "Did you mean 'render'?" in message


@pytest.mark.parametrize("words", [("run",), ("render",), ()])
def test_without_a_suite_or_a_page_nothing_is_done(words):
    result = invoke("bench", *words)
    assert result.exit_code == 2
    assert "Usage: " in result.output
