"""Patches that one class covers, drawn of every image, and how well a number tells two kinds of pairs apart.

Source: docs/methods.md#similarity-of-patches.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from pipeline.stage import Context
from stages.data.mask_classes import MaskClasses
from stages.evaluate.in_context import CELL, cell_labels, class_shares
from stages.evaluate.stored_features import iter_masked, masked_ids


def drawn_patches(
    context: Context, split: str, count: int, cover: float, seed: int, problems: list[dict[str, str]]
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Keys, patches (n, D) and classes (n,) of the images of a split.

    Args:
        context: of the stage; its inputs are `images` and `features`.
        split: of the images.
        count: patches of an image, at most.
        cover: the share of its pixels that a patch's class must have.
        seed: of the draws.
        problems: grows by an entry for each image that cannot be used.
    """
    images, features = context.inputs["images"], context.inputs["features"]
    classes = MaskClasses.of(images)
    [ids] = masked_ids(context.name, images, {"test_split": split}).values()
    keys, patches, labels = [], [], []
    for image in iter_masked(images, features, classes, set(ids), problems):
        height, width = image.map.shape[:2]
        resized = cell_labels(image.labels, height, width)
        void = (resized.reshape(height, CELL, width, CELL) < 0).float().mean(dim=(1, 3))
        shares = class_shares(resized, CELL, len(classes.names)) * (1 - void)[..., None]
        most, label = shares.flatten(0, 1).max(dim=1)
        covered = torch.nonzero(most >= cover).flatten().numpy()
        if not len(covered):
            problems.append({"key": image.key, "reason": "no patch of it is covered by one class"})
            continue
        rows = np.sort(np.random.default_rng((seed, image.image_id)).permutation(covered)[:count])
        keys.append(image.key)
        patches.append(torch.from_numpy(image.map.reshape(height * width, -1)[rows]))
        labels.append(label[rows])
    return keys, patches, labels


def auroc(higher: Tensor, lower: Tensor) -> float:
    """The chance that a value of the first kind is above one of the second; ties count half."""
    ranks = rankdata(torch.cat([higher.flatten(), lower.flatten()]).numpy())
    above = ranks[: higher.numel()].sum() - higher.numel() * (higher.numel() + 1) / 2
    return float(above / (higher.numel() * lower.numel()))
