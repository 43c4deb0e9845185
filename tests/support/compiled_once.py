"""Compiles each pipeline once for all tests that look at what becomes of it; kfp takes a second for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest

from pipelines import compile as compiling
from pipelines.packages import Package

_compile = compiling.compile_pipeline
_made: dict[str, Package] = {}


def _kept(pipeline: object, name: str) -> Package:
    if name not in _made:
        _made[name] = _compile(pipeline, name)
    return deepcopy(_made[name])


@pytest.fixture
def compiled_once(monkeypatch) -> Iterator[None]:
    """The compiler's packages are copies of those that it made before in this process, from the same source."""
    monkeypatch.setattr(compiling, "compile_pipeline", _kept)
