"""Saliency unlearning (SalUn): masks, methods, evaluation, gate and lineage, without kfp.

The functions for own programs are in `salun_core.api`, and are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salun_core.api import evaluate as evaluate
    from salun_core.api import load as load
    from salun_core.api import mask as mask
    from salun_core.api import publish as publish
    from salun_core.api import save as save
    from salun_core.api import sets as sets
    from salun_core.api import unlearn as unlearn

__all__ = ["evaluate", "load", "mask", "publish", "save", "sets", "unlearn"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a name on first use: commands that only read the store need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import salun_core.api

    return getattr(salun_core.api, name)
