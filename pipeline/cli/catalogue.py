"""The artifacts that a command is about: those of a pipeline, or all of a store, the damaged ones included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactDamaged, ArtifactMissing, ConfigError, UsageError
from pipeline.progress import ProgressCallback
from pipeline.store.artifact import Artifact, Damage
from pipeline.store.store import ArtifactStore

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.run.display import RunDisplay
    from pipeline.store.uses import Verdict


class Catalogue:
    """The artifacts of a pipeline, or without one of a whole store."""

    def __init__(self, store: ArtifactStore, pipeline: Pipeline | None) -> None:
        self.store, self.pipeline = store, pipeline

    @cached_property
    def current(self) -> dict[str, tuple[str, str]]:
        """Stage -> (kind, fingerprint), as the pipeline is now.

        Raises:
            ConfigError: a source is missing.
        """
        if self.pipeline is None:
            return {}
        from pipeline.plan.plan import make_plan

        return {stage.name: (stage.kind, stage.fingerprint) for stage in make_plan(self.pipeline, self.store).stages}

    @cached_property
    def earlier(self) -> dict[str, tuple[str, str]]:
        """Stage -> (kind, fingerprint), as the pipeline was when it last ran. Needs no source."""
        if self.pipeline is None:
            return {}
        from pipeline.plan.history import recall

        return {
            name: (stage.kind, known["fingerprint"])
            for name, stage in self.pipeline.stages.items()
            if (known := recall(self.store, self.pipeline.name, name)) is not None
        }

    @cached_property
    def known(self) -> dict[str, tuple[str, str]]:
        """`current`, or `earlier` where a source is missing."""
        try:
            return self.current
        except ConfigError:  # the file itself is right, so a source is missing; its artifacts may still be there
            return self.earlier

    def names(self) -> list[tuple[str, str]]:
        """(kind, fingerprint) of every artifact in question, whether or not its manifest can be read."""
        if self.pipeline is None:
            whole = [(artifact.kind, artifact.fingerprint) for artifact in self.store.artifacts()]
            broken = [damage.artifact.split("/", 1) for damage in self.store.damaged()]
            return sorted({*whole, *((kind, fingerprint) for kind, fingerprint in broken)})
        return list(dict.fromkeys([*self.known.values(), *self.earlier.values()]))

    def artifacts(self) -> list[Artifact]:
        """The artifacts with a valid manifest."""
        return [artifact for name in self.names() if isinstance(artifact := self.look(*name), Artifact)]

    def look(self, kind: str, fingerprint: str) -> Artifact | Damage | None:
        """The artifact, what is wrong with its manifest, or None when it was never committed."""
        try:
            return self.store.find(kind, fingerprint)
        except ArtifactDamaged as error:
            return Damage(error.artifact, error.file, error.reason)

    def one(self, target: str) -> Artifact:
        """The artifact that `target` names: a stage, kind/fingerprint or the start of it, or an address.

        Raises:
            ArtifactMissing: there is none.
            ArtifactDamaged: its manifest is broken.
            UsageError: several artifacts have a name that begins like this.
        """
        if target in self.known:
            artifact = self.store.find(*self.known[target])
            if artifact is None:
                raise ArtifactMissing(
                    f"stage '{target}' has no artifact yet in {self.store.address} (run the pipeline)"
                )
            return artifact
        text = target.rstrip("/")
        found = [artifact for artifact in self.store.artifacts() if _fits(artifact, text)]
        if not found:
            named = [artifact for artifact in self.store.artifacts() if artifact.manifest.stage == text]
            found = sorted(named, key=lambda artifact: artifact.manifest.created)[-1:]
        if not found:
            stages = f"; stages: {', '.join(self.pipeline.stages)}" if self.pipeline else ""
            raise ArtifactMissing(
                f"nothing in {self.store.address} is called '{target}' (see `tessera artifacts ls`{stages})"
            )
        if len(found) > 1:
            raise UsageError(f"'{target}' fits several: {', '.join(a.name for a in found)} (write more of it)")
        return found[0]


def _fits(artifact: Artifact, text: str) -> bool:
    if text in (artifact.address, artifact.name) or Path(text).absolute() == Path(artifact.address):
        return True
    start = text.partition("/")[2] if text.startswith(f"{artifact.kind}/") else text
    return len(start) >= 4 and "/" not in start and artifact.fingerprint.startswith(start)


def rows(catalogue: Catalogue) -> list[dict[str, Any]]:
    """What `artifacts ls --json` prints."""
    return [
        {
            "kind": artifact.kind,
            "fingerprint": artifact.fingerprint,
            "stage": artifact.manifest.stage,
            "bytes": artifact.bytes,
            "rows": artifact.rows,
            "created": artifact.manifest.created,
            "address": artifact.address,
        }
        for artifact in catalogue.artifacts()
    ]


def unused_artifacts(catalogues: Sequence[Catalogue], also_others: bool) -> Verdict:
    """What may go from a store that these catalogues, each of a pipeline, share.

    Raises:
        ConfigError: a source is missing, so that nobody knows what its pipeline needs.
    """
    from pipeline.store.uses import judge

    store = catalogues[0].store
    needed = {name for catalogue in catalogues for name in catalogue.current.values()}
    names = {catalogue.pipeline.name for catalogue in catalogues if catalogue.pipeline is not None}
    return judge(store.objects, store.artifacts(), needed, names, also_others=also_others)


def verify(catalogue: Catalogue, display: RunDisplay) -> dict[str, Any]:
    """What `artifacts verify --json` prints: how many artifacts were read, and every damaged file.

    `notes` names damaged records and memos of the store. They are made anew, and no artifact needs them.
    """
    records = list(catalogue.store.damaged_records())  # first: a plan replaces those it meets
    damages: list[Damage] = []
    checked = 0
    for kind, fingerprint in catalogue.names():
        report = partial(display.watch, f"reading {kind}/{fingerprint[:12]}")
        found, wrong = _verified(catalogue, kind, fingerprint, report)
        if found is not None:
            checked += 1
            damages += wrong
    return {
        "checked": checked,
        "damaged": [{"artifact": d.artifact, "file": d.file, "reason": d.reason} for d in damages],
        "notes": [{"file": d.file, "reason": d.reason} for d in records],
    }


def _verified(
    catalogue: Catalogue, kind: str, fingerprint: str, report: ProgressCallback
) -> tuple[Artifact | Damage | None, list[Damage]]:
    """An artifact and what is wrong with it. One that was removed or replaced while it was read is not damaged."""
    found = catalogue.look(kind, fingerprint)
    while isinstance(found, Artifact):
        wrong = catalogue.store.verify(found, report)
        now = catalogue.look(kind, fingerprint) if wrong else found
        if not isinstance(now, Artifact) or now.manifest.checksum == found.manifest.checksum:
            return now, ([now] if isinstance(now, Damage) else wrong)
        found = now
    return found, ([found] if isinstance(found, Damage) else [])
