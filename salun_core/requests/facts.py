"""Collects what an erasure certificate attests, and refuses facts that do not belong together."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from salun_core.config import parse
from salun_core.digest import check_digest, digest_json
from salun_core.errors import GateRefusedError, IntegrityError
from salun_core.requests.schema import DeletionRequest, Outcome
from salun_core.requests.statement import (
    ERASURE_TYPE,
    LIMITS,
    STATEMENT_TYPE,
    CertifiedMetric,
    Disposals,
    ErasureCertificate,
)
from salun_core.storage.identity import weights_digest
from salun_core.storage.lineage import VersionManifest

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Evidence  # its package loads torch, which verifying needs not

_SHORT, _LONG = 128, 500
_MEASURED = tuple(name for name in CertifiedMetric.model_fields if name != "name")


def new_salt() -> str:
    """Return a random salt of 32 bytes, in hex."""
    return secrets.token_hex(32)


def salted_digest(salt: str, digest: str) -> str:
    """Return the digest of a forget set as a certificate shows it: HMAC-SHA256 of its 64 hex digits.

    Args:
        salt: the key, in hex.
        digest: SHA-256 of the request's own resolved `ForgetSet`.
    """
    return hmac.new(bytes.fromhex(salt), digest.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one certificate is made from. Of the request only its id and times are copied, never its target.

    Args:
        request: the request.
        outcome: how it was met.
        completed_at: when, ISO 8601 in UTC.
        version: digest of the version it was erased from; nothing to erase: of the one that was searched.
        manifest: that version's.
        split_digest: of that version's split manifest.
        forget_digest: SHA-256 of the request's own resolved forget set, not of its batch.
        found: samples of that set; 0 with nothing to erase.
        named: samples of the data set that the request names, in training or not.
        attempt: which try of the request, from 1.
        rung: which recipe of the ladder, from 0.
        run: the unlearning run.
        epoch: of the model line's lease.
        evidence: what was measured; None with nothing to erase.
        decision: the gate's, as plain JSON; None with nothing to erase.
        disposals: what was deleted, and what still must be.
        supersedes: SHA-256 of an earlier certificate of the request.
        environment: what to add to the evidence's own environment.
        code_commit: commit of the code that ran.
        image_digest: digest of the image that it ran in.
        salt: of the forget set's digest, in hex.
    """

    request: DeletionRequest
    outcome: Outcome
    completed_at: str
    version: str
    manifest: VersionManifest
    split_digest: str
    forget_digest: str
    found: int
    named: int
    attempt: int = 1
    rung: int = 0
    run: str | None = None
    epoch: int | None = None
    evidence: Evidence | None = None
    decision: Mapping[str, Any] | None = None
    disposals: Disposals = Disposals()
    supersedes: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    code_commit: str | None = None
    image_digest: str | None = None
    salt: str = field(default_factory=new_salt)


def build_statement(facts: Facts, signer: str) -> ErasureCertificate:
    """Lay out a certificate.

    Args:
        facts: what it is made from.
        signer: id of the key that will sign it.

    Raises:
        IntegrityError: the facts are not of one version, one run and one outcome.
        GateRefusedError: the gate refused; nothing is certified.
        ModelError: the version's files are no model.
        UsageError: a fact is missing or of the wrong form.
    """
    _check(facts)
    manifest, evidence = facts.manifest, facts.evidence
    ran = facts.outcome is not Outcome.NOTHING_TO_ERASE
    predicate = {
        "request": {
            **facts.request.model_dump(mode="json", include={"id", "received_at", "due_at"}),
            "completed_at": facts.completed_at,
        },
        "outcome": facts.outcome,
        "forgotten": {
            "digest": salted_digest(facts.salt, facts.forget_digest),
            "salt": facts.salt,
            "count": facts.found,
            "named": facts.named,
        },
        "model": {
            "line": manifest.line,
            "version": facts.version,
            "parent": manifest.parent if ran else None,
            "split": facts.split_digest,
        },
        "procedure": _procedure(facts, evidence) if evidence else None,
        "provenance": _provenance(facts),
        "metrics": _metrics(evidence) if evidence else None,
        "gate": _gate(facts.decision) if facts.decision else None,
        "disposals": facts.disposals,
        "debt": {
            "fraction": manifest.lineage.debt,
            "runs_since_training": manifest.lineage.runs_since_training,
        },
        "supersedes": facts.supersedes,
        "signer": signer,
        "statement": LIMITS,
    }
    subject = [{"name": name, "digest": {"sha256": entry.sha256}} for name, entry in sorted(manifest.files.items())]
    return parse(
        ErasureCertificate,
        {"_type": STATEMENT_TYPE, "predicateType": ERASURE_TYPE, "subject": subject, "predicate": predicate},
        f"the certificate of request {facts.request.id}",
    )


def _check(facts: Facts) -> None:
    """Refuse facts that do not belong together: what is signed cannot be taken back."""
    manifest, evidence, decision = facts.manifest, facts.evidence, facts.decision
    check_digest("the version's manifest", facts.version, manifest.digest)
    if manifest.line != facts.request.model_line:
        raise _contradiction(f"the request is about {facts.request.model_line}, the version is of {manifest.line}")
    if facts.outcome is Outcome.NOTHING_TO_ERASE:
        if evidence is not None or decision is not None or facts.found:
            raise _contradiction("nothing was erased, but there is evidence, a decision or a count of samples")
        return
    if evidence is None or decision is None or not facts.found:
        raise _contradiction("something was erased, but evidence, the decision or the count of samples is missing")
    if manifest.retrained != (facts.outcome is Outcome.RETRAINED):
        raise _contradiction(f"the outcome is {facts.outcome}, the version was made by {manifest.method}")
    weights = weights_digest({name: entry.sha256 for name, entry in manifest.files.items()})
    if evidence.measured.after != weights or evidence.run.method != manifest.method:
        raise _contradiction("the evidence was measured on another model than the version's")
    check_digest("the evidence that the gate judged", str(decision.get("evidence_digest")), evidence.digest)
    if decision.get("passed") is not True:
        raise GateRefusedError("nothing is certified", "the gate refused the version", "see its decision.json")


def _contradiction(why: str) -> IntegrityError:
    return IntegrityError("the facts of a certificate contradict each other", why, "nothing was signed; see the run")


def _procedure(facts: Facts, evidence: Evidence) -> dict[str, Any]:
    config = json.loads(json.dumps(evidence.run.config))
    return {
        "method": evidence.run.method,
        "config": config,
        "config_digest": digest_json(config),
        "seed": evidence.run.seed,
        "density": evidence.run.density,
        "mask_digest": evidence.measured.mask,
        "rung": facts.rung,
        "attempt": facts.attempt,
        "run": facts.run,
        "lease_epoch": facts.epoch,
    }


def _provenance(facts: Facts) -> dict[str, Any]:
    measured = facts.evidence.run.environment if facts.evidence else {}
    environment = {**measured, **facts.environment}
    return {
        "code_commit": facts.code_commit,
        "image_digest": facts.image_digest,
        "environment": {_plain(name, _SHORT): _plain(value, _LONG) for name, value in environment.items() if value},
    }


def _metrics(evidence: Evidence) -> list[dict[str, Any]]:
    return [
        {"name": _plain(name, _SHORT), **{key: _finite(getattr(metric, key)) for key in _MEASURED}}
        for name, metric in sorted(evidence.metrics.items())
    ]


def _gate(decision: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = [
        {
            "rule": _plain(item["rule"], _SHORT),
            "threshold": _plain(item["threshold"], _SHORT),
            "actual": _finite(item.get("actual")),
            "passed": item["passed"],
            "reason": _plain(item["reason"], _LONG),
        }
        for item in decision["verdicts"]
    ]
    names = ("policy_digest", "evidence_digest", "passed")
    return {"policy": _plain(decision["policy"], _SHORT), "verdicts": verdicts} | {n: decision[n] for n in names}


def _plain(text: str, limit: int) -> str:
    """Put a text of a policy or a machine on one line without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))[:limit]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
