"""The `segment_clusters` stage: k-means on patch features, clusters matched to classes, no label learnt from.

Source: docs/methods.md#cluster-matching. `patch_clusters.py` clusters, `cluster_matching.py` matches.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.stage import Context, Outcome
from stages.evaluate.frozen import FrozenConfig, FrozenStage


class SegmentClustersConfig(FrozenConfig):
    """The protocol's numbers; defaults are Leopart's with as many clusters as classes."""

    clusters: int | None = Field(None, ge=2, description="K; default: as many as there are classes")
    match: Literal["one_to_one", "greedy"] | None = Field(
        None, description="default: one_to_one with as many clusters as classes or fewer, greedy with more"
    )
    by: Literal["pixels", "iou", "precision"] = Field(
        "iou", description="what the match maximises: one_to_one pixels or iou, greedy precision or iou"
    )
    fit_on: Literal["train", "test"] = Field("test", description="whose patches k-means sees, never their labels")
    samples: int = Field(200_000, ge=100, description="patches that k-means sees, the same number of every image")
    pca: int | None = Field(50, ge=1, description="dimensions kept after standardising; null: all")
    iterations: int = Field(50, ge=1, description="of k-means")
    restarts: int = Field(5, ge=1, description="the one of the smallest inertia counts")


class SegmentClusters(FrozenStage[SegmentClustersConfig]):
    """images + features -> metrics miou, pixel_accuracy, mean_accuracy in per cent, one row a class."""

    units = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "%")
    whole_images = True
    Config = SegmentClustersConfig

    def run(self, context: Context) -> Outcome:
        """Clusters, matches and scores.

        Raises: SourceError for a split without usable masks, or with fewer patches than clusters.
        """
        import numpy as np
        import torch

        from stages.data.mask_classes import MaskClasses
        from stages.data.segmented_test import SegmentedTest
        from stages.evaluate.cluster_matching import count_overlaps, match_greedily, match_one_to_one
        from stages.evaluate.patch_clusters import fit, sample_patches
        from stages.evaluate.stored_features import iter_masked, masked_ids

        config, images, features = self.config, context.inputs["images"], context.inputs["features"]
        classes = MaskClasses.of(images)
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        ids = masked_ids(context.name, images, splits)
        count = config.clusters or len(classes.names)
        seen = ids[f"{config.fit_on}_split"]
        patches = sample_patches(features, seen, config.samples, config.seed)
        clusters = fit(
            context.name,
            patches,
            count,
            pca=config.pca,
            iterations=config.iterations,
            restarts=config.restarts,
            seed=config.seed,
        )
        problems: list[dict[str, str]] = []
        found = []
        overlaps = np.zeros((len(classes.names), count), np.int64)
        wanted = ids["test_split"]
        for done, image in enumerate(iter_masked(images, features, classes, set(wanted), problems), 1):
            assigned = clusters.assign(torch.from_numpy(image.map), *image.labels.shape).numpy().astype(np.int16)
            overlaps += count_overlaps(image.labels, assigned, len(classes.names), count)
            path = context.output.scratch / f"{image.image_id}.npy"
            np.save(path, assigned)
            found.append((image.image_id, image.key, image.labels, path))
            context.report_progress(done, len(wanted), "test images")
        greedy = config.match == "greedy" or (config.match is None and count > len(classes.names))
        if greedy:
            mapping = match_greedily(overlaps, "iou" if config.by == "iou" else "precision")
        else:
            mapping = match_one_to_one(overlaps, "iou" if config.by == "iou" else "pixels")
        test = SegmentedTest(classes, wanted)
        for image_id, key, labels, path in found:
            test.add(image_id, key, labels, mapping[np.load(path)])
        notes = {"clusters": count, "match": "greedy" if greedy else "one_to_one", "classes": mapping.tolist()}
        return test.finish(context, config, problems, {"train": len(seen), "patches": len(patches)}, notes)
