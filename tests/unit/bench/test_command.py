"""`salun bench`, as it is typed."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from salun_core.cli import output
from salun_core.cli.bench import bench
from salun_core.errors import ConflictError, UsageError

app = typer.Typer()
app.command()(bench)


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_dry_run_lists_the_cells_with_their_cost_and_writes_nothing(suite_file, resumed, tmp_path, monkeypatch):
    monkeypatch.setattr(output.MODE, "json", True)
    plain = json.loads(call(suite_file, "--dry-run", "--out", tmp_path / "none"))
    assert [row["seconds"] for row in plain["cells"]] == [None] * 6
    assert plain["cells"][0]["cost"] == "1 epochs"
    assert not (tmp_path / "none").exists()
    known = json.loads(call(suite_file, "--dry-run", "--out", resumed[0], "--only", "SalUn", "--seeds", "1"))
    assert [row["cell"] for row in known["cells"]] == ["salun-0"]
    assert known["cells"][0]["seconds"] > 0


def test_render_only_writes_table_json_and_picture_and_the_page(suite_file, resumed, tmp_path):
    page, kept = tmp_path / "docs" / "results.md", tmp_path / "results"
    text = call(suite_file, "--render-only", "--out", resumed[0], "--into", page, "--results", kept)
    assert text.startswith("| method | UA |")
    assert (resumed[0] / "table.md").read_text() == text
    assert (kept / "digits-cpu.json").read_bytes() == (resumed[0] / "results.json").read_bytes()
    assert (resumed[0] / "plot.svg").read_text().startswith("<svg xmlns=")
    assert text.strip() in page.read_text()
    assert call("--render-only", "--into", page, "--results", kept, "--check").strip() == f"{page}: digits:cpu"
    page.write_text(page.read_text().replace("| RL |", "| LR |"))
    with pytest.raises(ConflictError, match="out of step"):
        call("--render-only", "--into", page, "--results", kept, "--check")


def test_without_a_suite_there_is_nothing_to_measure():
    with pytest.raises(UsageError, match="no suite is named"):
        call()
