"""Masks of single objects, as an `images` table holds them, to pixels."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray


def rasterise(segmentation: bytes, width: int, height: int) -> NDArray[np.bool_]:
    """The pixels inside an object's mask as an `images` table holds it, (H, W).

    Args:
        segmentation: COCO's json: polygons, or a run-length encoding, compressed or not.
        width: of the image.
        height: of the image.
    """
    from pycocotools import mask as coco_mask

    shape = json.loads(segmentation)
    if isinstance(shape, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        rle = coco_mask.frPyObjects(shape, height, width)
    else:
        rle = {"size": shape["size"], "counts": shape["counts"].encode()}
    return coco_mask.decode(rle).astype(bool)
