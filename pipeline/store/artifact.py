"""A finished artifact: immutable, described by its manifest, readable from any node."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ArtifactDamaged, ArtifactMissing
from pipeline.store.local_cache import WRONG_CONTENT, cache_folder, local_copy, wrong_size
from pipeline.store.manifest import MANIFEST, FileEntry, Manifest, ManifestBroken
from pipeline.store.objects import Objects


@dataclass(frozen=True)
class Damage:
    """One file that is not what the manifest says."""

    artifact: str  # "kind/fingerprint"
    file: str  # as it is called in the folder
    reason: str

    def __str__(self) -> str:
        return f"{self.artifact}: {self.file}: {self.reason}"


@dataclass(frozen=True)
class Artifact:
    """What a stage reads. Picklable; hand it to Ray tasks as it is."""

    objects: Objects
    manifest: Manifest

    @property
    def kind(self) -> str:
        """What sort of thing it is: the folder above its own."""
        return self.manifest.kind

    @property
    def fingerprint(self) -> str:
        """What tells it from others of its kind: its folder's name."""
        return self.manifest.fingerprint

    @property
    def name(self) -> str:
        """Kind and fingerprint with a slash between them."""
        return self.manifest.name

    @property
    def address(self) -> str:
        """The folder's address."""
        return self.objects.join(self.name)

    @property
    def rows(self) -> int:
        """Rows of the table its shards make; 0 when it holds none."""
        return self.manifest.rows or 0

    @property
    def bytes(self) -> int:
        """Size of its data files together."""
        return self.manifest.size

    @classmethod
    def open(cls, store: str, kind: str, fingerprint: str) -> Artifact:
        """A committed artifact by the address of its store and its name there.

        Raises:
            ArtifactMissing: when it is not there.
            ArtifactDamaged: when its manifest is broken.
        """
        artifact = load(Objects(store), kind, fingerprint)
        if artifact is None:
            raise ArtifactMissing(f"{kind}/{fingerprint} is not in {store} (run the stage that makes it)")
        return artifact

    def __hash__(self) -> int:
        return hash((self.objects, self.manifest.name, self.manifest.checksum))

    def __repr__(self) -> str:
        return f"Artifact({self.address!r})"

    def shards(self) -> Iterator[FileEntry]:
        """The entries of its table's shards, in order."""
        return (entry for entry in self.manifest.files if is_shard(entry.name))

    def file(self, name: str) -> FileEntry:
        """The entry of a file by its logical name.

        Raises:
            ArtifactMissing: the artifact holds no such file.
        """
        try:
            return self.manifest.file(name)
        except KeyError:
            held = ", ".join(entry.name for entry in self.manifest.files[:8])
            raise ArtifactMissing(f"artifact {self.name} has no file {name} (it holds {held or 'nothing'})") from None

    def read(self, name: str) -> builtins.bytes:
        """All of one file, checked against the manifest.

        Raises:
            ArtifactDamaged: the file is missing, or is not what the manifest says.
        """
        entry = self.file(name)
        data = self.objects.get(f"{self.name}/{entry.stored}")
        if data is None:
            raise ArtifactDamaged(self.name, entry.stored, "it is missing")
        if len(data) != entry.size:
            raise ArtifactDamaged(self.name, entry.stored, wrong_size(len(data), entry))
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtifactDamaged(self.name, entry.stored, WRONG_CONTENT)
        return data

    def local(self, name: str) -> Path:
        """A local path of one file, checked against the manifest once on every machine.

        The file must not be changed: it may be the store's own.

        Raises:
            ArtifactDamaged: the file is missing, or is not what the manifest says.
        """
        return local_copy(self.objects, self.name, self.file(name))

    @property
    def cache(self) -> Path:
        """This machine's folder for what is derived from stored files; anything in it may be deleted at any time."""
        return cache_folder()


def is_shard(name: str) -> bool:
    """Whether a logical name is that of a shard, "part-00003.parquet"."""
    return name.startswith("part-") and name[5:10].isdigit()


def load(objects: Objects, kind: str, fingerprint: str) -> Artifact | None:
    """The artifact of a folder; None without a manifest.

    Raises:
        ArtifactDamaged: the manifest itself is broken.
    """
    data = objects.get(f"{kind}/{fingerprint}/{MANIFEST}")
    if data is None:
        return None
    try:
        return Artifact(objects, Manifest.from_bytes(data, kind, fingerprint))
    except ManifestBroken as error:
        raise ArtifactDamaged(f"{kind}/{fingerprint}", MANIFEST, str(error)) from None
