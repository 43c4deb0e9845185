"""Cron expressions of six fields, as the scheduler of Kubeflow Pipelines reads them (robfig/cron, version 1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from salun_core.errors import UsageError

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("weekday", 0, 6, _DAYS),
)
_RANGE = re.compile(r"(\*|\?|[0-9a-z]+)(?:-([0-9a-z]+))?(?:/(\d+))?")
_QUARTZ = re.compile(r"[LW#]")


@dataclass(frozen=True)
class Cron:
    """A schedule in UTC; `values` are the matching seconds, minutes, hours, days, months and weekdays.

    `any_day` is whether day or weekday is a star: then both must match, else one of them.
    """

    text: str
    values: tuple[frozenset[int], ...]
    any_day: bool

    def matches(self, when: datetime) -> bool:
        """Return whether a slot begins in a second."""
        weekday = when.isoweekday() % 7
        second, minute, hour, day, month, week = (
            part in found
            for part, found in zip(
                (when.second, when.minute, when.hour, when.day, when.month, weekday), self.values, strict=True
            )
        )
        days = (day and week) if self.any_day else (day or week)
        return second and minute and hour and month and days

    def slots(self, start: datetime, end: datetime) -> list[datetime]:
        """Return the slots from one second to another, both included; it looks at each second in between."""
        first = start.astimezone(UTC).replace(microsecond=0)
        seconds = int((end - first).total_seconds()) + 1
        return [when for number in range(seconds) if self.matches(when := first + timedelta(seconds=number))]


def parse_cron(text: str) -> Cron:
    """Read a cron expression of six fields, seconds first; UsageError for what Kubeflow's scheduler refuses."""
    fields = text.split()
    if len(fields) != len(_FIELDS):
        near = f"did you mean '0 {text}'? " if len(fields) == len(_FIELDS) - 1 else ""
        why = f"it has {len(fields)} fields; six are needed: second minute hour day month weekday"
        raise _refusal(text, why, near)
    values = tuple(_values(text, field, *about) for field, about in zip(fields, _FIELDS, strict=True))
    return Cron(text, values, any(field.startswith(("*", "?")) for field in (fields[3], fields[5])))


def _values(text: str, field: str, name: str, least: int, most: int, words: Sequence[str]) -> frozenset[int]:
    found: set[int] = set()
    for item in field.lower().split(","):
        match = _RANGE.fullmatch(item)
        numbers = [_number(part, words, least) for part in match.groups()[:2]] if match else [None, None]
        if match is None or (match[2] and numbers[1] is None) or (match[1] not in ("*", "?") and numbers[0] is None):
            why = f"{field!r} is not valid as {name}"
            if _QUARTZ.search(field):
                why += "; Kubeflow's scheduler knows no L, W and #"
            raise _refusal(text, why)
        star, step = match[1] in ("*", "?"), int(match[3] or 1)
        first = least if star else int(numbers[0] or 0)
        last = most if star or (match[3] and numbers[1] is None) else first if numbers[1] is None else numbers[1]
        if first < least or last > most or first > last or step < 1 or (star and match[2]):
            raise _refusal(text, f"{field!r} is not valid as {name}: {least} to {most}, lower end first")
        found |= set(range(first, last + 1, step))
    return frozenset(found)


def _number(text: str | None, words: Sequence[str], least: int) -> int | None:
    if text in words:
        return words.index(str(text)) + least
    return int(text) if text and text.isdecimal() and text.isascii() else None


def _refusal(text: str, why: str, near: str = "") -> UsageError:
    what = f"{text!r} is not a schedule of a recurring run"
    return UsageError(what, why, f"{near}for example --cron '0 0 2 * * *'")
