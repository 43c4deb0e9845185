from datetime import UTC, datetime

import pytest

from tests.support.manual_clock import ManualClock


@pytest.fixture
def clock():
    return ManualClock(datetime(2026, 1, 31, 9, tzinfo=UTC))


@pytest.fixture
def ledger(store, clock):
    from salun_core.requests.ledger import Ledger

    return Ledger(store, clock)
