"""Conditional writes on Google's and Azure's storage, with and without lost answers.

Against a server of the tests' own, and against emulators that somebody has started: fake-gcs-server or Azurite with a
bucket, named in TESSERA_TEST_GS=gs://bucket or TESSERA_TEST_AZ=az://container, beside GOOGLE_* or AZURE_* as obstore
reads them.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator

import pytest

from pipeline.store import patience
from pipeline.store.lease import Lease
from pipeline.store.objects import Conflict, Objects
from pipeline.store.store import ArtifactStore
from tests.pipeline.store.conftest import make
from tests.pipeline.store.faulty_proxy import FaultyProxy, each, faulty_proxy, nothing
from tests.pipeline.store.other_servers import other_server

# Azurite's published account; it opens nothing.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with other_server() as address, faulty_proxy(address) as running:
        yield running


@pytest.fixture(params=["gs", "az"])
def objects(request: pytest.FixtureRequest, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setattr(patience, "_LEAST_PAUSE", 0.01)
    account = {"gcs_base_url": proxy.address, "disable_oauth": True, "client_email": "", "private_key": ""}
    for name, value in {
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**account, "private_key_id": ""}),
        "GOOGLE_ALLOW_HTTP": "true",
        "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": f"{proxy.address}/devstoreaccount1",
        "AZURE_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    proxy.plan = nothing
    return Objects(f"{request.param}://tessera/{uuid.uuid4().hex[:8]}")


@pytest.mark.parametrize("fault", [None, "lost answer", "slow down", "error after success"])
def test_conditions_on_writes_hold(objects: Objects, proxy: FaultyProxy, fault: str | None) -> None:
    proxy.plan = each(fault) if fault else nothing
    expect_conditions(objects)


def test_a_lease_is_renewed(objects: Objects, proxy: FaultyProxy) -> None:
    proxy.plan = each("lost answer")
    lease, other = Lease(objects, "encoder/abc", beat=0.05), Lease(objects, "encoder/abc")
    assert lease.try_acquire()
    first = lease.holder()
    assert first is not None
    end = time.monotonic() + 30
    while (now := lease.holder()) == first and time.monotonic() < end:
        time.sleep(0.02)
    assert now is not None
    assert now.beat > first.beat
    assert not other.try_acquire()
    assert not lease.lost
    lease.release()
    assert other.try_acquire()
    other.release()


@pytest.fixture(params=["GS", "AZ"])
def emulated(request: pytest.FixtureRequest) -> str:
    variable = f"TESSERA_TEST_{request.param}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no bucket of an emulator (pip has none that keeps conditions on writes)")
    return f"{os.environ[variable]}/{uuid.uuid4().hex[:8]}"


def test_an_emulator_keeps_conditions_and_commits_an_artifact_once(emulated: str) -> None:
    store = ArtifactStore(emulated)
    store.probe_writable()
    expect_conditions(store.objects)
    first, second = store.begin("images", "abc"), store.begin("images", "abc")
    first.put_file("a.bin", b"first")
    second.put_file("a.bin", b"second")
    assert second.commit().read("a.bin") == b"second"
    assert first.commit().read("a.bin") == b"second"
    assert make(store, "def").rows == 30


def expect_conditions(objects: Objects) -> None:
    objects.put("a/one", b"one", create=True)
    with pytest.raises(Conflict):
        objects.put("a/one", b"two", create=True)
    found = objects.get_tagged("a/one")
    assert found is not None
    objects.put_if("a/one", b"three", found[1])
    with pytest.raises(Conflict):
        objects.put_if("a/one", b"four", found[1])
    with pytest.raises(Conflict):
        objects.put_if("a/none", b"four", found[1])
    assert objects.get("a/one") == b"three"
    objects.delete(["a/none", "a/one", "a/nothing"])
    assert objects.get("a/one") is None
