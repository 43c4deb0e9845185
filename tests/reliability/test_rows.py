"""Reliability at quick size: `make reliability` runs the same at full size."""

import subprocess
import sys

import pytest

from tests.reliability import faults, rows

pytestmark = pytest.mark.s3


HEAVY = {"torch", "sklearn", "pyarrow", "matplotlib"}


def test_a_worker_needs_nothing_heavy():
    code = f"import sys, tests.reliability.worker; print(*{HEAVY!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def holds(figures):
    assert figures.verdict.faults == {}
    assert figures.passed, figures.more
    return figures


def test_ledger_under_kills(store):
    figures = holds(rows.ledger_under_kills(store.uri, workers=4, on=3, requests=30, kills=12, lease=1))
    assert figures.kills == 12


def test_lineage_under_kills(store):
    figures = holds(rows.lineage_under_kills(store.uri, workers=3, requests=10, kills=3))
    assert 1 <= figures.versions <= 6
    assert figures.polls > 10


def test_lost_replies(store):
    holds(faults.lost_replies(store.uri, 15))


def test_faulty_store(store):
    holds(faults.faulty_store(store.uri, requests=4, workers=2, backoff=0.05))


def test_late_workers(store):
    holds(rows.late_workers(store.uri, 3))


@pytest.mark.parametrize("large", [False, True])
def test_kills_in_a_publish(store, large):
    holds(rows.killed_publishes(store.uri, large))
