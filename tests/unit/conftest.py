"""A real classifier of digits, trained once a session. Imported late: many tests need no torch."""

import copy

import pytest


@pytest.fixture(scope="session")
def lab():
    from tests.support.lab import train_lab

    return train_lab()


@pytest.fixture(scope="session")
def forgotten_class(lab):
    """The class unlearned by SalUn: (model, mask, evidence)."""
    mask = lab.mask("class")
    model = lab.unlearn("class")
    return model, mask, lab.evidence("class", model, mask)


@pytest.fixture
def copy_of(lab):
    """A copy of the trained model that a test may damage."""
    return copy.deepcopy(lab.model)
