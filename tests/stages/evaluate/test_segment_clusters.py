"""Clustering of patches: the stage, and the clusters of pixels against features that are enlarged first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from stages.evaluate.patch_clusters import Clusters, fit, sample_patches
from stages.evaluate.segment_clusters import SegmentClusters
from tests.stages.evaluate.conftest import RunStage


def test_colours_are_found_without_labels(run_frozen: RunStage) -> None:
    outcome, _ = run_frozen(SegmentClusters)
    assert outcome.metrics["miou"] > 75
    assert (outcome.notes["clusters"], outcome.notes["match"]) == (3, "one_to_one")
    assert sorted(outcome.notes["classes"]) == [0, 1, 2]


def test_more_clusters_than_classes_are_matched_greedily(run_frozen: RunStage) -> None:
    outcome, _ = run_frozen(SegmentClusters, clusters=8, by="precision", fit_on="train")
    assert outcome.notes["match"] == "greedy"
    assert outcome.metrics["miou"] > 75


def test_more_clusters_than_patches_are_refused(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match="301 clusters need as many patches, and there are 300"):
        run_frozen(SegmentClusters, clusters=301)


def test_assigning_equals_enlarging_the_features_first() -> None:
    generator = torch.Generator().manual_seed(0)
    clusters = Clusters(*(torch.randn(size, generator=generator) for size in ((6,), (6, 4), (5, 4))))
    features = torch.randn(7, 9, 6, generator=generator)
    enlarged = functional.interpolate(features.permute(2, 0, 1)[None], (40, 50), mode="bilinear")[0].permute(1, 2, 0)
    nearest = torch.cdist(((enlarged - clusters.mean) @ clusters.project).flatten(0, 1), clusters.centres).argmin(dim=1)
    assert (clusters.assign(features, 40, 50).flatten() == nearest).float().mean() > 0.999  # but for ties


def test_every_image_gives_as_many_patches(features: Artifact) -> None:
    assert sample_patches(features, [1, 2, 3], 30, seed=0).shape == (30, 3)
    assert sample_patches(features, [1, 2, 3], 10**6, seed=0).shape == (90, 3)


def test_the_reduction_keeps_the_widest_directions() -> None:
    generator = np.random.default_rng(0)
    blobs = np.repeat(np.eye(3, 8) * 9, 100, axis=0) + generator.normal(size=(300, 8))
    clusters = fit("s", blobs.astype(np.float32), 3, pca=2, iterations=20, restarts=3, seed=0)
    assert clusters.project.shape == (8, 2)
    reduced = (torch.from_numpy(blobs).float() - clusters.mean) @ clusters.project
    found = torch.cdist(reduced, clusters.centres).argmin(dim=1).reshape(3, 100)
    assert all(len(set(row.tolist())) == 1 for row in found)
    assert len(set(found[:, 0].tolist())) == 3
