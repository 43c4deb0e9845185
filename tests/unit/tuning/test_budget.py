"""Budgets: passes, wall clock, epochs."""

import pytest

from salun_core.errors import UsageError
from salun_core.tuning.budget import parse_budget


@pytest.mark.parametrize(
    ("text", "passes", "seconds"),
    [("200000", 200_000, None), ("20e", 30_000, None), ("0.5e", 750, None), ("90s", None, 90), ("1.5h", None, 5400)],
)
def test_forms(text, passes, seconds):
    budget = parse_budget(text, 1500)
    assert (budget.passes, budget.seconds, budget.text) == (passes, seconds, text)


@pytest.mark.parametrize("text", ["", "0", "0e", "-5", "ten", "5 m", "1e9x", "20E"])
def test_other_forms_are_refused(text):
    with pytest.raises(UsageError, match="is not a budget"):
        parse_budget(text, 1500)


def test_passes_bound_to_the_last_one_and_a_clock_by_itself():
    assert parse_budget("100", 10).allows(100)
    assert not parse_budget("100", 10).allows(101)
    assert parse_budget("1h", 10).allows(10**12)
    assert parse_budget("100", 10).used(25) == 0.25
    assert 0 < parse_budget("1h", 10).used(10**12) < 0.01
    assert not parse_budget("0.0001s", 10).allows(1) or not parse_budget("0.0000001s", 10).allows(1)
