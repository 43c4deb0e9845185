"""Times in UTC, the month in which a request is due, and the type of a clock that callers pass in."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import UTC, datetime

from salun_core.errors import UsageError

Clock = Callable[[], datetime]
"""Returns the time now, with its time zone."""


def utc_clock() -> datetime:
    """Return the time of this machine in UTC."""
    return datetime.now(UTC)


def utc_now() -> str:
    """Return the time in UTC as ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def as_utc(moment: datetime) -> datetime:
    """Return a time in UTC; raises UsageError if it has no time zone."""
    if moment.tzinfo is None:
        raise UsageError(f"the time {moment.isoformat()} has no time zone", "", "add one, such as +00:00 or Z")
    return moment.astimezone(UTC)


def parse_moment(text: str) -> datetime:
    """Read a date or time in ISO 8601; without a time zone it is in UTC, and a date is its midnight."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{text[:80]!r} is not a date or time", "", "write 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from error


def due_after_one_month(received: datetime) -> datetime:
    """Return the end of the month that GDPR Art. 12(3) gives, in UTC.

    It is the same day and time in the next month, or the last day of that month if it is shorter. Raises UsageError if
    `received` has no time zone or lies at the end of the calendar.
    """
    received = as_utc(received)
    year, month = (received.year + 1, 1) if received.month == 12 else (received.year, received.month + 1)
    if year > datetime.max.year:
        raise UsageError(f"the time {received.isoformat()} is too late", "the calendar ends there", "correct it")
    return received.replace(year=year, month=month, day=min(received.day, calendar.monthrange(year, month)[1]))
