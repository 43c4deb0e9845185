"""Cron expressions as the scheduler of Kubeflow Pipelines reads them."""

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.cron import parse_cron
from salun_core.errors import UsageError

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


def slots(text, days=14):
    """The slots of two weeks from a Monday, as day.hour:minute; the seconds are those of the field."""
    cron = parse_cron(text)
    second = min(cron.values[0])
    minutes = (MONDAY + timedelta(minutes=number, seconds=second) for number in range(days * 24 * 60))
    return [f"{when:%d.%H:%M}" for when in minutes if cron.matches(when)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 0 2 * * MON", ["23.02:00", "30.02:00"]),
        ("0 0 2 ? * 1", ["23.02:00", "30.02:00"]),
        ("5 30 23 24 NOV ?", ["24.23:30"]),
        ("0 0 12 24 * tue-wed", ["24.12:00", "25.12:00", "01.12:00", "02.12:00"]),  # the day or one of the weekdays
        ("0 0 12 25 * mon", ["23.12:00", "25.12:00", "30.12:00"]),
        ("0 0/30 22-23 23 11 *", ["23.22:00", "23.22:30", "23.23:00", "23.23:30"]),
        ("0 10-20/5 1,3 23 11 *", ["23.01:10", "23.01:15", "23.01:20", "23.03:10", "23.03:15", "23.03:20"]),
    ],
)
def test_slots(text, expected):
    assert slots(text) == expected


def test_the_slots_of_a_window_include_both_ends():
    start = datetime(2026, 11, 23, 1, 59, 59, 999, tzinfo=UTC)
    found = parse_cron("*/2 * * * * *").slots(start, start + timedelta(seconds=5))
    assert [when.second for when in found] == [0, 2, 4]
    assert parse_cron("0 0 2 * * *").slots(start, start + timedelta(seconds=1)) == [MONDAY + timedelta(hours=2)]
    assert parse_cron("0 0 2 * * *").slots(start + timedelta(seconds=2), start + timedelta(seconds=60)) == []


@pytest.mark.parametrize(
    "text",
    ["", "* * * * *", "60 * * * * *", "* * * 0 * *", "* * * * 13 *", "* * * * foo *", "*/0 * * * * *", "5-1 * * * * *"]
    + ["*-5 * * * * *", "1- * * * * *", "1//2 * * * * *", "1,,2 * * * * *", "-1 * * * * *", "* * * * * fri-mon"]
    + ["* * * L * *", "* * * 1W * *", "* * * * * 1#2", "\u0663 * * * * *", "* * * * * * *"],
)
def test_what_the_scheduler_refuses(text):
    with pytest.raises(UsageError, match="is not a schedule of a recurring run"):
        parse_cron(text)
