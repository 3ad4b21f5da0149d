"""A bucket whose server throttles, fails, and cuts connections half-way: every operation of the store comes through."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.errors import StoreError
from pipeline.store import patience
from pipeline.store.lease import Lease
from pipeline.store.manifest import MANIFEST
from pipeline.store.objects import Conflict, Objects
from pipeline.store.store import ArtifactStore
from tests.pipeline.store.conftest import make, table
from tests.pipeline.store.faulty_proxy import (
    FAULTS,
    FaultyProxy,
    Request,
    always,
    at_random,
    each,
    faulty_proxy,
    first,
    nothing,
)
from tests.pipeline.workshop import Workshop

SECOND_RUN = "run the same command again"


@pytest.fixture
def proxy(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy between this test and the S3 server; a request is repeated soon, so that tests are short."""
    monkeypatch.setattr(patience, "_LEAST_PAUSE", 0.01)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE", 0.2)
    with faulty_proxy(s3_environment) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.address)
        yield running


@pytest.fixture
def direct(s3_environment: str) -> Any:
    """A client that goes to the server itself: somebody else, who meets no fault."""
    return boto3.client("s3", endpoint_url=s3_environment)


@pytest.fixture
def objects(proxy: FaultyProxy, s3_address: str) -> Objects:
    return Objects(s3_address)


@pytest.fixture
def store(proxy: FaultyProxy, s3_address: str) -> ArtifactStore:
    return ArtifactStore(s3_address)


def key(objects: Objects, path: str) -> dict[str, str]:
    """How boto3 names an object."""
    bucket, _, prefix = objects.address.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": f"{prefix}/{path}"}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_gives_what_it_gives_without_a_fault(
    objects: Objects, proxy: FaultyProxy, fault: str, tmp_path: Path
) -> None:
    big = os.urandom(12_000_000)
    (tmp_path / "big").write_bytes(big)
    proxy.plan = each(fault)
    objects.put("a/one", b"one")
    tagged = objects.get_tagged("a/one")
    assert tagged is not None
    objects.put("a/created", b"first", create=True)
    with pytest.raises(Conflict):
        objects.put("a/created", b"second", create=True)
    objects.put_if("a/one", b"changed", tagged[1])
    with pytest.raises(Conflict):
        objects.put_if("a/one", b"too late", tagged[1])
    objects.put("a/in pieces", tmp_path / "big")
    assert objects.put_moved("b/moved", tmp_path / "big")
    assert objects.get("a/one") == b"changed"
    assert objects.get("a/none") is None
    changed = objects.get_tagged("a/one")
    assert changed is not None
    assert changed[0] == b"changed"
    assert objects.get_range("a/in pieces", 5_000_000, 6_000_000) == big[5_000_000:6_000_000]
    assert b"".join(objects.stream("a/in pieces")) == objects.get("b/moved") == big
    found = objects.head("a/one")
    assert found is not None
    assert found.tag == changed[1]
    assert [one.path for one in objects.walk()] == ["a/created", "a/in pieces", "a/one", "b/moved"]
    assert objects.folders() == ["a", "b"]
    objects.delete(["a/one", "a/none"])
    objects.delete_folder("b")
    assert [one.path for one in objects.walk()] == ["a/created", "a/in pieces"]
    assert proxy.shown[fault] > 15


@pytest.mark.parametrize("fault", ["lost answer", "error after success", "slow down", "cut upload"])
def test_a_commit_whose_answer_is_lost_is_a_commit(store: ArtifactStore, proxy: FaultyProxy, fault: str) -> None:
    proxy.plan = first(2, fault, "PUT", MANIFEST)
    made = make(store)
    assert proxy.shown[fault] == 2
    assert made.manifest.counts == {"images": 30}
    found = store.find("images", "abc")
    assert found is not None
    assert found.manifest.checksum == made.manifest.checksum
    assert store.verify(found) == []
    assert store.objects.walk("images/abc.progress") == []


def test_a_commit_that_another_run_has_won_meanwhile_is_not_taken_for_ones_own(
    store: ArtifactStore, proxy: FaultyProxy, direct: Any
) -> None:
    """The other one commits between this one's first try, which never arrives, and its second."""
    theirs = make(store)
    place = key(store.objects, f"images/abc/{MANIFEST}")
    manifest = direct.get_object(**place)["Body"].read()
    direct.delete_object(**place)
    ours = store.begin("images", "abc")
    for index in range(3):
        ours.put_table(index, table(index))

    def overtake(request: Request) -> str | None:
        if request.method != "PUT" or MANIFEST not in request.path or request.nth:
            return None
        direct.put_object(**place, Body=manifest)
        return "cut upload"

    proxy.requests.clear()
    proxy.plan = overtake
    assert ours.commit(counts={"images": 0}).manifest.checksum == theirs.manifest.checksum
    found = store.find("images", "abc")
    assert found is not None
    assert store.verify(found) == []


def test_of_many_who_create_one_object_one_succeeds_whatever_answers_are_lost(
    objects: Objects, proxy: FaultyProxy
) -> None:
    proxy.plan = at_random(1, 0.6, ("lost answer", "error after success", "slow down", "cut upload"))
    for number in range(10):
        winners: list[bytes] = []

        def create(who: bytes, path: str = f"object {number}", winners: list[bytes] = winners) -> None:
            try:
                objects.put(path, who, create=True)
                winners.append(who)
            except Conflict:
                pass

        threads = [threading.Thread(target=create, args=(f"writer {i}".encode(),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(winners) == 1
        assert objects.get(f"object {number}") == winners[0]
    assert proxy.shown["lost answer"] + proxy.shown["error after success"] > 5


def test_a_lease_is_held_and_renewed_through_faults(store: ArtifactStore, proxy: FaultyProxy) -> None:
    proxy.plan = at_random(2, 0.5)
    lease, other = Lease(store.objects, "encoder/abc", beat=0.05), Lease(store.objects, "encoder/abc")
    assert lease.try_acquire()
    begun = lease.holder()
    deadline = time.monotonic() + 30
    while proxy.shown.total() < 40 and time.monotonic() < deadline:
        time.sleep(0.05)
        assert not other.try_acquire()
        assert not lease.lost
    now = lease.holder()
    assert begun is not None
    assert now is not None
    assert now.token == begun.token
    assert now.beat > begun.beat
    lease.release()
    assert lease.holder() is None
    assert other.try_acquire()
    other.release()


def test_a_reader_goes_on_where_the_connection_broke(objects: Objects, proxy: FaultyProxy) -> None:
    big = os.urandom(12_000_000)
    objects.put("big", big)
    proxy.plan = first(2, "cut download", "GET")
    assert b"".join(objects.stream("big")) == big
    assert proxy.shown["cut download"] == 2
    starts = [int(part.removeprefix("bytes=").rstrip("-")) for _, part in proxy.ranges]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(big)


def test_a_reader_never_mixes_two_contents(objects: Objects, proxy: FaultyProxy, direct: Any) -> None:
    objects.put("big", b"1" * 9_000_000)

    def overwrite(request: Request) -> str | None:
        if request.nth == 0:
            return "cut download"
        direct.put_object(**key(objects, "big"), Body=b"2" * 9_000_000)
        return None

    proxy.plan = overwrite
    proxy.requests.clear()
    with pytest.raises(StoreError, match=r"big was written anew while it was read \(run the same command again\)"):
        b"".join(objects.stream("big"))


@pytest.mark.chaos
def test_a_listing_of_many_pages_goes_on_where_it_broke(objects: Objects, proxy: FaultyProxy, direct: Any) -> None:
    for number in range(1100):
        direct.put_object(**key(objects, f"many/{number:04d}"), Body=b"x")
    proxy.plan = each("cut download")
    assert [one.path for one in objects.walk("many")] == [f"many/{number:04d}" for number in range(1100)]
    assert proxy.shown["cut download"] >= 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("slow down", r"it asks for fewer requests, or is overloaded \(status 503\), tried \d+ times in \d+ s"),
        ("internal error", r"the server fails \(status 5xx\), tried \d+ times in \d+ s"),
        ("cut upload", r"it cannot be reached, tried \d+ times in \d+ s"),
        ("cut download", r"the connection breaks, tried \d+ times in \d+ s"),
    ],
)
def test_a_store_that_stays_away_is_named_and_the_next_attempt_continues(
    store: ArtifactStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    writer = store.begin("images", "abc")
    writer.put_table(0, table(0))
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "1")
    proxy.plan = always(fault)
    began = time.monotonic()
    with pytest.raises(StoreError, match=rf"store {store.address}: cannot \w+ .*: {words} \("):
        writer.commit()
    assert 1 < time.monotonic() - began < 5
    proxy.plan = nothing
    assert store.find("images", "abc") is None
    writer.close()
    again = store.begin("images", "abc")
    assert again.shard_done(0) is not None
    again.put_table(1, table(1))
    assert again.commit().rows == 20


def test_a_server_that_never_answered_is_given_up_sooner(
    proxy: FaultyProxy, s3_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE", 0.5)
    monkeypatch.setattr(patience, "_ANSWERED", set())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"it cannot be reached, tried \d+ times in 1 s \(check the network and the"):
        ArtifactStore(s3_address).find("encoder", "abc")
    assert time.monotonic() - began < 5


def test_a_patience_that_is_no_number_is_refused(objects: Objects, proxy: FaultyProxy, monkeypatch: Any) -> None:
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "long")
    proxy.plan = always("slow down")
    with pytest.raises(StoreError, match="TESSERA_STORE_PATIENCE=long is no number of seconds"):
        objects.get("a")


def contents(workshop: Workshop, store: str) -> dict[str, list[str]]:
    """The checksums of every artifact's files."""
    artifacts = ArtifactStore(store).artifacts()
    return {artifact.name: [entry.sha256 for entry in artifact.manifest.files] for artifact in artifacts}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_a_pipeline_gives_the_same_artifacts_through_faults(
    workshop: Workshop, proxy: FaultyProxy, s3_address: str, seed: int
) -> None:
    workshop.tessera("run", "p.yaml")
    proxy.plan = at_random(seed, 0.4)
    done = dict.fromkeys(("numbers", "scaled", "encoder", "score"), "done")
    assert workshop.states("run", "p.yaml", "--store", s3_address) == done
    assert proxy.shown.total() > 40
    assert contents(workshop, s3_address) == contents(workshop, "store")
    assert workshop.json("artifacts", "verify", "--store", s3_address)["damaged"] == []
    proxy.plan = nothing
    assert ArtifactStore(s3_address).gc(older_than=timedelta(0)) == []
    assert set(workshop.states("run", "p.yaml", "--store", s3_address).values()) == {"cached"}


@pytest.mark.parametrize("after", [60, *(pytest.param(n, marks=pytest.mark.chaos) for n in (25, 90))])
def test_a_run_whose_store_goes_away_ends_with_one_line_and_the_next_one_continues(
    workshop: Workshop, proxy: FaultyProxy, s3_address: str, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    workshop.tessera("run", "p.yaml")
    ran = len(workshop.ran)
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "0.5")
    proxy.plan = lambda request: "slow down" if proxy.requests.total() > after else None
    shown = workshop.tessera("run", "p.yaml", "--store", s3_address, code=1)
    assert "Traceback" not in shown.stderr
    assert SECOND_RUN in shown.stderr
    proxy.plan = nothing
    assert set(workshop.json("artifacts", "verify", "--store", s3_address)["damaged"]) == set()
    whole = set(contents(workshop, s3_address))
    states = workshop.states("run", "p.yaml", "--store", s3_address)
    assert len([state for state in states.values() if state == "cached"]) == len(whole)
    assert contents(workshop, s3_address) == contents(workshop, "store")
    assert len(workshop.ran) - ran <= 5  # one stage at most was computed a second time
