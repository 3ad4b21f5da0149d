"""K-means on standardised, reduced patch features (Leopart's protocol), and the cluster of every pixel.

Source: docs/methods.md#cluster-matching.

Shape legend: N patches, D width, E dimensions after the reduction, K clusters, h w grid, H W sides of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SourceError
from stages.evaluate.stored_features import iter_features

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


@dataclass(frozen=True)
class Clusters:
    """K centres behind a linear map of the features."""

    mean: Tensor  # (D,)
    project: Tensor  # (D, E): standardises and reduces
    centres: Tensor  # (K, E)

    def assign(self, map_hwD: Tensor, height: int, width: int) -> Tensor:
        """The cluster of each pixel, (height, width): the features enlarged bilinearly, then the nearest centre.

        The squared distance to a centre differs from a linear function of the feature by what all centres share, so
        the K values are enlarged in place of the D features: the same clusters for less work.
        """
        reduced_hwE = (map_hwD - self.mean) @ self.project
        score_hwK = reduced_hwE @ self.centres.T - self.centres.square().sum(dim=1) / 2
        enlarged = functional.interpolate(score_hwK.permute(2, 0, 1)[None], (height, width), mode="bilinear")
        return enlarged[0].argmax(dim=0)


def sample_patches(features: Artifact, ids: Sequence[int], samples: int, seed: int) -> NDArray[np.float32]:
    """Patches drawn from every image alike, (N, D), at most `samples`."""
    each = max(1, samples // max(1, len(ids)))
    found = []
    for image in iter_features(features, set(ids)):
        assert image.map is not None
        patches = image.map.reshape(-1, image.map.shape[-1])
        rows = np.random.default_rng((seed, image.image_id)).permutation(len(patches))[:each]
        found.append(patches[np.sort(rows)])
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def fit(
    stage: str,
    patches_ND: NDArray[np.float32],
    count: int,
    *,
    pca: int | None,
    iterations: int,
    restarts: int,
    seed: int,
) -> Clusters:
    """K-means of the patches.

    Args:
        stage: its name in the pipeline, for the error.
        patches_ND: what is clustered.
        count: K.
        pca: E; None keeps D.
        iterations: of k-means.
        restarts: from other centres; the smallest inertia counts.
        seed: of the centres.

    Raises: SourceError for fewer patches than clusters.
    """
    import faiss

    if len(patches_ND) < count:
        raise SourceError(
            f"{stage}: {count} clusters need as many patches, and there are {len(patches_ND)} "
            "(lower clusters, or raise samples)"
        )
    mean_D, deviation_D = patches_ND.mean(axis=0), patches_ND.std(axis=0)
    scaled_ND = (patches_ND - mean_D) / np.maximum(deviation_D, 1e-6)
    project_DE: NDArray[Any] = np.diag(1 / np.maximum(deviation_D, 1e-6))
    if pca is not None and pca < scaled_ND.shape[1]:
        _, vectors_DD = np.linalg.eigh((scaled_ND.T @ scaled_ND / len(scaled_ND)).astype(np.float64))
        project_DE = project_DE @ vectors_DD[:, ::-1][:, :pca]
    reduced_NE = np.ascontiguousarray((patches_ND - mean_D) @ project_DE, np.float32)
    kmeans = faiss.Kmeans(
        reduced_NE.shape[1],
        count,
        niter=iterations,
        nredo=restarts,
        seed=seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=len(reduced_NE),
    )
    kmeans.train(reduced_NE)
    centres = np.asarray(kmeans.centroids, np.float32).reshape(count, -1)
    return Clusters(
        torch.from_numpy(mean_D), torch.from_numpy(project_DE.astype(np.float32)), torch.from_numpy(centres)
    )
