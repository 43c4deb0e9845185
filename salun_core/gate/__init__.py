"""The gate: policy + evidence -> decision with a verdict per rule. It fails closed.

Some checks are enforced under every policy: the digests are the expected ones, the forget set is not empty,
the model changed, its weights are finite, and the weights outside the mask kept their bits.
"""

from salun_core.gate.decision import DECISION, Expected, GateDecision, decide
from salun_core.gate.levels import LEVELS, Assurance, LevelWords
from salun_core.gate.policy import (
    Kind,
    Level,
    Policy,
    Relative,
    Rule,
    default_policy,
    load_policy,
    policy_of_images,
    shipped_policies,
)
from salun_core.gate.refusal import Cause, Refusal, Verdict

__all__ = [
    "DECISION",
    "LEVELS",
    "Assurance",
    "Cause",
    "Expected",
    "GateDecision",
    "Kind",
    "Level",
    "LevelWords",
    "Policy",
    "Refusal",
    "Relative",
    "Rule",
    "Verdict",
    "decide",
    "default_policy",
    "load_policy",
    "policy_of_images",
    "shipped_policies",
]
