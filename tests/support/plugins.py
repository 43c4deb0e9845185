"""Packages with plug-ins that lie in a folder as pip installs them: modules, and a `.dist-info` with entry points."""

import shutil
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest

from salun_core import plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


def install_example(folder):
    """Install examples/plugin into a folder."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copy(EXAMPLE / "salun_example.py", folder)
    return write_metadata(folder, project["name"], project["version"], project["entry-points"])


def write_metadata(folder, name, version, groups):
    """Write what importlib.metadata reads of an installed package.

    Args:
        folder: on the module path.
        name: of the distribution.
        version: of it.
        groups: entry points by group: name -> package:object.
    """
    info = Path(folder) / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info


@contextmanager
def package(folder, monkeypatch, allowed=""):
    """Put a folder on the module path, allow what it holds, and forget its modules afterwards."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv(plugins.ALLOWED_VARIABLE, allowed)
    before, known = set(sys.modules), dict(plugins._loaded)
    try:
        yield folder
    finally:
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        plugins._loaded.clear()
        plugins._loaded.update(known)


@pytest.fixture
def example(tmp_path_factory, monkeypatch):
    """examples/plugin, installed in a folder on the module path and allowed."""
    folder = tmp_path_factory.mktemp("plugins")
    install_example(folder)
    with package(folder, monkeypatch, "salun-example"):
        yield folder
