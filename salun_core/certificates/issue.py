"""Issues erasure certificates: collects the facts, checks that they belong together, signs and stores."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from salun_core.certificates.envelope import claimed_keyid, keyid
from salun_core.certificates.keys import load_signing_key
from salun_core.certificates.statement import (
    DISPOSAL_TYPE,
    ERASURE_TYPE,
    LIMITS,
    STATEMENT_TYPE,
    CertifiedMetric,
    DisposalAddendum,
    DisposalDone,
    DisposalDue,
    Disposals,
    ErasureCertificate,
    open_statement,
    sign_statement,
)
from salun_core.config import Document, parse
from salun_core.digest import check_digest, digest_json, sha256_bytes
from salun_core.errors import ConflictError, GateRefusedError, IntegrityError, UsageError
from salun_core.registry.lookup import Version, read_file
from salun_core.registry.manifest import VersionManifest, parse_stored, weights_digest
from salun_core.requests.schema import DeletionRequest, Outcome
from salun_core.storage.keys import addendum_key, certificate_key
from salun_core.storage.objects import ObjectStore, StoredObject
from salun_core.sweeps.context import Erased

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from salun_core.evaluation.evidence import Evidence


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


__all__ = ["DisposalDone", "Disposals", "Facts", "build_statement", "certify", "issue", "issue_addendum"]

_ATTEMPTS = 8


def certify(facts: Facts, signer: Ed25519PrivateKey) -> bytes:
    """Return a signed certificate: the bytes of its file; see `build_statement`."""
    return sign_statement(build_statement(facts, keyid(signer.public_key())), signer)


def issue(store: ObjectStore, facts: Facts, signer: Ed25519PrivateKey) -> str:
    """Write the certificate of a request; the call may be repeated.

    One that this key signed for the same version and outcome is kept. Any other is moved to the addenda first, and
    the new one says which it supersedes.

    Args:
        store: where.
        facts: what it is made from.
        signer: the signing key.

    Returns:
        The SHA-256 of the certificate's file.

    Raises:
        IntegrityError: the facts contradict each other, or the certificate that is there is damaged.
        GateRefusedError: the gate refused the version.
        ConflictError: others wrote the certificate again and again meanwhile.
    """
    key = certificate_key(facts.request.id)
    for _ in range(_ATTEMPTS):
        stored = store.get(key)
        if stored and _says_the_same(stored.data, facts, signer):
            return sha256_bytes(stored.data)
        try:
            return _write(store, key, stored, facts, signer)
        except ConflictError:
            continue  # another settle of the same request was faster: look at what it wrote
    raise ConflictError(f"{key} is written by others", "each time before we could", "settle the request again")


def _says_the_same(data: bytes, facts: Facts, signer: Ed25519PrivateKey) -> bool:
    public = signer.public_key()
    if claimed_keyid(data) != keyid(public):
        return False
    source = f"the certificate of request {facts.request.id}"
    found = open_statement(ErasureCertificate, data, [public], source).predicate
    if found.request.id != facts.request.id:
        raise IntegrityError(f"{source} is of another request", "it was copied or moved", "restore the right one")
    return (found.model.version, found.outcome) == (facts.version, facts.outcome)


def _write(store: ObjectStore, key: str, stored: StoredObject | None, facts: Facts, signer: Ed25519PrivateKey) -> str:
    if stored is None:
        data = certify(facts, signer)
        store.put_new(key, data)
        return sha256_bytes(data)
    old = sha256_bytes(stored.data)
    data = certify(replace(facts, supersedes=old), signer)
    store.put_new(addendum_key(facts.request.id, f"certificate-{old[:12]}.json"), stored.data)
    store.put_if(key, data, stored.etag)
    return sha256_bytes(data)


def issue_addendum(store: ObjectStore, request_id: str, done: Sequence[DisposalDone], signer: Ed25519PrivateKey) -> str:
    """Add to a request's certificate what was deleted since; the same facts give the same addendum.

    Args:
        store: where.
        request_id: the request.
        done: what was deleted, and when.
        signer: the signing key.

    Returns:
        The SHA-256 of the addendum's file.

    Raises:
        UsageError: the request has no certificate, or `done` is empty.
        ConflictError: an addendum of that name holds other bytes.
    """
    stored = store.get(certificate_key(request_id))
    if stored is None:
        raise UsageError(f"request {request_id} has no certificate", "none was issued yet", "settle the request first")
    subject = {"name": f"{request_id}.json", "digest": {"sha256": sha256_bytes(stored.data)}}
    predicate = {"request": request_id, "done": tuple(done), "signer": keyid(signer.public_key())}
    addendum = parse(
        DisposalAddendum,
        {"_type": STATEMENT_TYPE, "predicateType": DISPOSAL_TYPE, "subject": [subject], "predicate": predicate},
        f"the addendum to the certificate of request {request_id}",
    )
    data = sign_statement(addendum, signer)
    store.put_new(addendum_key(request_id, f"disposal-{sha256_bytes(addendum.canonical())[:12]}.json"), data)
    return sha256_bytes(data)


COMMIT_VARIABLE, IMAGE_VARIABLE = "SALUN_COMMIT", "SALUN_IMAGE_DIGEST"
_EVIDENCE, _DECISION, _CARD = "evidence.json", "decision.json", "model.json"
_DUE_HOURS = {"forget data of the run": 24, "masks": 30 * 24, "weights of the superseded version": 30 * 24}


class ModelCertifier:
    """Issues certificates about versions of a model line, signed with the key that the environment names.

    Args:
        store: where versions lie and certificates go.
        key: file of the signing key; by default the one that $SALUN_SIGNING_KEY names.
    """

    def __init__(self, store: ObjectStore, key: Path | None = None) -> None:
        self._store, self._key = store, key
        self._files: dict[str, dict[str, bytes]] = {}

    @cached_property
    def signer(self) -> Ed25519PrivateKey:
        """The signing key, read when it is first needed.

        Raises:
            UsageError: there is none, or it is no ed25519 key.
        """
        return load_signing_key(self._key)

    def certify(self, erased: Erased) -> str:
        """Write the certificate of one request; see `requests.certificate.issue`."""
        return issue(self._store, self._facts(erased), self.signer)

    def _facts(self, erased: Erased) -> Facts:
        ran = erased.outcome is not Outcome.NOTHING_TO_ERASE
        documents = self._documents(erased.version)
        record, member = erased.record, erased.member
        if record is not None:  # the sealed document of a forget set is its canonical JSON: both digests are one
            forgotten = erased.version.manifest.forget_set_digest or ""
            check_digest("what the run has forgotten, against what was claimed,", record.forget_sha256, forgotten)
        return Facts(
            request=erased.request,
            outcome=erased.outcome,
            completed_at=erased.completed_at,
            version=erased.version.digest,
            manifest=erased.version.manifest,
            split_digest=str(json.loads(documents[_CARD])["split_digest"]),
            forget_digest=member.forget_digest,
            salt=member.salt,
            found=member.found,
            named=member.named,
            attempt=member.attempt,
            rung=record.rung if record else 0,
            run=record.run if record else None,
            epoch=record.epoch if record else None,
            evidence=_evidence(documents) if ran else None,
            decision=_decision(documents) if ran else None,
            disposals=_disposals(erased.completed_at) if ran else Disposals(),
            code_commit=os.environ.get(COMMIT_VARIABLE) or None,
            image_digest=os.environ.get(IMAGE_VARIABLE) or None,
        )

    def _documents(self, version: Version) -> dict[str, bytes]:
        """Return the small files of a version, checked against its manifest; those of the last one are kept."""
        if version.digest not in self._files:
            names = [name for name in (_EVIDENCE, _DECISION, _CARD) if name in version.manifest.files]
            self._files = {version.digest: {name: read_file(self._store, version, name) for name in names}}
        return self._files[version.digest]


def _evidence(documents: dict[str, bytes]) -> Any:  # noqa: ANN401 - Evidence, whose package loads torch
    from salun_core.evaluation import Evidence

    kind: type[Document] = Evidence
    return parse_stored(kind, documents[_EVIDENCE], _EVIDENCE)


def _decision(documents: dict[str, bytes]) -> dict[str, Any]:
    decision = json.loads(documents[_DECISION])
    assert isinstance(decision, dict)
    return decision


def _disposals(completed_at: str) -> Disposals:
    start = datetime.fromisoformat(completed_at)
    due = [
        DisposalDue(what=what, by=(start + timedelta(hours=hours)).isoformat()) for what, hours in _DUE_HOURS.items()
    ]
    return Disposals(due=tuple(due))
