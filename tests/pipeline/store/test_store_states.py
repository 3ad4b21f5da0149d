"""The store as a state machine (hypothesis): after any sequence of events, an artifact is whole or named as damaged."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from pipeline.errors import ArtifactDamaged
from pipeline.store.lease import Holder, lease_path
from pipeline.store.manifest import MANIFEST
from pipeline.store.owner import Owner, machine
from pipeline.store.store import ArtifactStore
from pipeline.store.writer import ArtifactWriter

FINGERPRINTS = ("aaa", "bbb")
Contents = dict[str, bytes]  # by logical name


def shard(index: int) -> str:
    return f"part-{index:05d}.bin"


class StoreMachine(RuleBasedStateMachine):
    """Several writers of two artifacts live, commit or die, while files are damaged and garbage is collected."""

    writers = Bundle("writers")

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tessera-states-"))
        self.store = ArtifactStore(self.folder)
        self.live: dict[str, dict[str, Contents]] = {name: {} for name in FINGERPRINTS}  # by attempt
        self.dead: dict[str, dict[str, Contents]] = {name: {} for name in FINGERPRINTS}  # that nobody continued yet
        self.committed: dict[str, Contents] = {}
        self.damaged: dict[str, set[str]] = {name: set() for name in FINGERPRINTS}  # names of stored files

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(target=writers, fingerprint=st.sampled_from(FINGERPRINTS))
    def begin(self, fingerprint: str) -> ArtifactWriter:
        """Continues the shards of dead writers, never those of live ones; of several dead ones the youngest counts."""
        writer = self.store.begin("images", fingerprint)
        inherited: Contents = {}
        for attempt in sorted(self.dead[fingerprint]):
            inherited.update(self.dead[fingerprint][attempt])
        self.dead[fingerprint].clear()
        contents: Contents = {}
        for index in range(3):
            entry = writer.shard_done(index, ".bin")
            if entry is not None:
                contents[shard(index)] = inherited[shard(index)]
                assert entry.sha256 == hashlib.sha256(inherited[shard(index)]).hexdigest()
            elif shard(index) in inherited:
                assert fingerprint in self.committed  # then the commit may have removed the file
        self.live[fingerprint][writer._attempt.id] = contents
        return writer

    @rule(
        writer=writers, name=st.sampled_from([shard(0), shard(1), shard(2), "summary.json"]), data=st.binary(max_size=9)
    )
    def put(self, writer: ArtifactWriter, name: str, data: bytes) -> None:
        entry = writer.put_file(name, data)
        self.live[writer.fingerprint][writer._attempt.id][name] = data
        self.damaged[writer.fingerprint].discard(entry.stored)  # the same content heals a damaged file

    @rule(writer=consumes(writers))
    def commit(self, writer: ArtifactWriter) -> None:
        fingerprint = writer.fingerprint
        if MANIFEST in self.damaged[fingerprint]:
            with pytest.raises(ArtifactDamaged, match=MANIFEST):
                writer.commit()
            self.die(writer)
            return
        contents = self.live[fingerprint].pop(writer._attempt.id)
        assert writer.commit().name == f"images/{fingerprint}"
        self.committed.setdefault(fingerprint, contents)  # a later commit returns the first one's artifact
        if not self.live[fingerprint]:
            self.dead[fingerprint].clear()

    @rule(writer=consumes(writers))
    def die(self, writer: ArtifactWriter) -> None:
        """What the others see when a writer is killed: its lease names a dead process, and nothing is cleaned up."""
        assert writer._lease is not None
        writer._lease.release()
        lease = Holder("token", Owner(machine(), "here", 2**22 + 1, "1"), 0.0, 0.0)  # no such process
        self.store.objects.put(lease_path(writer._lease.artifact), lease.to_bytes())
        self.dead[writer.fingerprint][writer._attempt.id] = self.live[writer.fingerprint].pop(writer._attempt.id)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), how=st.sampled_from(["flip", "truncate", "delete"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        fingerprint = data.draw(st.sampled_from(sorted(self.committed)))
        if MANIFEST in self.damaged[fingerprint]:
            return
        artifact = self.store.find("images", fingerprint)
        assert artifact is not None
        names = {entry.stored for entry in artifact.manifest.files if entry.size} | {MANIFEST}
        stored = data.draw(st.sampled_from(sorted(names - self.damaged[fingerprint])))
        path = self.folder / artifact.name / stored
        content = path.read_bytes()
        if how == "delete" and stored != MANIFEST:  # without a manifest there is no artifact: nothing is damaged
            path.unlink()
        elif how == "truncate":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        self.damaged[fingerprint].add(stored)

    @rule(fingerprint=st.sampled_from(FINGERPRINTS))
    def discard(self, fingerprint: str) -> None:
        if not self.live[fingerprint]:
            self.store.discard("images", fingerprint)
            self._forget(fingerprint)

    @rule()
    def collect(self) -> None:
        """gc removes what dead writers left and broken manifests, and nothing else."""
        self.store.gc(older_than=timedelta(0))
        for fingerprint in FINGERPRINTS:
            if self.live[fingerprint]:
                continue
            self.dead[fingerprint].clear()
            if MANIFEST in self.damaged[fingerprint]:
                self._forget(fingerprint)
            left = {found.path.rsplit("/", 1)[1] for found in self.store.objects.walk(f"images/{fingerprint}")}
            artifact = self.store.find("images", fingerprint)
            wanted = {MANIFEST, *(entry.stored for entry in artifact.manifest.files)} if artifact else set()
            assert left <= wanted
            assert self.store.objects.walk(f"images/{fingerprint}.progress") == []

    def _forget(self, fingerprint: str) -> None:
        self.committed.pop(fingerprint, None)
        self.damaged[fingerprint].clear()
        self.dead[fingerprint].clear()

    @invariant()
    def every_artifact_is_whole_or_named(self) -> None:
        broken = {name for name in self.committed if MANIFEST in self.damaged[name]}
        assert {damage.artifact for damage in self.store.damaged()} == {f"images/{name}" for name in broken}
        whole = {artifact.fingerprint: artifact for artifact in self.store.artifacts()}
        assert set(whole) == set(self.committed) - broken
        for fingerprint, artifact in whole.items():
            damaged, contents = self.damaged[fingerprint], self.committed[fingerprint]
            assert {damage.file for damage in self.store.check(artifact)} == damaged
            assert {damage.file for damage in self.store.verify(artifact)} == damaged
            assert {entry.name for entry in artifact.manifest.files} == set(contents)
            for entry in artifact.manifest.files:
                if entry.stored in damaged:
                    with pytest.raises(ArtifactDamaged, match=entry.stored):
                        artifact.read(entry.name)
                else:
                    assert artifact.read(entry.name) == contents[entry.name]


TestStoreStates = StoreMachine.TestCase
TestStoreStates.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
