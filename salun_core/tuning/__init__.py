"""Search for a method's settings within a budget, measured on held-out data, without a retrained model."""

from salun_core.tuning.budget import Budget, TrialRecord, TuningLog, parse_budget
from salun_core.tuning.objective import ConstraintResult, Sets
from salun_core.tuning.search import Problem, Tuned, tune

__all__ = [
    "Budget",
    "ConstraintResult",
    "Problem",
    "Sets",
    "TrialRecord",
    "Tuned",
    "TuningLog",
    "parse_budget",
    "tune",
]
