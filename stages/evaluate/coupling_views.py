"""Pictures that D3SSL's two measures are taken on, made of objects, and the regions in them at every layer.

Source: docs/methods.md#coupling-and-position-bias.

Shape legend: N pairs, B images, S side of an object's tile, D width of a layer, h w its map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from stages.data.images import decode
from stages.data.prepared import prepared
from stages.evaluate.layer_maps import layer_maps
from stages.evaluate.object_bank import SplitObjects
from stages.models.encoder import Encoder
from stages.models.inference import RGB, default_device, squeeze

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


def draw_pairs(labels_N: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Rows of two objects of different classes, (count, 2); the same pair can be drawn twice.

    Raises: ValueError for objects of one class.
    """
    if len(np.unique(labels_N)) < 2:
        raise ValueError("pairs of different classes need objects of two classes")
    generator = np.random.default_rng(seed)
    first = generator.integers(len(labels_N), size=count)
    others = {int(label): np.flatnonzero(labels_N != label) for label in np.unique(labels_N)}
    second = [generator.choice(others[int(labels_N[row])]) for row in first]
    return np.stack([first, np.array(second, np.int64)], axis=1)


def object_tiles(
    images: Artifact, objects: SplitObjects, wanted: set[int], side: int, problems: list[dict[str, str]]
) -> dict[int, RGB]:
    """What the boxes of these objects show, each stretched to side x side pixels, by row.

    Args:
        images: the artifact.
        objects: whose rows `wanted` names.
        wanted: rows.
        side: S.
        problems: grows by an entry for each image that cannot be decoded.
    """
    rows_of: dict[int, list[int]] = {}
    for row in sorted(wanted):
        rows_of.setdefault(int(objects.images[row]), []).append(row)

    def prepare(row: Mapping[str, Any]) -> dict[int, RGB]:
        pixels = decode(row["image"])
        return {one: squeeze(_cut(pixels, objects.boxes[one]), side, side) for one in rows_of[row["image_id"]]}

    tiles: dict[int, RGB] = {}
    for found in prepared(images, ["key", "image"], prepare, set(rows_of), problems=problems):
        tiles |= found
    return tiles


def _cut(pixels: RGB, box_4: NDArray[np.float32]) -> RGB:
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = np.clip(box_4.round(), 0, [width, height, width, height]).astype(int)
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return np.ascontiguousarray(pixels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)])


def side_by_side(left: RGB, right: RGB | None) -> RGB:
    """A tile beside another, or beside nothing, in the middle of a black square of twice their side."""
    side = len(left)
    canvas = np.zeros((2 * side, 2 * side, 3), np.uint8)
    top = side // 2
    canvas[top : top + side, :side] = left
    if right is not None:
        canvas[top : top + side, side:] = right
    return canvas


def pair_boxes(side: int) -> NDArray[np.float32]:
    """Where `side_by_side` puts its tiles, (2, 4)."""
    top = side // 2
    return np.array([[0, top, side, top + side], [side, top, 2 * side, top + side]], np.float32)


def tiled(tile: RGB) -> RGB:
    """The same tile nine times, 3 x 3."""
    return np.tile(tile, (3, 3, 1))


def tile_boxes(side: int) -> NDArray[np.float32]:
    """Where `tiled` puts its tiles, (9, 4), in raster order."""
    corners = np.array([(column, row) for row in range(3) for column in range(3)], np.float32) * side
    return np.concatenate([corners, corners + side], axis=1)


class LayerEncoder:
    """A frozen encoder that gives the mean feature of boxes at every layer (`layer_maps`)."""

    def __init__(self, encoder: Encoder) -> None:
        self.device = default_device()
        self.encoder = encoder.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[RGB], boxes_K4: NDArray[np.float32]) -> dict[str, Tensor]:
        """B pictures of one size -> the features of the same K boxes in each of them by layer, (B, K, D)."""
        images_B3HW = torch.from_numpy(np.stack(pixels)).to(self.device).permute(0, 3, 1, 2).float() / 255
        maps = layer_maps(self.encoder, self.encoder.normalise(images_B3HW))
        (height, width), boxes = images_B3HW.shape[2:], torch.from_numpy(boxes_K4).to(self.device)
        found = {}
        for name, map_BDhw in maps.items():
            (h, w), count = map_BDhw.shape[2:], len(map_BDhw)
            cells = boxes * torch.tensor([w / width, h / height] * 2, device=self.device)
            pooled = roi_align(map_BDhw, [cells] * count, 1, aligned=True)
            found[name] = pooled.reshape(count, len(boxes_K4), -1).cpu()
        return found
