"""Issues erasure certificates: checks that the input belongs together, builds the statement, signs and stores it.

A request has one certificate at a time, `certificates/<request>.json`. Issuing may be repeated, and several processes
may settle the same request at once. The order of the writes is:

1. If another certificate is there (of another outcome, version or key), its bytes are copied to the addenda. The copy
   is created once; repeating it writes the same bytes. A process that dies here leaves a copy of the certificate that
   is still valid, and the next settle continues with step 2.
2. The new certificate is created, or replaces exactly the bytes that were read (ETag). If another process was faster,
   the write fails and the loop reads again: a certificate of the same version and outcome by this key is kept, although
   its time differs. That also covers a write whose reply was lost.

The request's `completed` event comes after the certificate, so a completed request always has one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    REVOCATION_TYPE,
    STATEMENT_TYPE,
    CertifiedMetric,
    DisposalAddendum,
    DisposalDone,
    ErasureCertificate,
    RevocationAddendum,
    contradictions,
    open_statement,
    read_unverified,
    sign_statement,
)
from salun_core.config import parse
from salun_core.data.forget_set import kind_of
from salun_core.digest import check_digest, digest_json, sha256_bytes
from salun_core.errors import ConflictError, GateRefusedError, IntegrityError, UsageError
from salun_core.gate import DECISION, Assurance, GateDecision
from salun_core.registry.lookup import Version, read_file
from salun_core.registry.manifest import weights_digest
from salun_core.registry.rollbacks import VersionRollback
from salun_core.requests.schema import DeletionRequest, Outcome
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import addenda_prefix, addendum_key, certificate_key
from salun_core.storage.objects import ObjectStore

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Evidence

COMMIT_VARIABLE, IMAGE_VARIABLE = "SALUN_COMMIT", "SALUN_IMAGE_DIGEST"
_EVIDENCE, _CARD = "evidence.json", "model.json"
_DUE_HOURS = {"forget data of the run": 24, "masks": 30 * 24, "weights of the superseded version": 30 * 24}
_MEASURED = tuple(name for name in CertifiedMetric.model_fields if name != "name")
_SHORT, _LONG = 128, 500  # lengths of ShortText and Text in the statement
_ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class CertificateInput:
    """What a sweep recorded about an erased request. Of the request only its id and times are copied, never its target.

    Args:
        version: the version that has forgotten it; nothing to erase: the one that was searched.
        forget_digest: SHA-256 of the request's own resolved forget set, not of its batch.
        salt: of that digest, in hex.
        found: samples of that set; 0 with nothing to erase.
        named: samples of the data set that the request names, in training or not.
        epoch: of the model line's lease.
        frozen_digest: SHA-256 of the frozen forget set that the run read.
        requests: how many requests the run erased together; None with nothing to erase.
    """

    request: DeletionRequest
    outcome: Outcome
    completed_at: str
    version: Version
    forget_digest: str
    salt: str
    found: int
    named: int
    attempt: int = 1
    level: int = 0
    run: str | None = None
    epoch: int | None = None
    frozen_digest: str | None = None
    requests: int | None = None

    def assurance(self, decision: GateDecision | None) -> Assurance:
        """Return how sure the outcome is; UsageError if the gate refused.

        The decision is None if the version was not unlearned.
        """
        if self.outcome is Outcome.NOTHING_TO_ERASE:
            return Assurance(level="nothing_to_erase")
        if decision is None:
            raise _contradiction("something was erased, but the gate's decision is missing")
        return decision.assurance(kind_of(self.request.target), self.requests)


@dataclass(frozen=True)
class VersionDocuments:
    """What certificates quote from the files of a version; evidence and decision are None if it was not unlearned."""

    split_digest: str
    evidence: Evidence | None = None
    decision: GateDecision | None = None

    @classmethod
    def read(cls, store: ObjectStore, version: Version) -> VersionDocuments:
        """Read them, checked against the version's manifest."""
        from salun_core.evaluation.evidence import Evidence  # its package loads torch

        names = [name for name in (_EVIDENCE, DECISION, _CARD) if name in version.manifest.files]
        data = {name: read_file(store, version, name) for name in names}
        return cls(
            str(json.loads(data[_CARD])["split_digest"]),
            parse_stored(Evidence, data[_EVIDENCE], _EVIDENCE) if _EVIDENCE in data else None,
            parse_stored(GateDecision, data[DECISION], DECISION) if DECISION in data else None,
        )


class ModelCertifier:
    """Issues certificates about versions of a model line; the default key is the file that $SALUN_SIGNING_KEY names."""

    def __init__(self, store: ObjectStore, key: Path | None = None) -> None:
        self._store, self._key = store, key
        self._last: tuple[str, VersionDocuments] | None = None

    @cached_property
    def signer(self) -> Ed25519PrivateKey:
        """The signing key, read when it is first needed; raises as `load_signing_key`."""
        return load_signing_key(self._key)

    def certify(self, facts: CertificateInput) -> str:
        """Write the certificate of one request and return its SHA-256; raises as `issue` and `signer`."""
        last = self._last  # all requests of a batch have the same version; read once, as other threads may replace it
        if last is None or last[0] != facts.version.digest:
            self._last = last = facts.version.digest, VersionDocuments.read(self._store, facts.version)
        return issue(self._store, facts, last[1], self.signer)


def issue(store: ObjectStore, facts: CertificateInput, documents: VersionDocuments, signer: Ed25519PrivateKey) -> str:
    """Write the certificate of a request and return the SHA-256 of its file; the call may be repeated.

    A certificate that this key signed for the same version and outcome is kept. Any other is copied to the addenda
    first, and the new one names it as superseded.
    """
    key = certificate_key(facts.request.id)
    for _ in range(_ATTEMPTS):
        stored = store.get(key)
        if stored is None:
            data = certify(facts, documents, signer)
        elif _is_same(stored.data, facts, signer):
            return sha256_bytes(stored.data)
        else:
            old = sha256_bytes(stored.data)
            data = certify(facts, documents, signer, supersedes=old)
            store.put_new(addendum_key(facts.request.id, f"certificate-{old[:12]}.json"), stored.data)
        with suppress(ConflictError):  # another settle of the same request was faster: read what it wrote
            if stored is None:
                store.put_new(key, data)
            else:
                store.put_if(key, data, stored.etag)
            return sha256_bytes(data)
    raise ConflictError(
        f"cannot write {key}", f"other processes replaced it {_ATTEMPTS} times meanwhile", "settle the request again"
    )


def _is_same(data: bytes, facts: CertificateInput, signer: Ed25519PrivateKey) -> bool:
    """Return whether a stored certificate is of this key, version and outcome."""
    public = signer.public_key()
    if claimed_keyid(data) != keyid(public):
        return False
    source = f"the certificate of request {facts.request.id}"
    found = open_statement(ErasureCertificate, data, [public], source).predicate
    if found.request.id != facts.request.id:
        raise IntegrityError(
            f"{source} belongs to another request", "the file was copied or moved", "restore the right one"
        )
    return (found.model.version, found.outcome) == (facts.version.digest, facts.outcome)


def certify(
    facts: CertificateInput, documents: VersionDocuments, signer: Ed25519PrivateKey, supersedes: str | None = None
) -> bytes:
    """Return a signed certificate: the bytes of its file; see `build_statement`."""
    return sign_statement(build_statement(facts, documents, keyid(signer.public_key()), supersedes), signer)


def build_statement(
    facts: CertificateInput, documents: VersionDocuments, signer: str, supersedes: str | None = None
) -> ErasureCertificate:
    """Build the statement of a certificate; nothing is certified if the gate refused (GateRefusedError).

    IntegrityError unless the input is of one version, one run and one outcome. `signer` is the id of a key.
    """
    _check(facts, documents)
    manifest = facts.version.manifest
    ran = facts.outcome is not Outcome.NOTHING_TO_ERASE
    predicate: dict[str, Any] = {
        "request": {
            **facts.request.model_dump(mode="json", include={"id", "received_at", "due_at"}),
            "completed_at": facts.completed_at,
        },
        "outcome": facts.outcome,
        "assurance": facts.assurance(documents.decision),
        "forgotten": {
            "digest": salted_digest(facts.salt, facts.forget_digest),
            "salt": facts.salt,
            "count": facts.found,
            "named": facts.named,
        },
        "model": {
            "line": manifest.line,
            "version": facts.version.digest,
            "parent": manifest.parent if ran else None,
            "split": documents.split_digest,
        },
        "provenance": {
            "code_commit": os.environ.get(COMMIT_VARIABLE) or None,
            "image_digest": os.environ.get(IMAGE_VARIABLE) or None,
        },
        "debt": {
            "fraction": manifest.lineage.debt,
            "runs_since_training": manifest.lineage.runs_since_training,
        },
        "supersedes": supersedes,
        "signer": signer,
        "statement": LIMITS,
    }
    if ran and documents.evidence and documents.decision:
        environment = documents.evidence.run.environment.items()
        predicate["provenance"]["environment"] = {
            _one_line(name, _SHORT): _one_line(value, _LONG) for name, value in environment if value
        }
        used = [record.model_dump(mode="json") for record in documents.evidence.all_plugins]
        predicate["provenance"]["plugins"] = used or None
        predicate |= {
            "procedure": _procedure(facts, documents.evidence),
            "metrics": [
                {"name": _one_line(name, _SHORT), **{key: _finite(getattr(metric, key)) for key in _MEASURED}}
                for name, metric in sorted(documents.evidence.metrics.items())
            ],
            "gate": _gate(documents.decision),
            "disposals": _disposals(facts.completed_at),
        }
    subject = [{"name": name, "digest": {"sha256": entry.sha256}} for name, entry in sorted(manifest.files.items())]
    statement = parse(
        ErasureCertificate,
        {"_type": STATEMENT_TYPE, "predicateType": ERASURE_TYPE, "subject": subject, "predicate": predicate},
        f"the certificate of request {facts.request.id}",
    )
    if faults := contradictions(statement.predicate):
        raise _contradiction("; ".join(faults))
    return statement


def _check(facts: CertificateInput, documents: VersionDocuments) -> None:
    """Refuse input that does not belong together: a signature cannot be taken back."""
    manifest, evidence, decision = facts.version.manifest, documents.evidence, documents.decision
    check_digest("the version's manifest", facts.version.digest, manifest.digest)
    if manifest.line != facts.request.model_line:
        raise _contradiction(f"the request is about {facts.request.model_line}, the version is of {manifest.line}")
    if facts.outcome is Outcome.NOTHING_TO_ERASE:
        if facts.run is not None or facts.found:
            raise _contradiction("nothing was erased, but there is a run or a count of samples")
        return
    if evidence is None or decision is None or not facts.found:
        raise _contradiction("something was erased, but evidence, the decision or the count of samples is missing")
    if manifest.retrained != (facts.outcome is Outcome.RETRAINED):
        raise _contradiction(f"the outcome is {facts.outcome}, the version was made by {manifest.method}")
    if facts.frozen_digest is not None:  # the frozen file is the set's canonical JSON, so both have the same digest
        check_digest("the claimed forget set", facts.frozen_digest, manifest.forget_set_digest or "")
    weights = weights_digest({name: entry.sha256 for name, entry in manifest.files.items()})
    if evidence.measured.after != weights or evidence.run.method != manifest.method:
        raise _contradiction("the evidence was measured on another model than the version's")
    check_digest("the evidence of the gate's decision", decision.evidence_digest, evidence.digest)
    if not decision.passed:
        why = f"the gate refused the version: {decision.summary[:400]}"
        raise GateRefusedError("nothing is certified", why, "unlearn again until the gate passes")


def _contradiction(why: str) -> IntegrityError:
    return IntegrityError("the input of a certificate contradicts itself", why, "nothing was signed; check the run")


def salted_digest(salt: str, digest: str) -> str:
    """Return the digest of a forget set as a certificate shows it: HMAC-SHA256 of its 64 hex digits.

    The salt, the key of the HMAC, is in hex.
    """
    return hmac.new(bytes.fromhex(salt), digest.encode(), hashlib.sha256).hexdigest()


def _procedure(facts: CertificateInput, evidence: Evidence) -> dict[str, Any]:
    config = json.loads(json.dumps(evidence.run.config))  # tuples become lists, as in the signed bytes
    return {
        "method": evidence.run.method,
        "config": config,
        "config_digest": digest_json(config),
        "seed": evidence.run.seed,
        "density": evidence.run.density,
        "mask_digest": evidence.measured.mask,
        "rung": facts.level,
        "attempt": facts.attempt,
        "run": facts.run,
        "lease_epoch": facts.epoch,
    }


def _gate(decision: GateDecision) -> dict[str, Any]:
    verdicts = [
        {
            "rule": _one_line(item.rule, _SHORT),
            "threshold": _one_line(item.threshold, _SHORT),
            "actual": _finite(item.actual),
            "shown": item.shown,
            "passed": item.passed,
            "reason": _one_line(item.reason, _LONG),
        }
        for item in decision.verdicts
    ]
    facts = decision.model_dump(include={"policy_digest", "evidence_digest", "passed"})
    return {"policy": _one_line(decision.policy, _SHORT), "verdicts": verdicts, **facts}


def _disposals(completed_at: str) -> dict[str, Any]:
    start = datetime.fromisoformat(completed_at)
    return {
        "due": tuple(
            {"what": what, "by": (start + timedelta(hours=hours)).isoformat()} for what, hours in _DUE_HOURS.items()
        )
    }


def _one_line(text: str, limit: int) -> str:
    """Put a text of a policy or a machine on one line without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))[:limit]


def _finite(value: float | None) -> float | None:
    """Return a value that JSON can hold: NaN and infinity become None."""
    return value if value is not None and math.isfinite(value) else None


def revoke(store: ObjectStore, rollback: VersionRollback, requests: Iterable[str], signer: Ed25519PrivateKey) -> int:
    """Add a revocation to each certificate about a version that a rollback undid, and return their number.

    A revocation is written after HEAD has moved, so that none exists for a version in use. A process that dies between
    the two leaves certificates without a revocation: `salun verify --store` refuses them by the lineage and the record
    of the rollback, and the next purge with a key calls this again. The same input gives the same bytes and key.
    """
    revoked = 0
    for request in requests:
        for key in (certificate_key(request), *certificate_copies(store, request)):
            stored = store.get(key)
            model = read_unverified(ErasureCertificate, stored.data, key).predicate.model if stored else None
            if stored is None or model is None or (model.line, model.version) != (rollback.line, rollback.version):
                continue
            subject = {"name": f"{request}.json", "digest": {"sha256": sha256_bytes(stored.data)}}
            fields = rollback.model_dump(include={"line", "version", "to", "at", "reason"})
            predicate = {"request": request, **fields, "signer": keyid(signer.public_key())}
            statement = parse(
                RevocationAddendum,
                {
                    "_type": STATEMENT_TYPE,
                    "predicateType": REVOCATION_TYPE,
                    "subject": [subject],
                    "predicate": predicate,
                },
                f"the revocation of the certificate of request {request}",
            )
            name = f"revocation-{sha256_bytes(statement.canonical())[:12]}.json"
            store.put_new(addendum_key(request, name), sign_statement(statement, signer))
            revoked += 1
    return revoked


def certificate_copies(store: ObjectStore, request: str) -> list[str]:
    """Return the keys of the superseded certificates of a request."""
    start = f"{addenda_prefix(request)}certificate-"
    return [entry.key for entry in store.list(start)]


def issue_addendum(store: ObjectStore, request_id: str, done: Sequence[DisposalDone], signer: Ed25519PrivateKey) -> str:
    """Add to a request's certificate what was deleted since, and return the SHA-256 of the addendum's file.

    The same input gives the same addendum. UsageError if the request has no certificate.
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
