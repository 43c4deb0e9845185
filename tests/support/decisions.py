"""Decisions of the gate, without the evidence that it would make them on."""

from __future__ import annotations

from salun_core.gate import Assurance, GateDecision, Refusal, Verdict

PROCEDURE = Assurance(level="procedure")
_FIELDS = {"policy": "toys", "policy_digest": "0" * 64, "evidence_digest": "0" * 64}


def passed(**figures: object) -> GateDecision:
    """Return a decision that passed, of the level `procedure` unless another one is given."""
    return GateDecision.model_validate(
        {**_FIELDS, "passed": True, "summary": "all checks hold", "level": "procedure", "verdicts": [], **figures}
    )


def refused(*causes: str, then: str = "mend {cause}") -> GateDecision:
    """Return a refusal in which one rule failed for each cause."""
    verdicts = [Verdict(rule="fine", threshold="any", passed=True, reason="holds")]
    for cause in causes:
        refusal = Refusal.model_validate(
            {"words": "a rule", "figures": "some", "cause": cause, "next": then.format(cause=cause)}
        )
        verdicts.append(Verdict(rule="a rule", threshold="more", passed=False, reason="too few", refusal=refusal))
    return GateDecision.model_validate({**_FIELDS, "passed": False, "summary": "refused", "verdicts": verdicts})
