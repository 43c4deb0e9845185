"""Runs the command in this process, and leaves no settings behind."""

from __future__ import annotations

import logging
import os

import pytest
import structlog
from typer.testing import CliRunner

from salun_core.cli.app import app
from salun_core.cli.output import MODE


@pytest.fixture(autouse=True)
def _settings_restored():
    """The command sets up logs and variables for its process; the runner's streams are closed after each call."""
    root = logging.getLogger()
    handlers, level, variables = root.handlers[:], root.level, dict(os.environ)
    yield
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    MODE.json = MODE.debug = False


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])
