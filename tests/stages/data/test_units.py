"""What a score is made of, stored, and drawn again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.stage import StageConfig
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.confusion import scores
from stages.data.units import Units, keys_of, resample, write

Store = Callable[[str, Units], Artifact]


@pytest.fixture
def stored(store: ArtifactStore) -> Store:
    def put(fingerprint: str, units: Units) -> Artifact:
        writer = store.begin("metrics", fingerprint)
        write(writer, StageConfig(), units.metrics(), units)
        return writer.commit(metrics=units.metrics())

    return put


def hits(values: list[float], weights: list[float]) -> Units:
    units = Units()
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        units.add(f"{i}.jpg", {"top1": value}, weight)
    return units


def test_a_weighted_mean_and_its_bootstrap(stored: Store) -> None:
    generator = np.random.default_rng(0)
    values, weights = generator.random(200).tolist(), generator.integers(1, 4, 200).astype(float).tolist()
    artifact = stored("m1", hits(values, weights))
    assert artifact.manifest.metrics["top1"] == pytest.approx(np.average(values, weights=weights))
    drawn = resample(artifact, 2000, seed=1)["top1"]
    by_hand = np.random.default_rng(7).integers(0, 200, (2000, 200))  # another way to draw the same thing
    expected = [np.average(np.array(values)[rows], weights=np.array(weights)[rows]) for rows in by_hand]
    assert drawn.mean() == pytest.approx(np.mean(expected), abs=2e-3)
    assert drawn.std() == pytest.approx(np.std(expected), rel=0.1)


def test_the_same_units_are_drawn_alike(stored: Store) -> None:
    one, other = (resample(stored(name, hits([0, 1, 1, 0], [1, 1, 1, 1])), 50, seed=3)["top1"] for name in "ab")
    assert np.array_equal(one, other)
    assert len(set(one.tolist())) > 1


def test_confusion_matrices_are_summed_over_the_drawn_images(stored: Store) -> None:
    generator = np.random.default_rng(0)
    matrices = [generator.integers(0, 40, (3, 3)) * (generator.random((3, 3)) < 0.7) for _ in range(12)]
    units = Units()
    for i, matrix in enumerate(matrices):
        units.add_matrix(f"{i}.png", matrix)
    artifact = stored("m1", units)
    assert artifact.manifest.metrics == scores(np.sum(matrices, axis=0)).metrics()
    drawn = resample(artifact, 5, seed=1)
    times: Any = np.random.default_rng((1, 12)).multinomial(12, np.full(12, 1 / 12), size=5)
    for draw in range(5):
        total = sum(int(n) * matrix for n, matrix in zip(times[draw], matrices, strict=True))
        assert {name: values[draw] for name, values in drawn.items()} == pytest.approx(scores(total).metrics())
    assert keys_of(artifact)[:2] == ["0.png", "1.png"]


def test_an_artifact_that_keeps_no_units_gives_nothing(store: ArtifactStore) -> None:
    writer = store.begin("metrics", "bare")
    writer.put_file("metrics.json", b"{}")
    artifact = writer.commit(metrics={"top1": 50.0})
    assert resample(artifact, 10, seed=0) == {}
    assert keys_of(artifact) == []


def test_a_class_that_is_absent_counts_in_the_draws_as_in_the_score(stored: Store) -> None:
    matrix = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    drawn = {}
    for absent in ("skip", "zero"):
        units = Units(absent)  # type: ignore[arg-type]
        for i in range(3):
            units.add_matrix(f"{i}.png", matrix)
        artifact = stored(absent, units)
        assert artifact.manifest.metrics["miou"] == pytest.approx(scores(matrix, absent).miou)  # type: ignore[arg-type]
        drawn[absent] = resample(artifact, 3, seed=0)["miou"]
        assert drawn[absent] == pytest.approx(artifact.manifest.metrics["miou"])
    assert drawn["zero"][0] == pytest.approx(drawn["skip"][0] * 2 / 3)
