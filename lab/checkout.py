"""Loads the examples of a checkout by name: they are not installed, and the core does not depend on them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from salun_core.errors import UsageError

_CHECKOUT = Path(__file__).resolve().parents[1]


def load_example(name: str) -> ModuleType:
    """Import a package or a module of `examples/`, such as `demo.__main__`.

    UsageError without the checkout or a library.
    """
    if not (_CHECKOUT / "examples" / "__init__.py").is_file():
        raise UsageError(
            f"the example {name.partition('.')[0]} is not installed",
            "examples are part of the source repository only",
            "clone the repository, run `make setup` in it, and use its .venv/bin/salun",
        )
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))  # first, because other projects install packages named `examples`
    try:
        return importlib.import_module(f"examples.{name}")
    except ImportError as error:
        raise UsageError(
            f"the example {name} cannot be loaded", str(error), "run `make setup`, which installs every extra"
        ) from error
