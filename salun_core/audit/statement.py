"""`audit.json`: what an audit measured, on which files, signed by the auditor; and the report of it.

A signed audit is an envelope as certificates have, so that every byte of the file is verified. Its subject is the files
of the model after, so that it cannot be passed off as the audit of another model.
"""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field, JsonValue, model_validator

from salun_core.audit.checks import WORDS, Finding, level_of, verdict_of
from salun_core.audit.predictions import NAME_CHARACTERS, Audited
from salun_core.certificates.envelope import MAX_ENVELOPE_BYTES, PAYLOAD_TYPE, claimed_keyid, keyid, open_envelope, sign
from salun_core.certificates.keys import load_trusted_keys, read_small
from salun_core.certificates.statement import STATEMENT_TYPE, Sha256, Subject
from salun_core.config import Document, parse
from salun_core.digest import canonical_json, sha256_bytes, sha256_file
from salun_core.errors import IntegrityError, UsageError
from salun_core.gate import LEVELS
from salun_core.storage.documents import Count, Digest, UtcTime
from salun_core.storage.local_files import list_tree
from salun_core.tasks.run_facts import environment

AUDIT_TYPE = "urn:salun:audit:v1"
_AGAIN = "get the file from the auditor again; if the error stays, reject it"
_SHOWN = 10
_LIMITS = (
    "An audit compares outputs. It does not prove that a model holds nothing of the data, and it says nothing about "
    "other copies of the model or of the data."
)
Role = Literal["before", "after", "reference", "shadow", "forget", "held_out", "data"]


class AuditInput(Document):
    """A file that was read."""

    role: Role = Field(description="what it was used for; `data`: digests of the data set and its split")
    name: Annotated[str, Field(min_length=1, max_length=NAME_CHARACTERS)] = Field(
        description="of the file, in its folder"
    )
    sha256: Digest = Field(description="of its content")


class AuditSizes(Document):
    """How much was compared."""

    forget: Count = Field(description="samples that had to be forgotten")
    held_out: Count = Field(description="samples that no model was trained on")
    retain: Count = Field(description="retained samples, if any were given")
    references: Count = Field(description="retrained models")
    shadows: Count = Field(description="shadow models")
    classes: list[int] = Field(description="classes that were forgotten as a whole, by index")


class AuditEvidence(Document):
    """What an audit measured from outside: models or predictions before and after, with a verdict for each test."""

    format: Literal["salun.audit/v1"] = "salun.audit/v1"
    created_at: UtcTime = Field(description="ISO 8601 in UTC")
    source: Literal["models", "predictions"] = Field(description="whether the models themselves were measured")
    level: Literal["measured", "procedure", "refused"] = Field(
        description="`measured`: all tests pass; `procedure`: none fails, and so many samples cannot decide all of "
        "them; `refused`: a test fails"
    )
    sizes: AuditSizes = Field(description="how much was compared")
    findings: list[Finding] = Field(min_length=1, description="one for each test")
    inputs: list[AuditInput] = Field(min_length=1, description="every file that was read; no sample ids")
    settings: dict[str, JsonValue] = Field(description="settings of the command")
    environment: dict[str, str] = Field(description="versions of libraries, and hardware")
    auditor: Digest | None = Field(default=None, description="id of the signing key; null: not signed")
    statement: Annotated[str, Field(max_length=1000)] = Field(description="what it does not prove")

    @model_validator(mode="after")
    def _consistent(self) -> AuditEvidence:
        for found in self.findings:
            if found.verdict != verdict_of(found.low, found.high, found.n, found.at_least, found.at_most):
                raise ValueError(f"the verdict of `{found.test}` does not follow from its interval")
            if not found.holds_value:
                raise ValueError(f"the interval of `{found.test}` does not hold its value")
        tests = [found.test for found in self.findings]
        if len(set(tests)) < len(tests):
            raise ValueError("a test stands twice")
        if self.level != level_of(self.findings):
            raise ValueError("`level` does not follow from the findings")
        if not {"before", "after", "forget"} <= {item.role for item in self.inputs}:
            raise ValueError("`inputs` lacks before, after or forget")
        return self

    @property
    def words(self) -> str:
        """The level in words."""
        if self.level == "refused":
            failed = [found.test for found in self.findings if found.verdict == "fail"]
            return f"The audit refuses the model. Failed: {', '.join(failed)}."
        return _LEVELS[self.level]


_LEVELS = {
    "measured": LEVELS["measured"].means.replace("the limits of the policy", "the limits of this audit"),
    "procedure": "Nothing that was measured contradicts that the model forgot the data. "
    + LEVELS["procedure"].does_not,
}


class AuditStatement(Document):
    """A signed audit: an in-toto statement about the files of the model after."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type", description="in-toto Statement v1")
    predicate_type: Literal["urn:salun:audit:v1"] = Field(alias="predicateType", description="kind of the predicate")
    subject: list[Subject] = Field(min_length=1, description="every file of the model after, or its predictions")
    predicate: AuditEvidence = Field(description="what was measured")

    @model_validator(mode="after")
    def _about_the_model_after(self) -> AuditStatement:
        if self.subject != _subject(self.predicate):
            raise ValueError("`subject` is not the files of the model after")
        return self


def _subject(evidence: AuditEvidence) -> list[Subject]:
    files = [item for item in evidence.inputs if item.role == "after"]
    return [Subject(name=item.name, digest=Sha256(sha256=item.sha256)) for item in files]


def evidence_of(
    audited: Audited, findings: Sequence[Finding], settings: Mapping[str, Any], signer: Ed25519PrivateKey | None = None
) -> AuditEvidence:
    """Return the evidence of an audit.

    `settings` are those of the command, without paths, and `signer` is who will sign it.
    """
    sizes = {name: len(outputs) for name, outputs in audited.after.items()}
    inputs = [
        AuditInput.model_validate({"role": role, "name": name, "sha256": digest})
        for role, files in audited.digests.items()
        for name, digest in files.items()
    ]
    return AuditEvidence(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source="predictions" if audited.networks is None else "models",
        level=level_of(findings),
        sizes=AuditSizes(
            forget=sizes["forget"],
            held_out=sizes["unseen"],
            retain=audited.retained,
            references=len(audited.references),
            shadows=0 if audited.shadows is None else len(audited.shadows.inside),
            classes=list(audited.emptied),
        ),
        findings=list(findings),
        inputs=inputs,
        settings=dict(settings),
        environment=environment(),
        auditor=keyid(signer.public_key()) if signer else None,
        statement=_LIMITS,
    )


def file_of(evidence: AuditEvidence, signer: Ed25519PrivateKey | None = None) -> bytes:
    """Return the bytes of `audit.json`: the signed envelope, or without a key the evidence itself."""
    if signer is None:
        return (json.dumps(evidence.model_dump(mode="json"), indent=1) + "\n").encode()
    fields = {
        "_type": STATEMENT_TYPE,
        "predicateType": AUDIT_TYPE,
        "subject": _subject(evidence),
        "predicate": evidence,
    }
    statement = AuditStatement.model_validate(fields)
    return sign(canonical_json(statement.model_dump(mode="json", by_alias=True)), PAYLOAD_TYPE, signer)


@dataclass(frozen=True)
class VerifiedAudit:
    """An audit whose signature, contents and files were checked.

    `keyid` is the trusted key that signed it, from `key_source`; `files` is None if no model was given to compare.
    """

    evidence: AuditEvidence
    sha256: str
    keyid: str
    key_source: str
    files: int | None


def is_audit(path: Path) -> bool:
    """Whether a file claims to be an audit, signed or not; nothing is verified."""
    try:
        document = json.loads(read_small(path, MAX_ENVELOPE_BYTES)[0])
        if "payload" in document:
            return bool(json.loads(base64.b64decode(document["payload"]))["predicateType"] == AUDIT_TYPE)
        return str(document["format"]).startswith("salun.audit/")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def verify_audit(path: Path, model: Path | None = None, keys: Sequence[Path] = ()) -> VerifiedAudit:
    """Verify the signature and the contents of an audit, and that it is about a model. Offline.

    `model` is the model after: its folder, its weights or its predictions. For the default of `keys` see
    `load_trusted_keys`; UsageError if no key is trusted. IntegrityError: a byte differs, the signer is not trusted, or
    the audit is not signed, contradicts itself or is about another model.
    """
    trusted = load_trusted_keys(keys, path)
    data = read_small(path, MAX_ENVELOPE_BYTES)[0]
    try:
        signed = "payload" in json.loads(data)
    except (ValueError, TypeError, RecursionError):
        signed = True  # the envelope says what is wrong with it
    if not signed:
        raise IntegrityError(f"{path} is not signed", "anybody could have written it", "sign it: salun audit --key PEM")
    try:
        payload = open_envelope(data, trusted.keys)
        statement = parse(AuditStatement, json.loads(payload), str(path))
    except UsageError as error:
        raise IntegrityError(error.what, error.why, _AGAIN) from error
    except IntegrityError as error:
        raise IntegrityError(error.what.replace("the certificate", "the audit"), error.why, _AGAIN) from error
    evidence, signer = statement.predicate, claimed_keyid(data)
    if evidence.auditor != signer:
        raise IntegrityError(f"{path} names another auditor", "it was signed with another key", "reject it")
    files = _check_files(model, statement, path) if model is not None else None
    return VerifiedAudit(evidence, sha256_bytes(data), signer, trusted.source, files)


def _check_files(model: Path, statement: AuditStatement, path: Path) -> int:
    expected = {item.name: item.digest.sha256 for item in statement.subject}
    try:
        names = {model.name: model} if model.is_file() else {name: model / name for name in list_tree(model).files}
        found = {name: sha256_file(file) for name, file in names.items()}
    except OSError as error:
        raise UsageError(f"cannot read {model}", error.strerror or "", "check the path and its permissions") from error
    if model.is_file() and len(expected) == 1:  # predictions and weights may have been renamed
        found = dict.fromkeys(expected, next(iter(found.values())))
    if found != expected:
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        why = f"other files: {', '.join(map(repr, different[:_SHOWN]))}"
        raise IntegrityError(
            f"{path} is the audit of another model than {model}", why, "name the model that was audited"
        )
    return len(expected)


def report_of(evidence: AuditEvidence) -> str:
    """Return the report in Markdown: the verdict, each test with its figures, what was compared. No sample ids."""
    sizes = evidence.sizes
    facts = {
        "audited": "the models" if evidence.source == "models" else "their predictions",
        "forgotten samples": sizes.forget,
        "held-out samples": sizes.held_out,
        "retained samples": sizes.retain or "none given",
        "classes forgotten as a whole": ", ".join(map(str, sizes.classes)) or "none",
        "references": sizes.references or "none given",
        "shadow models": sizes.shadows or "none given",
        "date": evidence.created_at,
        "auditor's key": evidence.auditor or "not signed",
    }
    lines = [f"# Audit: {evidence.level}", "", evidence.words, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [
        "",
        "## Tests",
        "",
        "| test | verdict | value | 95 % interval | required | n | power |",
        "|---|---|--:|---|---|--:|--:|",
    ]
    for found in evidence.findings:
        cells = [_number(found.value), _interval(found), found.required, str(found.n), _share(found.power)]
        lines.append(f"| `{found.test}` | {found.verdict} | {' | '.join(cells)} |")
    lines.append("")
    for found in evidence.findings:
        measures, why = WORDS[found.test]
        note = f" ({found.note})" if found.note else ""
        lines += textwrap.wrap(
            f"- `{found.test}`: {measures}{note}. {why[0].upper()}{why[1:]}.", 110, subsequent_indent="  "
        )
    lines += ["", "## Inputs", "", "| role | file | SHA-256 |", "|---|---|---|"]
    # With the digest of a list of ids anybody could try which samples are in it.
    lines += [
        f"| {i.role} | {i.name.replace('|', '&#124;')} | `{i.sha256}` |" for i in evidence.inputs if i.role != "forget"
    ]
    lines += ["", *textwrap.wrap(evidence.statement, 110), ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _interval(found: Finding) -> str:
    return "-" if found.low is None or found.high is None else f"{found.low:.3f} to {found.high:.3f}"


def failed_figures(evidence: AuditEvidence) -> list[str]:
    """Return each failed test in words with its figures."""
    return [
        f"{found.test}: {WORDS[found.test][1]} ({found.figures})"
        for found in evidence.findings
        if found.verdict == "fail"
    ]
