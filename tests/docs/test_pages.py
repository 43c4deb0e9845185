"""What the pages name exists: commands, options, and the files that other documents link to."""

import re
import shlex
from functools import cache

import pytest
import typer

from salun_core.cli.app import app
from tests.docs.pages import DOCS, ROOT, console, matches

GENERATED = DOCS / "reference" / "cli.md"  # from the commands themselves
LINKED = [*ROOT.glob("*.md"), *(ROOT / "manifests").rglob("*.md")]
MADE = {"manifests/kubernetes-native/"}  # by a command of the pages
PAGES = sorted({*LINKED, *DOCS.rglob("*.md")} - {GENERATED})


@cache
def salun():
    """The command with all its subcommands, which takes a tenth of a second to build."""
    return typer.main.get_command(app)


@cache
def options(words):
    """The options of the command that these words begin with, and its name; None if there is no such command."""
    command, rest = salun(), list(words)
    if rest[:1] == ["--config"]:  # the settings file
        rest = rest[2:]
    while getattr(command, "commands", {}):
        if rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        elif rest and rest[0].startswith("-") and "classifier" in command.commands:
            command = command.commands["classifier"]  # `salun train` alone trains a classifier
        else:
            return None if rest and not rest[0].startswith("-") else _options_of(command)
    if command.context_settings.get("ignore_unknown_options"):  # it passes them on
        return {word.split("=")[0] for word in rest}
    return _options_of(command)


def _options_of(command):
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def salun_commands(text):
    """Every `salun ...` in code: lines of blocks, with a prompt or not, and code spans."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = "\n".join([*fenced, *re.findall(r"^    (.*)$", text, re.MULTILINE)])
    lines = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?salun ([^#\n]*)", blocks, re.MULTILINE)
    return [line.split("  ")[0] for line in lines + re.findall(r"`salun ([^`\n]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_of_a_command_exists(page):
    for line in salun_commands(page.read_text(encoding="utf-8")):
        words = tuple(shlex.split(line.replace("…", "X").replace("'", '"').replace('"', " ")))
        known = options(tuple(word for word in words if "|" not in word))
        assert known is not None, line
        given = {word.split("=")[0] for word in words if re.fullmatch(r"--[a-z-]+(=.*)?", word)}
        assert given <= known | {"--help", "--json", "--debug", "--version", "--config"}, line


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_outside_the_site_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    tops = "salun_core|components|pipelines|manifests|lab|examples|tests|docs"
    for name in re.findall(rf"`((?:{tops})/[\w./-]*)`", text):
        assert (ROOT / name).exists() or name in MADE or re.search("[A-Z]{4}", name), name  # NAME: any
    for name in re.findall(r"`([a-z_]+/[\w/]+\.py)`", text):  # as seen from the core
        assert any((base / name).exists() for base in (ROOT, ROOT / "salun_core", ROOT / "lab", ROOT / "tests")), name
    for name in re.findall(r"\b(test_\w+\.py)`", text):
        assert next((ROOT / "tests").rglob(name), None), name


def test_the_architecture_lists_every_part_of_the_core():
    text = (
        (DOCS / "explanation" / "architecture.md").read_text("utf-8").partition("## The core")[2].partition("\n## ")[0]
    )
    listed = {name.strip("/") for name in re.findall(r"`([a-z_]+/?)`", text)}
    core = (path for path in (ROOT / "salun_core").iterdir() if path.suffix in ("", ".py") and path.name[:2] != "__")
    assert listed >= {path.stem for path in core}


def test_the_ten_homes_define_the_named_functions():
    rows = re.findall(r"^\| Where .*\| `([^`]+)`(.*) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 10
    for path, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in (ROOT / path).read_text("utf-8"), (path, name)


def test_a_command_that_does_not_exist_is_found():
    assert options(("frobnicate",)) is None
    assert "--density" in options(("mask",))
    assert salun_commands("text\n    salun mask --x 1  # y\n`salun gate --z`\n") == ["mask --x 1", "gate --z"]


def test_console_blocks_give_commands_and_outputs():
    found = console("```console\n$ a \\\n    b\none\n$ c\n```\n")
    assert [(item.command, item.output) for item in found] == [("a b", "one\n"), ("c", "")]


def test_an_output_that_changed_is_found():
    digest = re.compile(r"[0-9a-f]{12}")
    assert matches("secret/a created\n...\nlast 0123456789ab\n", "secret/a created\nb\nc\nlast ba9876543210\n", digest)
    assert not matches("secret/a created\n", "secret/b created\n", digest)
    assert not matches("secret/a created\n", "secret/a created\nsecret/b created\n", digest)
