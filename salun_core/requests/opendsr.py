"""Reads erasure requests of OpenDSR 2.0 (formerly OpenGDPR), as privacy platforms send them to processors.

Field names are those of the specification, section 7.1; keys that it does not know are its extensions, and are ignored.
A request there names persons and no model, so that the model line comes from whoever files it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from salun_core.config import parse
from salun_core.errors import UsageError
from salun_core.requests.schema import Submission

SOURCE = "opendsr"
_ERASURE = "erasure"
_CUSTOMER = "controller_customer_id"
_RAW = "raw"


def _written(moment: object) -> object:
    if not isinstance(moment, str | datetime):
        raise ValueError("a time is text in RFC 3339, such as 2026-01-31T12:00:00Z")
    return moment


class _Foreign(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SubjectIdentity(_Foreign):
    """One name of the person (section 5.3)."""

    identity_type: str = Field(min_length=1, max_length=128)
    identity_value: str = Field(min_length=1, max_length=256)
    identity_format: str = Field(min_length=1, max_length=32)


class OpenDsrRequest(_Foreign):
    """A request of the specification (section 7.1.1); `regulation` is absent before version 2.0."""

    subject_request_id: UUID
    subject_request_type: str = Field(min_length=1, max_length=64)
    submitted_time: Annotated[AwareDatetime, BeforeValidator(_written)]
    subject_identities: list[SubjectIdentity] = Field(default=[], max_length=100)
    regulation: str | None = Field(default=None, max_length=64)
    api_version: str | None = Field(default=None, pattern=r"^[12](\.[0-9]{1,3}){0,2}$")


def is_opendsr(document: Any) -> bool:  # noqa: ANN401 - any YAML or JSON value
    """Return whether a document means to be a request of OpenDSR."""
    return isinstance(document, dict) and bool({"subject_request_id", "subject_request_type"} & document.keys())


def read_opendsr(document: Any, line: str | None, source: str) -> Submission:  # noqa: ANN401 - any YAML or JSON value
    """Read an erasure request; its identity becomes the subject reference.

    Of several identities that one is taken that is the controller's own, `controller_customer_id`.

    Args:
        document: the request as plain data.
        line: the model line to erase from.
        source: where it came from, for the message.

    Raises:
        UsageError: it has faults, asks for something else than erasure, has no identity that is plain and the only
            one, or no model line was given.
    """
    request = parse(OpenDsrRequest, document, source)
    if request.subject_request_type != _ERASURE:
        raise UsageError(
            f"{source} asks for something else than erasure",
            f"its `subject_request_type` is {request.subject_request_type!r}, and a model can only forget",
            "answer that request elsewhere",
        )
    if line is None:
        raise UsageError(f"{source} names no model line", "OpenDSR has no field for it", "give --line")
    identity = _the_one(request.subject_identities, source)
    if identity.identity_format != _RAW:
        raise UsageError(
            f"{source} names the person by a hash",
            f"`identity_format` is {identity.identity_format!r}, and the data hold plain references",
            "send the identity as raw",
        )
    fields = {
        "id": str(request.subject_request_id),
        "model_line": line,
        "target": {"kind": "subject", "subject_ref": identity.identity_value},
        "received_at": request.submitted_time,
        "source": SOURCE,
    }
    return parse(Submission, fields, source)


def _the_one(identities: Sequence[SubjectIdentity], source: str) -> SubjectIdentity:
    if not identities:
        raise UsageError(
            f"{source} names nobody",
            "`subject_identities` is empty, and identities in `extensions` are not read",
            f"send one identity of type {_CUSTOMER}",
        )
    chosen = [identity for identity in identities if identity.identity_type == _CUSTOMER]
    if len(identities) == 1 or len(chosen) == 1:
        return (chosen or identities)[0]
    raise UsageError(
        f"{source} names the person in {len(identities)} ways",
        f"{len(chosen)} of them are of type {_CUSTOMER}, and which one the data use is not said",
        f"send exactly one identity of type {_CUSTOMER}",
    )
