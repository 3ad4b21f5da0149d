"""The manifest: what an artifact holds and where it came from. Writing it is what makes a folder an artifact.

It carries a checksum over its own bytes, so that a change of any of them, even of white space, is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.store.sealed import BLANK, SealBroken, seal, unseal

MANIFEST = "manifest.json"
FORMAT = 1  # raised when an older Tessera could not read what a newer one writes


class ManifestBroken(ValueError):
    """Bytes that are no manifest; the message is the reason."""


class FileEntry(BaseModel):
    """One data file of an artifact."""

    model_config = ConfigDict(frozen=True)

    name: str  # what stages call it: "part-00003.parquet", "encoder.safetensors"
    stored: str  # what it is called in the folder: the name with 12 hex digits of its content's hash in it
    size: int = Field(ge=0)  # bytes
    sha256: str
    rows: int | None = None  # of a table
    meta: dict[str, Any] = {}


class Manifest(BaseModel):
    """All of `manifest.json`.

    The store itself uses the first four fields and `files`; the others record where the artifact came from.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = FORMAT
    kind: str
    fingerprint: str
    checksum: str = BLANK  # sha256 over the file's bytes with 64 zeros in this field
    stage: str = ""  # the stage's name in the pipeline that made it
    uses: str = ""  # the stage's type
    version: int = 1  # of the stage's type
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}  # dotted field path -> "kind/fingerprint"
    sources: dict[str, Any] = {}  # dotted field path -> what the source was
    files: list[FileEntry] = []
    columns: dict[str, str] = {}  # of the table its shards make: name -> Arrow type
    rows: int | None = None  # of all shards together
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    problems: list[dict[str, str]] = []
    notes: dict[str, Any] = {}
    preview: str | None = None
    packages: dict[str, str] = {}
    git: dict[str, Any] | str | None = None
    tracking: dict[str, Any] = {}  # the MLflow run
    made_by: dict[str, str] = {}  # "pipeline", "user" and "host"
    created: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    attempt: str = ""  # the writer that committed

    @field_validator("metrics", mode="before")
    @classmethod
    def _null_is_nan(cls, value: Any) -> Any:
        # JSON has no NaN: it is written as null, and a metric that was NaN comes back as NaN.
        return {k: math.nan if v is None else v for k, v in value.items()} if isinstance(value, Mapping) else value

    @property
    def name(self) -> str:
        """Kind and fingerprint with a slash between them: the artifact's folder."""
        return f"{self.kind}/{self.fingerprint}"

    @property
    def size(self) -> int:
        """Bytes of all data files together."""
        return sum(entry.size for entry in self.files)

    def file(self, name: str) -> FileEntry:
        """The entry of a file by its logical or its stored name.

        Raises:
            KeyError: there is no such file.
        """
        for entry in self.files:
            if name in (entry.name, entry.stored):
                return entry
        raise KeyError(name)

    def to_bytes(self) -> bytes:
        """JSON with the checksum filled in."""
        return seal(plain(self.model_dump(exclude={"checksum"})))

    @classmethod
    def from_bytes(cls, data: bytes, kind: str, fingerprint: str) -> Manifest:
        """Read what `to_bytes` wrote.

        Args:
            data: the file's bytes.
            kind: that the file's folder stands for.
            fingerprint: likewise.

        Raises:
            ManifestBroken: with the reason.
        """
        try:
            raw = unseal(data)
        except SealBroken as error:
            raise ManifestBroken(str(error)) from None
        if raw.get("format") != FORMAT:
            raise ManifestBroken(f"it has format {raw.get('format')}, this Tessera reads {FORMAT} (upgrade Tessera)")
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            raise ManifestBroken(
                f"its fields are wrong: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            ) from None
        if (manifest.kind, manifest.fingerprint) != (kind, fingerprint):
            raise ManifestBroken(f"it belongs to {manifest.name}, not to the folder it lies in")
        return manifest


def plain(value: Any, where: str = "manifest") -> Any:
    """The same value in JSON's own types: numpy's values and paths converted, NaN and infinity as null.

    Args:
        value: anything that `Outcome` may hold.
        where: what the error calls it.

    Raises:
        TypeError: something in it cannot be written as JSON; names the place.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"), where)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item, f"{where}.{i}") for i, item in enumerate(items)]
    if isinstance(value, PurePath):
        return str(value)
    for unwrap in ("tolist", "isoformat"):  # numpy scalars and arrays; dates
        if hasattr(value, unwrap):
            return plain(getattr(value, unwrap)(), where)
    raise TypeError(f"{where}: a {type(value).__name__} cannot be written as JSON")
