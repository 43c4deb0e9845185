"""The core imports neither the laboratory nor the examples, by name included; the laboratory's verbs are optional."""

import ast
import importlib.metadata
import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import salun_core
from salun_core.cli import verbs
from salun_core.errors import UsageError

CORE = Path(salun_core.__file__).parent
ABOVE = re.compile(r"(lab|examples|components|pipelines|tests)([.:]|$)")
OBJECT = re.compile(r"[a-z_]+[.:][\w.:]*\w(?<!\.md)(?<!\.py)")  # package.module, package:object; not a file
LOADERS = {"import_module", "__import__", "find_spec", "run_module", "files"}


def _named(node):
    """Return the beginning of a text, also of an f-string."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _reaches_above(text):
    """Return the places at which a module names a package above the core, to import it or to hand it to a loader."""
    for node in ast.walk(ast.parse(text)):
        found = []
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [f"{node.module}"]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found = [_named(node.args[0])] if called in LOADERS else []
        elif OBJECT.fullmatch(_named(node)):
            found = [_named(node)]
        yield from ((node.lineno, name) for name in found if ABOVE.match(name))


def test_the_core_names_no_package_above_it():
    found = {
        (str(path.relative_to(CORE)), *place)
        for path in sorted(CORE.rglob("*.py"))
        for place in _reaches_above(path.read_text("utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import lab",
        "from lab.bench import suite",
        "importlib.import_module(f'examples.{name}')",
        "import_module('lab')",
        "find_spec('examples')",
        "ROWS = {'class': 'lab.bench.suite:Suite'}",
        "runpy.run_module('examples.demo')",
    ],
)
def test_each_way_to_reach_above_is_found(text):
    assert list(_reaches_above(text))


@pytest.mark.parametrize("text", ["import labels", "x = 'tests.'", "f(label='lab')", "y = 'examples of a class.'"])
def test_other_words_are_not(text):
    assert not list(_reaches_above(text))


def _offered(monkeypatch, **points):
    given = EntryPoints(EntryPoint(name.replace("_", "."), value, verbs.GROUP) for name, value in points.items())
    monkeypatch.setattr(verbs, "_entry_points", lambda: given)
    return verbs.added_verbs()


def test_a_verb_whose_package_is_not_installed_is_absent(monkeypatch):
    known = {"bench": "lab.cli.bench:BenchGroup", "bench_run": "lab.cli.bench:run"}
    groups, found = _offered(monkeypatch, **known, swim="no_such_package.cli:swim", store="lab.no_such_module:GROUP")
    assert (groups.keys(), found.keys()) == ({"bench"}, {"bench run"})


def test_a_broken_verb_says_why_in_one_line_and_leaves_the_others(monkeypatch, tmp_path):
    (tmp_path / "broken_lab.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"swim": "broken_lab:SwimGroup", "swim_far": "broken_lab:far", "dive": "lab.cli.bench:dive"}
    groups, found = _offered(monkeypatch, **names, calibrate="lab.cli.bench:calibrate")
    assert (groups, found.keys()) == ({}, {"swim far", "dive", "calibrate"})
    for verb, why in {"swim far": "No module named 'no_such_library'", "dive": "no attribute 'dive'"}.items():
        with pytest.raises(UsageError) as raised:
            found[verb]()
        assert f"salun {verb} cannot be loaded" in str(raised.value)
        assert why in str(raised.value)
        assert "\n" not in str(raised.value)


def test_other_distributions_add_no_verb(monkeypatch, tmp_path):
    folder = tmp_path / "swimmer-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: swimmer\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{verbs.GROUP}]\nswim = swimmer:swim\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [point.name for point in importlib.metadata.entry_points(group=verbs.GROUP) if point.name == "swim"]
    assert "swim" not in verbs.added_verbs()[1]


def test_without_an_installation_there_are_only_the_verbs_of_the_core(monkeypatch):
    monkeypatch.setattr(verbs, "DISTRIBUTION", "no-such-distribution")
    assert verbs.added_verbs() == ({}, {})
