"""Draws ViCE's views of one image and finds the regions that all of them show.

Source: docs/methods.md#vice-views.

This runs in the loader's processes. Region ids are those of the `superpixels` table; the label map is cut and resized
with every view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.methods.vice import regions
from stages.pretrain.methods.vice.regions import Frame
from stages.pretrain.methods.vice.settings import ViCESettings
from stages.pretrain.views.draw import draw_colour
from stages.pretrain.views.geometry import crop_affine, to_view
from stages.pretrain.views.plan import Draw, Drawn, ImageRow, Photometric, ViewPlan, ViewSpec
from stages.pretrain.views.render_cpu import cut_labels

NO_MUTUAL_REGION = "no mutual region"  # why an image is skipped


def view_plan(settings: ViCESettings) -> ViewPlan:
    """The views of one size, all with the same colour operations, and the drawer that places them."""
    colours = crop_colours((0.8, 0.8, 0.8, 0.2), blur_p=0.5)
    spec = ViewSpec("view", settings.size, settings.views, flip_p=settings.flip, photometric=colours)
    tables = ("superpixels",) if settings.decomposition == "superpixels" else ()
    return ViewPlan((spec,), tables=tables, drawer=RegionDrawer(settings, colours))  # type: ignore[arg-type]


@dataclass(frozen=True)
class RegionDrawer:
    """The drawer of the view plan: the views of an image, and these extras.

    - regions (V, S, S) int32: the mutual region of each pixel, 0 to n - 1, with the same number in all views. Pixels to
      be filled with noise are `MASKED`, all others -1. If a view is mirrored, so is its map;
    - count () int64: n.

    An image without a mutual region is skipped.
    """

    settings: ViCESettings
    colours: Photometric

    def __call__(self, rng: np.random.Generator, row: ImageRow) -> Drawn:
        """The draws of one image and the extras."""
        settings = self.settings
        frame = self._frame(row)
        # A view may be larger than a square frame: what it shows of the image beyond the frame is outside too.
        within = frame.seen(row.width, row.height) if settings.standard.kind == "square" else None
        squares = self._squares(rng, row, frame)
        draws = []
        for rect in squares:
            flip = bool(rng.random() < settings.flip)
            affine = crop_affine(frame.to_image(rect), settings.size, flip)
            draws.append(Draw("view", affine, settings.size, draw_colour(self.colours, rng), within=within))

        labels, ids = self._labels(row)
        maps = [cut_labels(labels, item) for item in draws]
        shared = frame.to_image(regions.common_rectangle(squares))
        rects = np.rint([to_view(shared, item.affine) for item in draws]).astype(np.int64).clip(0, settings.size)
        masked = self._masked(rng, maps, rects, [x1 - x0 for x0, _, x1, _ in squares], ids)
        rects[0] = (0, 0, settings.size, settings.size)  # in the first view, a region may be anywhere
        kept = regions.mutual(maps, rects, ids)
        for flags in masked:
            kept &= ~flags
        if settings.drop_region_zero:
            kept[:1] = False
        if not kept.any():
            return Drawn([], skipped=NO_MUTUAL_REGION)
        numbered, count = regions.mutual_regions(maps, kept, masked)
        return Drawn(draws, {"regions": numbered, "count": np.array(count)})

    def _frame(self, row: ImageRow) -> Frame:
        """The standardised image of the settings."""
        standard = self.settings.standard
        if standard.kind == "square":
            return regions.square_frame(row.width, row.height, standard.size)
        return regions.padded_frame(row.width, row.height, standard.size, standard.longest)

    def _squares(self, rng: np.random.Generator, row: ImageRow, frame: Frame) -> list[regions.Rectangle]:
        """Where the views lie in the standardised image, the first view first."""
        settings = self.settings
        weights = regions.content_map(regions.standardise(row.pixels(), frame))
        sides = settings.size * rng.uniform(*settings.resize, settings.views)
        x, y = regions.clip_centre(*regions.content_centre(rng, weights), sides[0], frame.width, frame.height)
        squares = [regions.square(x, y, sides[0])]
        for turn, side in enumerate(sides[1:]):
            at = regions.surrounding_centre(rng, x, y, side, turn, settings.views - 1)
            squares.append(regions.square(*regions.clip_centre(*at, side, frame.width, frame.height), side))
        return squares

    def _labels(self, row: ImageRow) -> tuple[NDArray[np.int32], int]:
        """The label map of the stored image, and the number of its ids."""
        if self.settings.decomposition == "pixels":
            count = row.height * row.width
            return np.arange(count, dtype=np.int32).reshape(row.height, row.width), count
        assert row.superpixels is not None  # the reader skips images without
        return row.superpixels, int(row.superpixels.max()) + 1

    def _masked(
        self,
        rng: np.random.Generator,
        maps: list[regions.LabelMap],
        rects: NDArray[np.int64],
        extents: list[int],
        ids: int,
    ) -> list[regions.RegionFlags]:
        """The regions to mask in each view; empty if masking is off.

        Source: docs/methods.md#vice-region-masking.
        """
        mask, size = self.settings.mask, self.settings.size
        if not mask.ratio:
            return []
        common = np.flatnonzero(regions.present(maps[0], rects[0], ids))
        protected = rng.permutation(common)[: int(mask.protected * len(common))]
        masked = []
        for map_, extent in zip(maps, extents, strict=True):
            # Half of the view. The official code takes half of `size` too, but before the view is resized to `size`.
            reach = size / 2 if mask.centre == "view" else size / 2 * size / max(1, extent)
            rectangle = regions.mask_rectangle(rng, size, mask.ratio, reach)
            flags = regions.present(map_, np.array(rectangle), ids)
            flags[protected] = False
            masked.append(flags)
        return masked
