from datetime import UTC, datetime, timedelta

import pytest


class ManualClock:
    """A clock that stands still until it is set."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now

    def tick(self, **delta):
        self.now += timedelta(**delta)


@pytest.fixture
def clock():
    return ManualClock(datetime(2026, 1, 31, 9, tzinfo=UTC))


@pytest.fixture
def ledger(store, clock):
    from salun_core.requests.ledger import Ledger

    return Ledger(store, clock)
