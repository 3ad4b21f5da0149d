"""The obstore client of an address, one for each process."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from pipeline.store.credentials import s3_options


@lru_cache(maxsize=32)
def client_of(address: str, pid: int, in_pieces: bool) -> Any:
    """The obstore client of an address.

    Args:
        address: of a store.
        pid: makes it another one in a fork, which may not share connections.
        in_pieces: for large uploads, whose pieces are repeated one by one.
    """
    from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

    if "://" not in address:
        return LocalStore(address)
    parts = urlsplit(address)
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[parts.scheme]
    retry = {"max_retries": 8 if in_pieces else 0, "retry_timeout": timedelta(seconds=60)}
    options = s3_options(address) if parts.scheme == "s3" else {}
    prefix = parts.path.strip("/") or None
    # A large answer may take long, but not without a byte for a minute. Set as plain options, because `client_options`
    # would take the place of what the environment says, AWS_ALLOW_HTTP for instance.
    return kind(parts.netloc, prefix=prefix, retry_config=retry, timeout="1h", read_timeout="60s", **options)
