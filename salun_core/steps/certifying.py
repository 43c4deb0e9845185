"""Issues the certificates of requests from what their version carries: evidence, decision, model card."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun_core.config import Document
from salun_core.digest import check_digest
from salun_core.requests.books import Erased
from salun_core.requests.certificate import Facts, issue
from salun_core.requests.keys import load_signing_key
from salun_core.requests.schema import Outcome
from salun_core.requests.statement import DisposalDue, Disposals
from salun_core.storage.lineage import parse_stored
from salun_core.storage.lookup import Version, read_file
from salun_core.storage.objects import ObjectStore

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
