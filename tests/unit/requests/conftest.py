"""Stores are in memory, except in tests that start processes or let threads race."""

from datetime import UTC, datetime

import pytest

from tests.support.manual_clock import ManualClock
from tests.support.memory_s3 import memory_s3, store

__all__ = ["memory_s3", "store"]


@pytest.fixture
def clock():
    return ManualClock(datetime(2026, 1, 31, 9, tzinfo=UTC))


@pytest.fixture
def ledger(store, clock):
    from salun_core.requests.ledger import Ledger

    return Ledger(store, clock)
