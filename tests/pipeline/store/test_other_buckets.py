"""Conditional writes on Google's and Azure's storage, against emulators that somebody has started.

No emulator that keeps these conditions can be installed with pip. Start fake-gcs-server or Azurite, make a bucket, and
name it: TESSERA_TEST_GS=gs://bucket (with GOOGLE_* set as obstore reads it), TESSERA_TEST_AZ=az://container
(with AZURE_STORAGE_USE_EMULATOR=true).
"""

from __future__ import annotations

import os
import uuid

import pytest

from pipeline.store.lease import Lease
from pipeline.store.objects import Conflict, Objects
from pipeline.store.store import ArtifactStore
from tests.pipeline.store.conftest import make


@pytest.fixture(params=["GS", "AZ"])
def address(request: pytest.FixtureRequest) -> str:
    variable = f"TESSERA_TEST_{request.param}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no bucket of an emulator (pip has none that keeps conditions on writes)")
    return f"{os.environ[variable]}/{uuid.uuid4().hex[:8]}"


def test_conditions_on_writes_hold(address: str) -> None:
    objects = Objects(address)
    ArtifactStore(address).probe_writable()
    tag = objects.put("a/one", b"one", create=True)
    with pytest.raises(Conflict):
        objects.put("a/one", b"two", create=True)
    objects.put_if("a/one", b"three", tag)
    with pytest.raises(Conflict):
        objects.put_if("a/one", b"four", tag)
    assert objects.get("a/one") == b"three"
    objects.delete(["a/none", "a/one", "a/nothing"])
    assert objects.walk() == []


def test_an_artifact_is_committed_once(address: str) -> None:
    store = ArtifactStore(address)
    first, second = store.begin("images", "abc"), store.begin("images", "abc")
    first.put_file("a.bin", b"first")
    second.put_file("a.bin", b"second")
    assert second.commit().read("a.bin") == b"second"
    assert first.commit().read("a.bin") == b"second"
    assert make(store, "def").rows == 30
    lease, other = Lease(store.objects, "encoder/abc"), Lease(store.objects, "encoder/abc")
    assert lease.try_acquire()
    assert not other.try_acquire()
    lease.release()
