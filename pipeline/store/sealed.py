"""JSON that carries a checksum over its own bytes, so that any damage is noticed, even one in white space.

Manifests are sealed, and so are the store's memos and records. A damaged memo costs a second reading of the files that
it was about; it never leads to a wrong fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

BLANK = "0" * 64  # in the checksum's place while the checksum is computed


class SealBroken(ValueError):
    """Bytes that `seal` did not write, or that were changed since; the message is the reason."""


def seal(fields: Mapping[str, Any]) -> bytes:
    """The bytes of one JSON object of plain types, with the key "checksum" added in front."""
    text = json.dumps({"checksum": BLANK, **fields}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.replace(BLANK, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The object that was sealed, with its checksum.

    Raises:
        SealBroken: the bytes are not what `seal` wrote.
    """
    try:
        raw = json.loads(data)
        checksum = raw["checksum"]
    except (ValueError, KeyError, TypeError):
        raise SealBroken("it is not what Tessera writes, or only a part of it") from None
    if not isinstance(checksum, str) or len(checksum) != len(BLANK):
        raise SealBroken("its checksum is missing")
    blank = data.replace(f'"checksum": "{checksum}"'.encode(), f'"checksum": "{BLANK}"'.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != checksum:
        raise SealBroken("its content differs from its own checksum")
    return dict(raw)
