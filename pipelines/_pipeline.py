"""The one place that turns a function into a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfp import dsl


def pipeline(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function into a pipeline; its docstring is what the run form shows.

    Args:
        name: of the pipeline.

    Returns:
        The decorator, whose result is kfp's component object.
    """

    def decorate(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - kfp has no types
        return dsl.pipeline(name=name, description=(function.__doc__ or "").splitlines()[0])(function)

    return decorate
