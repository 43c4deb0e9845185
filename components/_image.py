"""The image of every step, and the settings that all components share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kfp import dsl

IMAGE = os.environ.get("SALUN_IMAGE") or "salun:0.1.0"


def component(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - kfp's component object, which has no types
    """Turn a function into a component that runs in the project's image and installs nothing.

    Args:
        function: only its source is in the compiled pipeline, so it imports what it needs inside its body.

    Returns:
        The component.

    `SALUN_IMAGE` at compile time names the image; a release names it by digest.
    """
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)
