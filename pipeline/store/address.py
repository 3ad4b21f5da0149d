"""Addresses of stores and sources: a folder, or a bucket with a prefix; checked, in one form, without secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import StoreError
from pipeline.paths import local_path

SCHEMES = ("s3", "gs", "az")
_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


def mask(address: str) -> str:
    """The address without what could be a secret, for messages and logs."""
    address = re.sub(r"(?<=://)[^/@]*@", "***@", address)
    return re.sub(r"\?.*$", "?***", address, flags=re.DOTALL)


def normalised(address: str) -> tuple[str, Path | None]:
    """The address without a trailing slash, and the local folder that it stands for (None for a bucket).

    Raises:
        StoreError: it is not the address of a store.
    """
    text = str(address)
    scheme = text.split("://", 1)[0] if "://" in text else ""
    if scheme in ("", "file"):
        if not str(text).strip():
            raise StoreError("store: the address is empty (name a folder, or s3://bucket/prefix)")
        folder = Path(os.path.abspath(local_path(unquote(text[len("file://") :]) if scheme else text)))
        return str(folder), folder
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreError(f"store {mask(text)}: {scheme}:// is no kind of store (use a folder, file://, {known})")
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query:
        raise StoreError(
            f"store {mask(text)}: an address may not carry credentials or options, it is written into every manifest "
            f"(set them in the environment: {_ENVIRONMENT[scheme]})"
        )
    if not parts.netloc:
        raise StoreError(f"store {text}: the bucket's name is missing (write {scheme}://bucket/prefix)")
    return f"{scheme}://{parts.netloc}/{parts.path.strip('/')}".rstrip("/"), None
