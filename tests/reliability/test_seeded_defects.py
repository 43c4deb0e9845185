"""The harness itself: each seeded defect is caught, every time, and the product comes through the same schedules."""

import pytest

from tests.reliability.mutants import MUTANTS
from tests.reliability.schedules import SCHEDULES, judge

pytestmark = pytest.mark.s3
CAUGHT_AS = {
    "HEAD is put without its condition": "resurrected",
    "the swap is retried on a conflict": "resurrected",
    "nobody checks the parent": "resurrected",
    "the pointer goes before the files": "torn",
    "events are put without their condition": "twice",
    "a refused write is not read back": "false_conflicts",
    "a lease runs out by the worker's clock": "early",
    "the event goes before the state": "lost",
    "a run is settled by its word": "false_certificates",
}


def test_every_defect_has_a_schedule():
    assert set(MUTANTS) == set(SCHEDULES) == set(CAUGHT_AS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_defect_is_caught(store, name):
    assert CAUGHT_AS[name] in judge(store.uri, name, name).faults


@pytest.mark.parametrize("name", MUTANTS)
def test_the_product_comes_through(store, name):
    assert judge(store.uri, name, None).faults == {}
