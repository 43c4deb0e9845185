"""A real classifier of digits, trained once for all workers. Imported late: many tests need no torch."""

import copy

import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    from tests.support.lab import load_lab

    return load_lab(tmp_path_factory)


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
