"""What `salun unlearn --tune` checks first and shows meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from salun_core.cli.output import say

if TYPE_CHECKING:
    from salun_core.steps.tuning import TuneWish
    from salun_core.unlearn.tuning import TrialRecord


def check_tuning(method: str, mask: Path | None, processes: int, policy: str) -> None:
    """Refuse what a search cannot do, before it starts.

    Raises:
        UsageError: a mask is given, several processes are asked for, the method has nothing to search for, or there
            is no such policy.
    """
    from salun_core.errors import UsageError
    from salun_core.steps.sources import check_policy
    from salun_core.unlearn.tuning.space import Space

    if mask is not None:
        raise UsageError("--tune and --mask exclude each other", "the search chooses the density", "leave out --mask")
    if processes > 1:
        raise UsageError("--tune takes one process", "trials follow each other", "leave out --processes")
    Space.of(method, {})
    check_policy(policy)


def show_trials(budget: str, policy: str) -> TuneWish:
    """Return the wish for a search that says a line a trial."""
    from salun_core.steps.tuning import TuneWish

    return TuneWish(budget, policy, lambda record: say(trial_line(record)))


def trial_line(record: TrialRecord) -> str:
    """Return one trial in one line."""
    settings = [
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in record.settings.items()
    ]
    settings += [f"density {record.density:g}"] if record.density is not None else []
    found = "no figures" if record.distance is None else f"distance {record.distance:.4f}"
    broken = f"; breaks {', '.join(record.refused)}" if record.refused else ""
    return f"trial {record.number}: {', '.join(settings)}, {record.epochs} epochs: {found}, {record.state}{broken}"
