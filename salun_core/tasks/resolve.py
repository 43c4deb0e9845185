"""Resolves the inputs of a step by name: models, forget targets and policies, from folders or the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from salun_core import plugins
from salun_core.config import MAX_DOCUMENT_BYTES, parse, parse_text, read_document
from salun_core.data.forget_set import ForgetSet
from salun_core.data.targets import SamplesTarget, Target, parse_target
from salun_core.digest import check_digest, sha256_bytes
from salun_core.errors import IntegrityError, StoreError, UsageError, reported_as, unknown_name
from salun_core.evaluation import Evidence
from salun_core.evaluation.metrics import metric_names
from salun_core.gate import Policy, default_policy, load_policy, policy_of_images, shipped_policies
from salun_core.models.card import Card, DiffusionCard
from salun_core.registry.lookup import resolve
from salun_core.registry.versions import fetch_version
from salun_core.storage import open_store, split_uri

AUTO = "auto"


def read_bytes(uri: str) -> bytes:
    """Read a small document from `s3://bucket/key` or a local file.

    IntegrityError if it is too large for a document.
    """
    if not uri.startswith("s3://"):
        path = Path(uri)
        if not path.is_file():
            raise UsageError(f"file {uri} does not exist", "no file has this path", "check the path")
        data = path.read_bytes()
    else:
        bucket, key = split_uri(uri)
        found = open_store(f"s3://{bucket}").get(key)
        if found is None:
            raise UsageError(f"object {uri} does not exist", "the store has no such key", "check the address")
        data = found.data
    if len(data) > MAX_DOCUMENT_BYTES:
        raise IntegrityError(f"{uri} is too large", f"over {MAX_DOCUMENT_BYTES} bytes", "split it")
    return data


def read_plain(uri: str) -> Any:  # noqa: ANN401 - any YAML or JSON value
    """Read a YAML or JSON document from the store or a file as plain data."""
    if not uri.startswith("s3://"):
        return read_document(Path(uri))
    return _plain(read_bytes(uri), uri)


def _plain(data: bytes, uri: str) -> Any:  # noqa: ANN401 - any YAML or JSON value
    try:
        return parse_text(data.decode("utf-8"), uri)
    except UnicodeDecodeError as error:
        raise UsageError(f"{uri} is not text", str(error), "give a YAML or JSON document") from error


def read_forget(uri: str) -> ForgetSet | list[Target]:
    """Read a resolved forget set, one target, or a list of targets; IntegrityError if ids do not match their digest."""
    with reported_as(f"{uri} does not exist, or is not a valid forget set"):
        document = read_plain(uri)
        if isinstance(document, dict) and document.get("format") == "salun.forget-set/v1":
            return parse(ForgetSet, document, uri)
        items = document if isinstance(document, list) else [document]
        if not items:
            raise UsageError(f"{uri} names nothing", "it is an empty list", "give at least one forget target")
        return [fetched(parse_target(item, uri)) for item in items]


def fetched(target: Target) -> Target:
    """Replace the address of a target's manifest by its ids, checked by digest; return other targets unchanged."""
    if not isinstance(target, SamplesTarget) or target.manifest_uri is None:
        return target
    uri = target.manifest_uri
    if not uri.startswith("s3://"):  # whoever files a request must not learn of this machine's files
        raise UsageError("a manifest of sample ids is not in the store", "its address is not s3://", "upload it")
    try:
        data = read_bytes(uri)
    except StoreError as error:  # whoever filed the request chose the address, so a pod's log does not show it
        error.public = "a manifest of sample ids cannot be read"
        raise
    check_digest("a manifest of sample ids", target.sha256 or "", sha256_bytes(data))
    fields = {"dataset_digest": target.dataset_digest, "ids": _plain(data, uri)}
    return parse(SamplesTarget, fields, "a manifest of sample ids")


def check_policy(uri: str) -> None:
    """Check a gate policy before the work that it applies to; UsageError also for a metric that is never measured."""
    if uri != AUTO:
        policy = _policy(uri)
        for name in [item.metric for rule in policy.rules for item in (rule, rule.relative_to) if item]:
            if name not in metric_names() and not plugins.is_reference(name) and name not in _offered():
                raise unknown_name(f"metric in policy {policy.name}:", name, metric_names())


def _offered() -> list[str]:
    """Return the names of the metrics and attacks of installed plug-ins, whether they may be loaded or not."""
    return [offer.name for offer in (*plugins.offers("metric"), *plugins.offers("attack"))]


def read_policy(uri: str, evidence: Evidence) -> Policy:
    """Read a gate policy: a built-in name, a file, an object in the store, or `auto`, by the kind of model."""
    return _policy(default_policy(evidence) if uri == AUTO else uri)


def read_policy_early(uri: str) -> Policy:
    """Read a policy before the kind of model is known; for `auto` one of those that ship, as none lists a plug-in."""
    return _policy(shipped_policies()[0] if uri == AUTO else uri)


def policy_for(uri: str, card: Card) -> Policy:
    """Read a gate policy before there is evidence; `auto` selects by the card."""
    if uri != AUTO:
        return _policy(uri)
    if not isinstance(card, DiffusionCard):
        return _policy("classifier")
    return _policy(policy_of_images(card.task, card.evaluation.suite == "nsfw"))


def policy_digest(uri: str) -> str | None:
    """Return the digest of a policy, which a run is held to; None for `auto`, which comes with the code."""
    return None if uri == AUTO else _policy(uri).digest


def _policy(uri: str) -> Policy:
    return parse(Policy, read_plain(uri), uri) if uri.startswith("s3://") else load_policy(uri)


@contextmanager
def model_folder(reference: str, store_uri: str | None = None) -> Iterator[Path]:
    """Yield a local folder that contains a model; a downloaded one is removed afterwards.

    The reference is a folder; `line` or `line@version` in the store; or `s3://bucket/prefix/line@version`.
    """
    if Path(reference).is_dir():
        yield Path(reference)
        return
    if reference.startswith("s3://"):
        store_uri, _, reference = reference.rpartition("/")
    elif "/" in reference:
        raise UsageError(f"model folder {reference} does not exist", "no folder has this path", "check the path")
    if not store_uri:
        raise UsageError(
            f"{reference} is not a folder",
            "a model line needs a store",
            "give --store s3://bucket/prefix, or set SALUN_STORE_URI",
        )
    store = open_store(store_uri)
    line, version = resolve(store, reference)
    with TemporaryDirectory(prefix="salun-model-") as folder:
        fetch_version(store, line, version, Path(folder) / "model")
        yield Path(folder) / "model"
