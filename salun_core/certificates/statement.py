"""The signed documents, as in-toto statements: the erasure certificate, and the addenda about later disposals."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ConfigDict, Field, model_validator

from salun_core.certificates.envelope import PAYLOAD_TYPE, claimed_keyid, open_envelope, sign
from salun_core.config import Document, parse
from salun_core.digest import canonical_json, digest_json
from salun_core.errors import IntegrityError, SalunError
from salun_core.gate import Assurance
from salun_core.plugins import PluginRecord
from salun_core.requests.schema import Outcome, RequestId
from salun_core.storage.documents import Count, Digest, FileName, LineId, RunId, ShortText, Text, UtcTime, valid_tree

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
ERASURE_TYPE = "urn:salun:erasure:v1"
DISPOSAL_TYPE = "urn:salun:disposal:v1"
REVOCATION_TYPE = "urn:salun:revocation:v1"
LIMITS = (
    "This certificate attests that the named procedure was applied to the named model and that the named evidence was "
    "measured. It does not prove that the model holds nothing of the data: that cannot be proved from a model alone "
    "(Thudi et al., arXiv 2110.11891)."
)
_CLOCKS_APART = timedelta(minutes=5)  # a request may come from a machine whose clock is that much ahead
_SHOWN = 10
Share = Annotated[float, Field(allow_inf_nan=False)]
Ordinal = Annotated[int, Field(ge=0, strict=True, le=2**53 - 1)]


class Sha256(Document):
    """A digest in the layout of in-toto."""

    sha256: Digest = Field(description="SHA-256 in hex")


class Subject(Document):
    """A file that a statement is about."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="name of the file")
    digest: Sha256 = Field(description="digest of its content")


class ModelFile(Subject):
    """A file of the model version."""

    name: FileName = Field(description="name of the file in the model's folder, with `/` between folders")


class RequestTimes(Document):
    """The request, by its id and its times."""

    id: RequestId = Field(description="the request's id")
    received_at: UtcTime = Field(description="when the person asked, ISO 8601 in UTC")
    due_at: UtcTime = Field(description="when it had to be settled")
    completed_at: UtcTime = Field(description="when it was settled")


class ForgottenSet(Document):
    """What was forgotten, by a salted digest: only those who have the set can recognise it."""

    digest: Digest = Field(
        description="HMAC-SHA256, key: the salt's bytes, message: the set's SHA-256 as 64 hex digits"
    )
    salt: Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2}){16,64}$")] = Field(description="random, in hex")
    count: Count = Field(description="samples of the request that were in the training split; a concept counts as one")
    named: Count = Field(description="samples that the request names in the data set; a concept counts as one")


class ModelFacts(Document):
    """The model version that the subject's files make up."""

    line: LineId = Field(description="the model line")
    version: Digest = Field(description="digest of the version's manifest; nothing to erase: of the one searched")
    parent: Digest | None = Field(default=None, description="digest of the version that it was unlearned from")
    split: Digest = Field(description="digest of the version's split manifest")


class Procedure(Document):
    """How the version was made."""

    method: ShortText = Field(description="the method's name")
    config: dict[str, Any] = Field(description="its resolved configuration")
    config_digest: Digest = Field(description="SHA-256 of the configuration's canonical JSON")
    seed: int | None = Field(default=None, description="of all random choices")
    density: Share | None = Field(default=None, description="share of salient weights in the mask")
    mask_digest: Digest | None = Field(default=None, description="digest of the saliency mask")
    rung: Ordinal = Field(description="escalation level of the recipe, from 0")
    attempt: Ordinal = Field(description="attempt of the request, from 1")
    run: RunId | None = Field(default=None, description="the unlearning run")
    lease_epoch: Ordinal | None = Field(default=None, description="epoch of the model line's lease")

    @model_validator(mode="after")
    def _config_fits(self) -> Procedure:
        if digest_json(self.config) != self.config_digest:
            raise ValueError("`config_digest` is not the digest of `config`")
        return self


class Provenance(Document):
    """What ran, and on what."""

    code_commit: ShortText | None = Field(default=None, description="commit of the code")
    image_digest: ShortText | None = Field(default=None, description="digest of the container image")
    environment: dict[ShortText, Text] = Field(default={}, description="versions of libraries, and hardware")
    plugins: list[PluginRecord] | None = Field(
        default=None, description="code of other packages that made or measured the version; absent: none"
    )


class CertifiedMetric(Document):
    """One measured value of the evidence; values that could not be measured are left out."""

    name: ShortText = Field(description="name of the metric")
    before: Share | None = Field(default=None, description="of the model before")
    after: Share | None = Field(default=None, description="of the model after")
    reference: Share | None = Field(default=None, description="of a model retrained without the set")
    origin: Share | None = Field(default=None, description="of the last full training of the model line")
    n: Count = Field(description="samples behind it")
    low: Share | None = Field(default=None, description="lower end of the 95 % interval of `after`")
    high: Share | None = Field(default=None, description="upper end of it")
    population: Count | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="images of the split that the n were drawn from; absent: all were measured",
    )


class CertifiedVerdict(Document):
    """The result of one rule of the gate."""

    rule: ShortText = Field(description="the rule")
    threshold: ShortText = Field(description="what it requires")
    actual: Share | None = Field(default=None, description="what was measured")
    shown: bool | None = Field(
        default=None, description="whether its whole 95 % interval satisfies it; absent: it judges no interval"
    )
    passed: bool = Field(description="whether it passed")
    reason: Text = Field(description="why the rule exists, or why it failed")


class Gate(Document):
    """The gate's decision; refused versions get no certificate."""

    policy: ShortText = Field(description="name of the policy")
    policy_digest: Digest = Field(description="SHA-256 of the policy's canonical JSON")
    evidence_digest: Digest = Field(description="SHA-256 of the evidence's canonical JSON")
    passed: Literal[True] = Field(description="always true")
    verdicts: list[CertifiedVerdict] = Field(min_length=1, description="one for each rule")


class DisposalDone(Document):
    """Something that was deleted."""

    what: ShortText = Field(description="what; no personal data")
    at: UtcTime = Field(description="when")


class DisposalDue(Document):
    """Something that will be deleted."""

    what: ShortText = Field(description="what; no personal data")
    by: UtcTime = Field(description="until when")


class Disposals(Document):
    """What was deleted when the certificate was issued, and what will be deleted."""

    done: tuple[DisposalDone, ...] = Field(default=(), description="deleted")
    due: tuple[DisposalDue, ...] = Field(default=(), description="to be deleted")


class Debt(Document):
    """What was forgotten since the line was last trained in full."""

    fraction: Share = Field(description="share of the samples of the last full training")
    runs_since_training: Count = Field(description="unlearning runs since then")


class Erasure(Document):
    """The certificate's predicate."""

    format: Literal["salun.certificate/v1"] = "salun.certificate/v1"
    request: RequestTimes = Field(description="the request")
    outcome: Outcome = Field(description="how it was met")
    assurance: Assurance = Field(description="how sure that is")
    forgotten: ForgottenSet = Field(description="what was forgotten")
    model: ModelFacts = Field(description="the model version")
    procedure: Procedure | None = Field(default=None, description="how it was made; absent: nothing to erase")
    provenance: Provenance = Field(description="what ran")
    metrics: list[CertifiedMetric] | None = Field(
        default=None, description="what was measured; absent: nothing to erase"
    )
    gate: Gate | None = Field(default=None, description="the gate's decision; absent: nothing to erase")
    disposals: Disposals = Field(default=Disposals(), description="what else was and will be deleted")
    debt: Debt = Field(description="of the model line at this version")
    supersedes: Digest | None = Field(default=None, description="SHA-256 of the earlier certificate of this request")
    signer: Digest = Field(description="id of the signing key: SHA-256 of the raw public key")
    statement: Annotated[str, Field(max_length=1000)] = Field(description="what it attests, and what it does not prove")

    @model_validator(mode="after")
    def _whole(self) -> Erasure:
        ran = self.outcome is not Outcome.NOTHING_TO_ERASE
        if any((part is not None) != ran for part in (self.procedure, self.metrics, self.gate)):
            raise ValueError("an erasure needs `procedure`, `metrics` and `gate`, and nothing else may have them")
        if (self.forgotten.count > 0) != ran:
            raise ValueError("`forgotten.count` must be 0 if there was nothing to erase, and only then")
        return self


class Disposal(Document):
    """An addendum's predicate: what was deleted after the certificate was issued."""

    format: Literal["salun.disposal/v1"] = "salun.disposal/v1"
    request: RequestId = Field(description="the request's id")
    done: tuple[DisposalDone, ...] = Field(min_length=1, description="what was deleted")
    signer: Digest = Field(description="id of the signing key")


class Revocation(Document):
    """A revocation's predicate: the version that a certificate is about was undone by a rollback."""

    format: Literal["salun.revocation/v1"] = "salun.revocation/v1"
    request: RequestId = Field(description="the request's id; it is not met any more")
    line: LineId = Field(description="the model line")
    version: Digest = Field(description="digest of the manifest of the version that was undone")
    to: Digest = Field(description="digest of that of the version that is in use again")
    at: UtcTime = Field(description="when, ISO 8601 in UTC")
    reason: Text = Field(description="why; no personal data")
    signer: Digest = Field(description="id of the signing key")


class _Statement(Document):
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type", description="in-toto Statement v1")

    def canonical(self) -> bytes:
        """Return the bytes that are signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


class ErasureCertificate(_Statement):
    """States that a deletion request was met: an in-toto statement about every file of a model version."""

    predicate_type: Literal["urn:salun:erasure:v1"] = Field(alias="predicateType", description="kind of the predicate")
    subject: list[ModelFile] = Field(min_length=1, description="every file of the model version")
    predicate: Erasure = Field(description="what is attested")

    @model_validator(mode="after")
    def _distinct(self) -> ErasureCertificate:
        if len({item.name for item in self.subject}) < len(self.subject):
            raise ValueError("`subject` names a file twice")
        valid_tree({item.name for item in self.subject})
        return self


class DisposalAddendum(_Statement):
    """States what was deleted after a certificate was issued: an in-toto statement about the certificate's file."""

    predicate_type: Literal["urn:salun:disposal:v1"] = Field(alias="predicateType", description="kind of the predicate")
    subject: list[Subject] = Field(min_length=1, max_length=1, description="the certificate's file")
    predicate: Disposal = Field(description="what is attested")


class RevocationAddendum(_Statement):
    """States that a certificate is not valid any more: an in-toto statement about the certificate's file."""

    predicate_type: Literal["urn:salun:revocation:v1"] = Field(
        alias="predicateType", description="kind of the predicate"
    )
    subject: list[Subject] = Field(min_length=1, max_length=1, description="the certificate's file")
    predicate: Revocation = Field(description="what is attested")


def contradictions(erasure: Erasure) -> list[str]:
    """Return what a certificate says that cannot all be true; a signature does not make it so."""
    request, forgotten, model = erasure.request, erasure.forgotten, erasure.model
    received, due, completed = map(datetime.fromisoformat, (request.received_at, request.due_at, request.completed_at))
    metrics = erasure.metrics or []
    names = [metric.name for metric in metrics]
    erased = erasure.outcome is not Outcome.NOTHING_TO_ERASE
    found = {
        "it was completed before it was received": completed < received - _CLOCKS_APART,
        "it was due before it was received": due <= received,
        f"{forgotten.count} samples were forgotten, and the request names {forgotten.named}": (
            forgotten.count > forgotten.named
        ),
        "its version is its parent": model.version == model.parent,
        "an erasure without a metric": erased and not metrics,
        "no metric has a value after the erasure": bool(metrics) and all(metric.after is None for metric in metrics),
    }
    if erased and erasure.procedure is not None:
        method = erasure.procedure.method
        found[f"its outcome is {erasure.outcome}, and its method {method}"] = (method == "retrain") != (
            erasure.outcome is Outcome.RETRAINED
        )
    failed = [verdict.rule for verdict in (erasure.gate.verdicts if erasure.gate else ()) if not verdict.passed]
    return [
        *(text for text, holds in found.items() if holds),
        *(f"the metric {name} stands twice" for name in sorted(set(names)) if names.count(name) > 1),
        *(f"it passed the gate, and the rule {rule!r} failed" for rule in failed),
        *_level_contradictions(erasure),
    ]


def _level_contradictions(erasure: Erasure) -> list[str]:
    assurance, level, outcome = erasure.assurance, erasure.assurance.level, erasure.outcome
    nothing = outcome is Outcome.NOTHING_TO_ERASE
    figures = (assurance.margin, assurance.n, assurance.power, assurance.requests)
    shown = any(verdict.shown for verdict in (erasure.gate.verdicts if erasure.gate else ()))
    found = {
        f"its level is {level}, and its outcome {outcome}": (level == "nothing_to_erase") != nothing
        or (level == "retrained" and outcome is not Outcome.RETRAINED),
        "nothing was erased, and its level has figures": nothing and any(value is not None for value in figures),
        "it was measured, and n is missing": level == "measured" and not assurance.n,
        "it was measured, and no rule on an interval is shown": level == "measured" and not shown,
        "its margin has no n": assurance.margin is not None and not assurance.n,
        "its power has no n": assurance.power is not None and not assurance.n,
        "its margin has no power": level == "measured" and assurance.margin is not None and assurance.power is None,
    }
    return [text for text, holds in found.items() if holds]


S = TypeVar("S", ErasureCertificate, DisposalAddendum, RevocationAddendum)


def sign_statement(
    statement: ErasureCertificate | DisposalAddendum | RevocationAddendum, signer: Ed25519PrivateKey
) -> bytes:
    """Return the file of a statement, signed."""
    return sign(statement.canonical(), PAYLOAD_TYPE, signer)


def open_statement(kind: type[S], data: bytes, trusted: Iterable[Ed25519PublicKey], source: str) -> S:
    """Verify a signed file and return what it states; `source` names the file in messages.

    IntegrityError if it is damaged, of another signer or kind, of a later version of the format, or contradicts itself.
    """
    payload = open_envelope(data, trusted)
    try:
        statement = parse(kind, json.loads(payload), source)
    except SalunError as error:
        remedy = "name the right file; a later format needs a later version of salun"
        raise IntegrityError(error.what, error.why, remedy) from error
    if statement.predicate.signer != claimed_keyid(data):
        raise IntegrityError(f"{source} names another signer", "it was signed with another key", "reject it")
    if isinstance(statement, ErasureCertificate) and (faults := contradictions(statement.predicate)):
        remedy = "do not rely on it, although the signature is right: ask the signer for a correct one"
        raise IntegrityError(f"{source} contradicts itself", "; ".join(faults[:_SHOWN]), remedy)
    return statement


def read_unverified(kind: type[S], data: bytes, source: str) -> S:
    """Return what a signed file states, for a listing. Its signature is not checked: see `open_statement`."""
    try:
        return parse(kind, json.loads(base64.b64decode(json.loads(data)["payload"], validate=True)), source)
    except SalunError as error:
        raise IntegrityError(error.what, error.why, "restore it from a copy") from error
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{source} is damaged", str(error)[:200], "restore it from a copy") from error
