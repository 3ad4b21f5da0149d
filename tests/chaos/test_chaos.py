"""The long random test finds what it is there to find, and kills as many of each kind as it says."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.store.store import ArtifactStore
from tests.chaos.audit import Audit
from tests.chaos.kills import KINDS, make_deck
from tests.chaos.report import Report
from tests.faults.runs import Differences, read_store
from tests.pipeline.store.conftest import flip, make, spoil, table


@pytest.fixture
def stores(tmp_path: Path) -> tuple[ArtifactStore, ArtifactStore]:
    """Two with the same artifact; the second is the undisturbed run's."""
    both = ArtifactStore(tmp_path / "run"), ArtifactStore(tmp_path / "undisturbed")
    for store in both:
        make(store)
    return both


def close(stores: tuple[ArtifactStore, ArtifactStore], audit: Audit | None = None) -> Differences:
    return (audit or Audit("run", stores[0].address)).close(read_store(stores[1].address))


def test_equal_stores_have_no_differences(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    assert not close(stores)


def test_a_missing_artifact_is_lost(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    make(stores[1], "another")
    assert close(stores).lost == ["run: images/another"]


def test_an_artifact_that_was_seen_and_has_gone_is_lost(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    audit = Audit("run", stores[0].address)
    audit.look()
    stores[0].discard("images", "abc")
    audit.look()
    assert audit.lost == ["run: images/abc was committed, and has gone"]


def test_an_artifact_too_many_is_doubled(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    make(stores[0], "another")
    assert close(stores).doubled == ["run: images/another"]


def test_rows_too_many_are_doubled(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    make(stores[0], "rows", shards=4)
    make(stores[1], "rows", shards=3)
    assert close(stores).doubled == ["run: images/rows"]


def test_an_artifact_committed_again_is_doubled(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    audit = Audit("run", stores[0].address)
    audit.look()
    stores[0].discard("images", "abc")
    make(stores[0])
    assert close(stores, audit).doubled == ["run: images/abc was committed twice"]


@pytest.mark.parametrize("file", ["manifest.json", "part-00001.parquet"])
def test_a_spoilt_file_is_half_visible(stores: tuple[ArtifactStore, ArtifactStore], file: str) -> None:
    artifact = stores[0].find("images", "abc")
    assert artifact is not None
    spoil(artifact, file, flip)
    assert close(stores).half_visible


def test_another_content_differs(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    for store, index in zip(stores, (0, 1), strict=True):
        writer = store.begin("boxes", "abc")
        writer.put_table(0, table(index))
        writer.commit()
    assert close(stores).differing == ["run: boxes/abc/part-00000.parquet"]


@pytest.mark.parametrize("kills", [7, 20, 100])
def test_a_tenth_of_the_kills_at_least_is_of_each_kind(kills: int) -> None:
    deck = Counter(make_deck(kills, random.Random(0)))
    assert deck.total() == kills
    assert all(deck[kind] >= kills / 10 for kind in KINDS)


def test_the_figures_say_whether_all_was_survived(tmp_path: Path) -> None:
    report = Report(tmp_path, kills=1, seed=0, completed=1)
    report.killed["store"] = 1
    assert report.good
    report.add(Differences(differing=["run: boxes/abc/part-00000.parquet"]))
    assert not report.good
    report.close()
    assert '"good": false' in (tmp_path / "figures.json").read_text()
