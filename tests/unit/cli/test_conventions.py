"""What every verb has in common: help with an example, `--json`, exit codes, completion."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from salun_core import errors
from salun_core.cli.app import app, load_examples
from salun_core.cli.failures import INTERRUPTED
from salun_core.requests.intake import submit_all
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Submission
from salun_core.times import utc_clock
from tests.support.card_line import begin_classifier
from tests.support.memory_store import MemoryFiles


def _verbs(command, path=""):
    for name, child in getattr(command, "commands", {}).items():
        below = f"{path} {name}".strip()
        yield from _verbs(child, below) if hasattr(child, "commands") else [below]


VERBS = sorted(_verbs(typer.main.get_command(app)))
ELSEWHERE = {"model diff", "plugin list"}  # test_version_verbs.py, test_plugin_verbs.py: they need more than a line
LISTINGS = {  # every other verb that lists or shows what is there, with its arguments
    "ls methods": (),
    "ls models": (),
    "ls data": (),
    "model list": (),
    "model history": ("faces",),
    "model show": ("faces",),
    "request list": (),
    "request show": ("r-1",),
    "exporter": ("--once",),
}


@pytest.fixture
def listed(salun, monkeypatch):
    store = MemoryFiles()
    store.uri = "s3://abc"
    begin_classifier(store, "faces")
    given = {"id": "r-1", "model_line": "faces", "target": {"kind": "samples", "ids": ["a"]}}
    submit_all(Ledger(store, utc_clock), [Submission.model_validate(given)], "ana")
    monkeypatch.setenv("SALUN_STORE_URI", "s3://abc")
    # A module that is first imported while the function is replaced would keep the replacement in later tests.
    importlib.import_module("salun_core.certificates.verify")
    monkeypatch.setattr("salun_core.storage.open_store", lambda uri: store)
    return salun


def test_the_table_of_listings_is_complete():
    named = {verb for verb in VERBS if verb.split()[-1] in ("list", "show", "history", "diff") or verb[:3] == "ls "}
    assert named - ELSEWHERE <= LISTINGS.keys() <= set(VERBS)


@pytest.mark.parametrize("verb", LISTINGS)
def test_a_listing_prints_one_json_document(listed, verb):
    result = listed(*verb.split(), *LISTINGS[verb], "--json")
    assert json.loads(result.stdout), result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_ends_in_an_example(verb):
    if verb.startswith("demo"):  # they pass --help on
        assert load_examples()[verb].startswith(f"$ salun {verb}")
        return
    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    shown = [line.strip() for line in result.stdout.partition("Example:")[2].splitlines()]
    assert any(line.startswith(f"$ salun {verb}") for line in shown)
    for option in ("--json", "--debug", "--config"):
        assert option in result.stdout


def test_no_summary_is_cut_off_in_the_list_of_commands():
    def groups(command):
        if hasattr(command, "commands"):
            yield command
            for child in command.commands.values():
                yield from groups(child)

    for group in groups(typer.main.get_command(app)):
        room = 80 - 2 - 6 - max(map(len, group.commands))  # click's, on a terminal of 80 columns
        cut = [name for name, child in group.commands.items() if child.get_short_help_str(room).endswith("...")]
        assert not cut, (group.name, cut)


def _errors(kind=errors.SalunError):
    yield kind
    for below in kind.__subclasses__():
        yield from _errors(below)


@pytest.mark.parametrize("kind", sorted(set(_errors()), key=str))
def test_every_error_has_an_exit_code_of_the_table(kind):
    assert kind.exit_code in errors.EXIT_CODES
    assert INTERRUPTED in errors.EXIT_CODES


def test_the_help_shows_every_exit_code():
    shown = " ".join(CliRunner().invoke(app, ["--help"]).stdout.partition("Exit codes:")[2].split())
    for code, meaning in errors.EXIT_CODES.items():
        assert f"{code} {meaning}" in shown


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("salun mod", {"model"}), ("salun model pu", {"pull"}), ("salun request submit --ra", {"--random"})],
)
def test_a_shell_completes_verbs_and_options(typed, expected):
    asked = {"_SALUN_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    result = CliRunner().invoke(app, [], env=asked, prog_name="salun")
    assert set(result.stdout.split()) == expected


def test_completion_and_help_import_nothing_heavy():
    code = "import sys, salun_core.cli.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "boto3", "diffusers", "matplotlib", "pyarrow"} & set(loaded)
