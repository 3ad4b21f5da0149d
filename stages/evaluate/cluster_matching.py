"""Which class a cluster of pixels stands for, when a segmentation without labels is scored.

Source: docs/methods.md#cluster-matching.

Cluster ids are matched to classes on the pixels that are scored, one to one or many to one, and protocols differ in
what the match maximises: a score must say which match it comes from.

Shape legend: C classes, K clusters; counts[t, k] are pixels of true class t in cluster k.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from stages.data.confusion import Matrix

Counts = NDArray[np.int64]  # (C, K)
ClusterClasses = NDArray[np.int64]  # (K,) the class of each cluster
ONE_TO_ONE_REST = 0  # the class of clusters that a one-to-one match leaves over (Leopart)


def count_overlaps(truth: NDArray[Any], clusters: NDArray[Any], classes: int, count: int) -> Counts:
    """Pixels by class and cluster, (C, K); the counts of several images add up.

    Args:
        truth: class index of each pixel, any shape; negative ones are ignored.
        clusters: cluster index of each pixel, same shape.
        classes: C.
        count: K.
    """
    counted = truth >= 0
    index = truth[counted].astype(np.int64) * count + clusters[counted]
    return np.bincount(index, minlength=classes * count).reshape(classes, count)


def match_one_to_one(counts_CK: Counts, by: Literal["pixels", "iou"] = "pixels") -> ClusterClasses:
    """The Hungarian match: at most one cluster a class. The two criteria can differ.

    Args:
        counts_CK: what `count_overlaps` gave.
        by: pixels, the most pixels in agreement (PiCIE, STEGO); iou, the largest sum of IoUs (Leopart).

    Returns: the class of each cluster; clusters that are left over, where K > C, get class 0.
    """
    classes, clusters = linear_sum_assignment(counts_CK if by == "pixels" else overlap_ious(counts_CK), maximize=True)
    mapping = np.full(counts_CK.shape[1], ONE_TO_ONE_REST, np.int64)
    mapping[clusters] = classes
    return mapping


def match_greedily(counts_CK: Counts, by: Literal["precision", "iou"] = "precision") -> ClusterClasses:
    """Every cluster's best class; several clusters may share one. The protocol of over-clustering, K > C.

    Args:
        counts_CK: what `count_overlaps` gave.
        by: precision, the class of most of its pixels (ViCE); iou (Leopart's default). The lower class wins a tie.
    """
    return (counts_CK if by == "precision" else overlap_ious(counts_CK)).argmax(axis=0).astype(np.int64)


def merge_clusters(counts_CK: Counts, mapping: ClusterClasses) -> Matrix:
    """The confusion matrix (C, C) of the mapped prediction: the input of `confusion.scores`."""
    classes = len(counts_CK)
    merged = np.zeros((classes, classes), np.int64)
    np.add.at(merged.T, mapping, counts_CK.T)
    return merged


def overlap_ious(counts_CK: Counts) -> NDArray[np.float64]:
    """IoU of every class with every cluster, (C, K); 0 where both are empty."""
    union = counts_CK.sum(axis=1, keepdims=True) + counts_CK.sum(axis=0, keepdims=True) - counts_CK
    return counts_CK / np.maximum(union, 1)
