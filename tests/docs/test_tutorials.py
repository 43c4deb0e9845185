"""The tutorials step by step: every command prints what the page shows, apart from figures, digests and times."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from salun_core.cli.app import app
from tests.docs.pages import DOCS, console, matches

VARIES = re.compile(
    r"run-\d{8}-\d{6}-[0-9a-f]{6}"
    r"|\b(?=[0-9a-f]*\d)([0-9a-f]{64}|[0-9a-f]{12})\b"  # digests, whole and short
    r"|\d{4}-\d\d-\d\d \d\d:\d\d"
    r"|-?\d+(\.\d+)+|\d+\.\d+%|\b\d{4,}\b"  # figures; counts of a few digits are compared
)
SMALLER = {"IMAGES=1000000": "IMAGES=2000"}  # else the test would take as long as the page
SKIPPED = ("salun demo", "set -a")  # the store of the reader's demo: here it is the session's


@pytest.fixture
def shell(tmp_path, monkeypatch, store):
    """Runs a command of a page in an empty folder, against an empty store; returns its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    monkeypatch.setenv("SALUN_ACTOR", "root")
    monkeypatch.setenv("COLUMNS", "110")
    code = 0

    def run(command):
        nonlocal code
        words = shlex.split(command)
        if words[0] == "export":
            monkeypatch.setenv(*SMALLER.get(words[1], words[1]).split("=", 1))
            return ""
        if words[0] == "python":
            command = f"{sys.executable}{command.removeprefix(words[0])}"
        if words[0] == "salun":
            result = CliRunner().invoke(app, words[1:])
            code = result.exit_code
            return result.stdout
        done = subprocess.run(
            ["bash", "-c", command.replace("$?", str(code))], capture_output=True, text=True, check=True
        )
        return done.stdout

    return run


def plain(text):
    """The text of a table without its lines and spacing."""
    return "".join(re.sub(r"[ ─]+", " ", line).strip() + "\n" for line in text.splitlines())


@pytest.mark.e2e
@pytest.mark.parametrize("page", ["classifier", "deletion-requests"])
def test_a_tutorial_shows_what_its_commands_print(page, shell):
    text = (DOCS / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    digests = {}
    for shown in console(text):
        if shown.command.startswith(SKIPPED):
            continue
        command = re.sub(r"@([0-9a-f]{12})\b", lambda match: f"@{digests[match[1]]}", shown.command)
        printed = shell(command)
        if shown.output:
            assert matches(plain(shown.output), plain(printed), VARIES), f"$ {command}\n{printed}"
            short = [re.findall(r"\b[0-9a-f]{12}", lines) for lines in (shown.output, printed)]
            digests.update(zip(*short, strict=False))


@pytest.mark.e2e
def test_the_tutorial_of_a_million_images_holds_for_a_few(shell):
    text = (DOCS / "tutorials" / "million-images.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    Path("make_images.py").write_text(script, encoding="utf-8")
    any_number = re.compile(rf"{VARIES.pattern}|\b\d+\b")
    for shown in console(text):
        printed = shell(shown.command)
        assert matches(plain(shown.output), plain(printed), any_number), f"$ {shown.command}\n{printed}"


def test_only_figures_may_differ():
    shown = "UA   0.0000   1.0000   131\n"
    assert matches(plain(shown), plain("UA 0.1000  0.9000   131\n"), VARIES)
    assert not matches(plain(shown), plain("UA 0.1000  0.9000   130\n"), VARIES)
    assert not matches(plain(shown), plain("RA 0.1000  0.9000   131\n"), VARIES)
