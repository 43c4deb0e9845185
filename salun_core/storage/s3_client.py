"""Builds the S3 client: credentials and endpoint from the environment, bounded retries and timeouts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import boto3.session
from botocore.config import Config

from salun_core.errors import StoreError
from salun_core.storage.s3_errors import translated

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


def make_client(endpoint: str | None = None) -> S3Client:
    """Build a client with bounded retries and timeouts.

    Args:
        endpoint: URL of the store; None takes AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or AWS itself.

    Raises:
        StoreError: the settings in the environment are wrong.
    """
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 5},
        max_pool_connections=64,
        response_checksum_validation="when_supported",  # whatever the environment says: it catches a flipped bit
    )
    try:
        with translated("cannot set up the S3 client", endpoint or "the store"):
            # A session of its own: boto3's default one keeps the first credentials for ever.
            return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:  # botocore's answer to an endpoint that is no URL
        raise StoreError(
            "cannot set up the S3 client",
            str(error),
            "set AWS_ENDPOINT_URL to http://host:port or https://host",
        ) from error


def date_of(headers: Mapping[str, str]) -> datetime | None:
    """Return the server's time of an answer in UTC; None where a proxy dropped it or it is no date."""
    try:
        return parsedate_to_datetime(headers["date"]).astimezone(UTC)
    except (KeyError, ValueError):
        return None
