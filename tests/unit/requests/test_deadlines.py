from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.config import parse
from salun_core.errors import UsageError
from salun_core.requests.schema import DeletionRequest, Status, is_overdue
from salun_core.times import as_utc, due_after_one_month, parse_moment, utc_clock


@pytest.mark.parametrize(
    ("received", "due"),
    [
        ("2026-01-01", "2026-02-01"),
        ("2026-01-28", "2026-02-28"),
        ("2026-01-29", "2026-02-28"),
        ("2026-01-30", "2026-02-28"),
        ("2026-01-31", "2026-02-28"),
        ("2028-01-28", "2028-02-28"),
        ("2028-01-29", "2028-02-29"),
        ("2028-01-30", "2028-02-29"),
        ("2028-01-31", "2028-02-29"),
        ("2000-01-31", "2000-02-29"),
        ("2100-01-31", "2100-02-28"),
        ("2026-02-28", "2026-03-28"),
        ("2028-02-29", "2028-03-29"),
        ("2026-03-31", "2026-04-30"),
        ("2026-04-30", "2026-05-30"),
        ("2026-05-31", "2026-06-30"),
        ("2026-07-31", "2026-08-31"),
        ("2026-08-31", "2026-09-30"),
        ("2026-10-31", "2026-11-30"),
        ("2026-12-01", "2027-01-01"),
        ("2026-12-31", "2027-01-31"),
        ("2026-01-31T23:59:59.999999Z", "2026-02-28T23:59:59.999999Z"),
    ],
)
def test_due_after_one_calendar_month(received, due):
    assert due_after_one_month(parse_moment(received)) == parse_moment(due)


def test_the_month_is_counted_in_utc():
    late_evening = datetime(2026, 1, 31, 22, tzinfo=timezone(-timedelta(hours=5)))  # 1 February, 03:00 in UTC
    assert due_after_one_month(late_evening) == datetime(2026, 3, 1, 3, tzinfo=UTC)


@given(st.datetimes(datetime(1900, 1, 1), datetime(9999, 11, 30), timezones=st.just(UTC)))
def test_a_month_has_28_to_31_days_and_ends_in_the_next(received):
    due = due_after_one_month(received)
    assert timedelta(days=28) <= due - received <= timedelta(days=31)
    assert (due.year * 12 + due.month) - (received.year * 12 + received.month) == 1
    assert due.timetz() == received.timetz()
    last_day = (due + timedelta(days=1)).day == 1
    assert due.day == received.day or (last_day and due.day < received.day)


@given(st.datetimes(datetime(1900, 1, 1), datetime(9998, 1, 1), timezones=st.just(UTC)), st.timedeltas(timedelta(0)))
def test_a_later_request_is_never_due_earlier(received, later):
    try:
        second = received + later
        due = due_after_one_month(second)
    except (OverflowError, UsageError):
        return
    assert due_after_one_month(received) <= due


@pytest.mark.parametrize("text", ["", "soon", "2026-02-30", "2026-13-01", "31.01.2026"])
def test_an_invalid_time_is_refused(text):
    with pytest.raises(UsageError, match="2026-01-31"):
        parse_moment(text)


def test_a_time_without_zone_is_utc_from_a_person_and_refused_from_code():
    assert parse_moment("2026-01-31 09:00") == datetime(2026, 1, 31, 9, tzinfo=UTC)
    assert parse_moment("2026-01-31T09:00+02:00") == datetime(2026, 1, 31, 7, tzinfo=UTC)
    with pytest.raises(UsageError, match="time zone"):
        as_utc(datetime(2026, 1, 31))
    assert utc_clock().utcoffset() == timedelta(0)


def test_the_end_of_the_calendar_is_refused():
    with pytest.raises(UsageError, match="too late"):
        due_after_one_month(datetime(9999, 12, 1, tzinfo=UTC))


REQUEST = parse(
    DeletionRequest,
    {
        "id": "r",
        "model_line": "faces",
        "target": {"kind": "subject", "subject_ref": "s"},
        "received_at": "2026-01-31T09:00:00+00:00",
        "due_at": "2026-02-28T09:00:00+00:00",
    },
    "request",
)
OPEN = {Status.RECEIVED, Status.ON_HOLD, Status.QUEUED, Status.IN_PROGRESS, Status.FAILED}


@pytest.mark.parametrize("status", Status)
def test_only_unsettled_requests_become_overdue_and_a_hold_does_not_stop_the_clock(status):
    moment = timedelta(microseconds=1)
    assert is_overdue(REQUEST, status, REQUEST.due + moment) == (status in OPEN)
    assert not is_overdue(REQUEST, status, REQUEST.due)
    assert not is_overdue(REQUEST, status, REQUEST.received)
