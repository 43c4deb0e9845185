"""Translates botocore's errors into SalUn's: what failed, why, and how to fix it. No message holds a secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as UnreachableError
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError

from salun_core.errors import (
    ConflictError,
    IntegrityError,
    SalunError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from salun_core.storage.s3_settings import both_keys, variable

_NO_ANSWER = (HTTPClientError, UnreachableError)
_CREDENTIALS = "check {keys} (and {token} if you use one)"
_POLICY = "allow this account s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket below the prefix"
_UNKNOWN_KEY = ("the store does not know the access key", _CREDENTIALS)
_REASONS = {
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "InvalidClientTokenId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", _CREDENTIALS),
    "InvalidToken": ("the session token is not valid", _CREDENTIALS),
    "ExpiredToken": ("the credentials have expired", "fetch new credentials and run it again"),
    "AccessDenied": ("the credentials are not allowed to do that", _POLICY),
    "403": ("the credentials are wrong or not allowed to do that", f"{_CREDENTIALS}; {_POLICY}"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock (NTP) and run it again"),
    "NoSuchBucket": ("the bucket does not exist", "create the bucket, or correct its name in the address"),
    "NoSuchKey": ("the object does not exist", "check the key; it may have been deleted"),
    "404": ("the object or the bucket does not exist", "check the bucket and the key"),
    "PermanentRedirect": ("the bucket is in another region", "set {region} to the bucket's region"),
    "NotImplemented": ("the store does not support this operation", "use a store with conditional writes"),
}


def code_of(error: ClientError) -> str:
    """Return S3's error code, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Return the HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: ClientError) -> bool:
    """Return whether the object does not exist."""
    return code_of(error) in {"NoSuchKey", "404"}


def rows_of(page: Any, name: str) -> list[Any]:  # noqa: ANN401 - a page of boto3, of any listing
    """Return the rows of one kind in a page of a listing, which may be empty; KeyError if it is not a listing."""
    page["IsTruncated"]  # noqa: B018
    rows: list[Any] = page.get(name, [])
    return rows


def is_unclear(error: BaseException | None) -> bool:
    """Return whether a write that failed with this error may have been done nevertheless."""
    return isinstance(error, _NO_ANSWER) or (isinstance(error, ClientError) and status_of(error) >= 500)


@contextmanager
def translated(what: str, endpoint: str) -> Iterator[None]:
    """Raise SalUn's errors in place of botocore's; `what` is such as "cannot read s3://bucket/key"."""
    try:
        yield
    # The last two: an answer lacks what it must have, or is no XML. boto3 and s3transfer do not check that.
    except (BotoCoreError, ClientError, Boto3Error, RetriesExceededError, ResponseParserError, KeyError) as error:
        cause = error.__cause__ or error.__context__
        wraps = isinstance(error, Boto3Error) and isinstance(cause, BotoCoreError | ClientError)
        raise _translate(what, endpoint, cause if wraps and cause else error) from error


def _translate(what: str, endpoint: str, error: BaseException) -> SalunError:
    if isinstance(error, ClientError):
        return _refusal(what, error)
    if isinstance(error, FlexibleChecksumError):
        return IntegrityError(what, "the bytes do not match the store's checksum", "restore the object from a copy")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreError(what, "there are no credentials for the store", f"set {both_keys()}")
    if isinstance(error, _NO_ANSWER):
        remedy = f"check that the store runs and that {variable('ENDPOINT_URL')} is right"
        return StoreUnreachableError(what, f"no answer from {endpoint} ({type(error).__name__})", remedy)
    if isinstance(error, RetriesExceededError | IncompleteReadError | ResponseParserError | KeyError):
        return StoreUnreachableError(
            what, "the answer broke off each time", "run it again; check the network if it lasts"
        )
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return StoreError(what, why, "check the settings SALUN_S3_* and AWS_*, and run it again")


def _refusal(what: str, error: ClientError) -> StoreError:
    code, status = code_of(error), status_of(error)
    if code in _REASONS:
        why, remedy = _REASONS[code]
        kind = StoreDeniedError if code == "AccessDenied" else StoreError
        return kind(what, f"{why} ({code})", _named(remedy))
    if status >= 500 or code in {"SlowDown", "Throttling", "RequestTimeout"}:
        remedy = "run it again; check the store's log if it lasts"
        return StoreUnreachableError(what, f"the store is busy or broken ({status} {code})", remedy)
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:200]
    why = f"the store refused it ({status} {code}) {message}".strip()
    return StoreError(what, why, "find the cause in the store's log")


def _named(remedy: str) -> str:
    """Fill in the variables that are in use."""
    return remedy.format(keys=both_keys(), token=variable("SESSION_TOKEN"), region=variable("REGION"))


def conflict(address: str, etag: str | None, *, gone: bool) -> ConflictError:
    """Build the error for a write whose condition was false; an etag of None means that the object existed already."""
    if etag is None:
        remedy = "read it, and choose another name or keep it"
        return ConflictError(f"{address} exists already", "it holds other content", remedy)
    why = "it was deleted meanwhile" if gone else "another writer changed it meanwhile"
    return ConflictError(f"{address} was not replaced", why, "read it again and decide again")
