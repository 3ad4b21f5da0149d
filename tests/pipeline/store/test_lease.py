"""Leases on a disk and on S3: one holder at a time, known to those who wait; those of dead processes are taken over."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.store.lease import Holder, Lease, lease_path
from pipeline.store.owner import Owner, machine, this_process
from pipeline.store.store import ArtifactStore


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return ArtifactStore(tmp_path)
    return ArtifactStore(request.getfixturevalue("s3_address"))


def plant(store: ArtifactStore, owner: Owner, beat: float) -> Holder:
    """A lease as another process would have written it."""
    holder = Holder("another", owner, beat, beat)
    store.objects.put(lease_path("encoder/abc"), holder.to_bytes())
    return holder


ELSEWHERE = Owner("another machine", "node-7", 123, "456")


def test_one_holder_at_a_time(store: ArtifactStore) -> None:
    first, second, other = store.lease("encoder", "abc"), store.lease("encoder", "abc"), store.lease("encoder", "def")
    assert first.try_acquire()
    assert first.held
    assert not second.try_acquire()
    assert other.try_acquire()
    holder = second.holder()
    assert holder is not None
    assert holder.owner == this_process()
    first.release()
    first.release()
    assert second.try_acquire()
    second.release()
    other.release()
    assert [found.path for found in store.objects.walk(".tessera/leases") if found.path.endswith(".json")] == []


def test_the_lease_is_given_back_when_the_work_fails(store: ArtifactStore) -> None:
    with pytest.raises(ZeroDivisionError), store.lease("encoder", "abc"):
        1 / 0  # noqa: B018
    assert store.lease("encoder", "abc").try_acquire()


def test_who_waits_is_told_for_whom_and_comes_next(store: ArtifactStore) -> None:
    first, told, got = store.lease("encoder", "abc"), [], threading.Event()
    first.acquire()

    def wait() -> None:
        with store.lease("encoder", "abc", waiting=told.append):
            got.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not told:
        time.sleep(0.01)
    assert not got.is_set()
    first.release()
    waiter.join(timeout=10)
    assert got.is_set()
    assert len(told) == 1
    assert str(told[0]).startswith(f"process {this_process().pid} on {this_process().host}, since ")


def test_many_who_want_a_dead_lease_get_it_one_after_another(store: ArtifactStore) -> None:
    plant(store, Owner(machine(), "here", 2**22 + 1, "1"), time.time())  # no such process
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with store.lease("encoder", "abc"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == 1


def test_a_recycled_process_id_is_not_the_old_process(store: ArtifactStore) -> None:
    plant(store, replace(this_process(), started="1"), time.time())
    assert store.lease("encoder", "abc").try_acquire()


def test_a_silent_process_elsewhere_is_given_up_after_a_while_and_a_beating_one_is_not(store: ArtifactStore) -> None:
    plant(store, ELSEWHERE, time.time())
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.1):
            plant(store, ELSEWHERE, time.time())

    heart = threading.Thread(target=beat)
    heart.start()
    eager = Lease(store.objects, "encoder/abc", beat=0.2)  # gives up after 1.2 s without a beat
    with pytest.raises(StoreError, match="encoder/abc is still being computed by process 123 on node-7"):
        eager.acquire(timeout=2.5)
    beating.set()
    heart.join()
    eager.acquire(timeout=10.0)
    assert eager.held
    eager.release()


def test_a_lease_from_long_ago_is_taken_at_once(store: ArtifactStore) -> None:
    plant(store, ELSEWHERE, time.time() - 3 * 3600)
    assert store.lease("encoder", "abc").try_acquire()


def test_the_holder_beats_and_notices_when_its_lease_is_taken(store: ArtifactStore) -> None:
    lease = Lease(store.objects, "encoder/abc", beat=0.05)
    lease.acquire()
    first = lease.holder()
    deadline = time.monotonic() + 5
    while lease.holder() == first and time.monotonic() < deadline:
        time.sleep(0.02)
    later = lease.holder()
    assert first is not None
    assert later is not None
    assert later.beat > first.beat
    assert later.token == first.token

    thief = plant(store, ELSEWHERE, time.time())
    while not lease.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease.lost
    assert not lease.held
    lease.release()
    assert lease.holder() == thief  # it is not deleted by a process that does not hold it


def test_an_unreadable_lease_is_nobodys(store: ArtifactStore) -> None:
    store.objects.put(lease_path("encoder/abc"), b"{")
    lease = store.lease("encoder", "abc")
    lease.acquire(timeout=5)
    assert lease.held
    lease.release()
