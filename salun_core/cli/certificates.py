"""`salun verify`, `salun certificate` and `salun key create`: erasure certificates, signed audits and their keys."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Store
from salun_core.cli.output import echo, emit, emit_facts, in_order, measured_count, minute, print_table

if TYPE_CHECKING:
    from salun_core.certificates.statement import Erasure
    from salun_core.certificates.verify import Verification


def verify(
    certificate: Annotated[Path, typer.Argument(metavar="CERTIFICATE", help="File of the certificate.")],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; all files are compared.")] = None,
    key: Annotated[
        list[Path],
        typer.Option(
            metavar="PUB",
            help="Public key of a signer; may be repeated. Default: $SALUN_VERIFY_KEY, then salun.pub in the folder.",
        ),
    ] = [],
    addendum: Annotated[
        list[Path], typer.Option(metavar="FILE", help="An addendum of the certificate; may be repeated.")
    ] = [],
    store: Annotated[
        str | None, typer.Option("--store", help="Also check that the version is still in use, in this store.")
    ] = None,
) -> None:
    """Verify an erasure certificate.

    It checks the signature and the contents, and with --model that a model is the certified one. Without --store it
    works offline. Offline, it detects a later rollback only if the revocation is among the addenda. The file may also
    be a signed audit (`salun audit --key`); DIR may then be the file of weights or predictions that was audited.
    """
    from salun_core.audit.statement import is_audit
    from salun_core.certificates.verify import verify_certificate

    if is_audit(certificate):
        _verify_audit(certificate, model, key, bool(addendum or store))
        return
    found = verify_certificate(certificate, model, key, addendum, store)
    emit(_document(found), lambda: _show(found, model))


def _verify_audit(path: Path, model: Path | None, keys: list[Path], more: bool) -> None:
    from salun_core.audit.statement import verify_audit
    from salun_core.cli.audit import show_verified
    from salun_core.errors import UsageError

    if more:
        raise UsageError(f"{path} is an audit", "--addendum and --store are for certificates", "leave them out")
    found = verify_audit(path, model, keys)
    facts = {"sha256": found.sha256, "keyid": found.keyid, "key_source": found.key_source, "model_files": found.files}
    audit = found.evidence.model_dump(mode="json")
    emit({"valid": True, **facts, "audit": audit}, lambda: show_verified(found, model))


def _document(found: Verification) -> dict[str, Any]:
    return {
        "valid": True,
        "sha256": found.sha256,
        "keyid": found.keyid,
        "key_source": found.key_source,
        "model_files": found.files,
        "checked_in_store": found.in_store,
        "superseded_by": found.superseded_by,
        "certificate": found.certificate.model_dump(mode="json", by_alias=True, exclude_none=True),
        "warnings": _warnings(found),
        "addenda": [item.model_dump(mode="json", by_alias=True) for item in found.addenda],
    }


def _show(found: Verification, model: Path | None) -> None:
    from salun_core.certificates.keys import ADJACENT_KEY

    erasure = found.certificate.predicate
    echo(f"VALID: signed by a trusted key, from {found.key_source}")
    if found.key_source == ADJACENT_KEY:
        echo("the issuer could have put that key there: compare its id with the one that the signer publishes")
    checked = f"all {found.files} files of {model} are the certified ones"
    for warning in _warnings(found):
        echo(f"WARNING: {warning}")
    echo(checked if found.files is not None else "only the certificate was checked: give --model DIR as well")
    in_use = "the store still uses the version, and the request is completed"
    echo(in_use if found.in_store else "whether its version was rolled back later is not known offline: give --store")
    if found.superseded_by:
        newer = f"salun certificate {erasure.request.id} --out FILE"
        echo(f"superseded by certificate {found.superseded_by[:12]} of the request: {newer}")
    echo()
    for name, value in _summary(erasure):
        echo(f"{name:<10}  {value}")
    if erasure.metrics:
        echo()
        measured = {metric.name: metric for metric in erasure.metrics}
        rows = [
            (m.name, m.before, m.after, m.reference, m.low, m.high, measured_count(m.n, m.population))
            for m in (measured[name] for name in in_order(measured))
        ]
        print_table(["metric", "before", "after", "retrained", "low", "high", "n"], rows)
    if disposals := _disposals(found):
        echo()
        print_table(["disposal", "state", "when"], disposals)
    echo(f"\n{textwrap.fill(erasure.statement, 100)}")


def _warnings(found: Verification) -> list[str]:
    """Return what the reader of a valid certificate must not overlook."""
    if found.certificate.predicate.assurance.level == "procedure":
        return ["the level is procedure: it was not shown that the model forgot the data"]
    return []


def _summary(erasure: Erasure) -> list[tuple[str, str]]:
    request, model, forgotten, debt = erasure.request, erasure.model, erasure.forgotten, erasure.debt
    received, due, settled = map(minute, (request.received_at, request.due_at, request.completed_at))
    made = f"{model.line}@{model.version[:12]}" + (f", made from {model.parent[:12]}" if model.parent else "")
    rows = [
        ("request", f"{request.id}: received {received}, due {due}, settled {settled}"),
        ("outcome", erasure.outcome.value.replace("_", " ")),
        *_level(erasure),
        ("model", made),
        ("forgotten", f"{forgotten.count} training samples, of {forgotten.named} that the request names"),
    ]
    if erasure.procedure:
        rows.append(("procedure", f"{erasure.procedure.method}, configuration {erasure.procedure.config_digest[:12]}"))
    rows += [("plug-in", record.words) for record in erasure.provenance.plugins or ()]
    if erasure.gate:
        rows.append(("gate", f"passed {len(erasure.gate.verdicts)} checks of policy {erasure.gate.policy}"))
    rows.append(("debt", f"{debt.fraction:.1%} forgotten in {debt.runs_since_training} runs since the last training"))
    rows.append(("signer", f"key {erasure.signer}"))
    if erasure.supersedes:
        rows.append(("supersedes", f"certificate {erasure.supersedes[:12]}"))
    return rows


def _level(erasure: Erasure) -> list[tuple[str, str]]:
    assurance = erasure.assurance
    if assurance is None:
        return []
    return [("level", assurance.figures), *(("", line) for line in textwrap.wrap(assurance.text, 88))]


def _disposals(found: Verification) -> list[tuple[str, str, str]]:
    disposals = found.certificate.predicate.disposals
    added = [item for addendum in found.addenda for item in addendum.predicate.done]
    rows = [(item.what, "deleted", minute(item.at)) for item in disposals.done]
    rows += [(item.what, "deleted (addendum)", minute(item.at)) for item in added]
    return rows + [
        (item.what, "due", minute(item.by)) for item in disposals.due if item.what not in {a.what for a in added}
    ]


def certificate(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the request.")],
    store: Store,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write.")] = None,
    addenda: Annotated[
        bool, typer.Option("--addenda", help="Also write its addenda next to FILE; without --out, list them.")
    ] = False,
) -> None:
    """Fetch the certificate of a request from the store.

    The file is an exact copy. With --addenda, also fetch its addenda.
    """
    from salun_core.certificates.verify import certificate_digest, fetch_addenda, fetch_certificate
    from salun_core.errors import UsageError
    from salun_core.storage.local_files import write_whole

    if out is None and not addenda:
        raise UsageError("nothing to do", "neither --out nor --addenda is given", "give --out FILE")
    found = fetch_addenda(store, request_id) if addenda else []
    sha256 = certificate_digest(store, request_id) if out is None else fetch_certificate(store, request_id, out)
    rows: list[dict[str, Any]] = []
    for item in found:
        file = out.with_name(f"{out.stem}.{item.name}") if out is not None and item.certificate == sha256 else None
        if file is not None:
            write_whole(file, item.data)
        facts = {"addendum": item.name, "current": item.certificate == sha256, "file": file, "done": item.done}
        rows.append(facts | {"revocation": item.revocation})
    document: dict[str, Any] = {"sha256": sha256, **({"certificate": out} if out is not None else {})}
    if undone := _undone(store, request_id):
        document["undone"] = undone
        echo(f"Warning: the certificate is not valid any more: {undone}. See salun request show {request_id}", err=True)
    if not addenda:
        emit_facts(document)
        return
    listed = [
        row
        | {"done": [done.model_dump(mode="json") for done in row["done"]]}
        | {"revocation": row["revocation"].model_dump(mode="json") if row["revocation"] else None}
        for row in rows
    ]
    emit({**document, "addenda": listed}, lambda: _show_addenda(document, rows))


def _undone(store: str, request_id: str) -> str:
    """Return how the certified version was undone; empty if it is in use or that cannot be found out."""
    from salun_core.certificates.verify import undoing_of
    from salun_core.errors import SalunError
    from salun_core.storage import open_store

    try:
        return undoing_of(open_store(store), request_id)
    except SalunError:  # the file was fetched; `salun verify --store` reports what it cannot read
        return ""


def _show_addenda(document: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    emit_facts(document)
    echo()
    if not rows:
        echo("no addendum yet: `salun purge` adds one when it deletes what the certificate lists as due")
        return
    lines = [
        (row["addendum"], done.what, minute(done.at), "" if row["current"] else "of a superseded certificate")
        for row in rows
        for done in row["done"]
    ]
    if lines:
        print_table(["addendum", "deleted", "when", "note"], lines)
    for row in rows:
        if row["revocation"]:
            note = "the certificate" if row["current"] else "a superseded certificate"
            echo(
                f"{row['addendum']}: {note} is revoked since {minute(row['revocation'].at)}: {row['revocation'].reason}"
            )
    files = [row["file"] for row in rows if row["file"]]
    if files:
        echo(
            "\nTo verify: " + " ".join([f"salun verify {document['certificate']}", *(f"--addendum {f}" for f in files)])
        )


def create_key(
    out: Annotated[Path, typer.Option(metavar="DIR/NAME", help="Where to write NAME.pem and NAME.pub.")],
) -> None:
    """Create a key pair that signs certificates (ed25519).

    NAME.pem signs and must stay secret. NAME.pub verifies and may be published.
    """
    from salun_core.certificates.keys import create_key as create

    made = create(out)
    emit_facts({"signing_key": made.private, "public_key": made.public, "keyid": made.keyid})
