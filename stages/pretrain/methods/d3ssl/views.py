"""Draws D3SSL's views of one image and the regions that both of them show.

Source: docs/methods.md#d3ssl-views.

This runs in the loader's processes. It draws numbers only; method.py applies them to whole batches.

Views: 1 the whole image, 2 a crop, 2s the crop at a smaller size, 3 the crop's regions moved.

Shape legend: K proposals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.pretrain.methods.d3ssl.proposals import (
    FloatBoxes,
    Numbers,
    WholeBoxes,
    between,
    common_shift,
    context_rectangles,
    jittered,
    proposal_cutout,
    random_cutout,
    whole_boxes,
)
from stages.pretrain.methods.d3ssl.settings import D3SSLSettings
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.draw import draw_views
from stages.pretrain.views.geometry import clip_to_view
from stages.pretrain.views.plan import Draw, Drawn, ImageRow, ViewPlan, ViewSpec

CROP_TRIES = 10  # if so many crops show no box, the whole image is taken as the only box


def view_plan(settings: D3SSLSettings) -> ViewPlan:
    """View 1 is the whole image with SoCo's first colours, view 2 a crop with SoCo's second colours.

    Source: docs/methods.md#d3ssl-views.
    """
    strength = (0.4, 0.4, 0.2, 0.1)
    whole = ViewSpec(
        "whole", settings.size, flip_p=settings.flip, photometric=crop_colours(strength, blur_p=1.0), whole=True
    )
    crop = ViewSpec(
        "crop",
        settings.size,
        scale=settings.crop_scale,
        flip_p=settings.flip,
        photometric=crop_colours(strength, blur_p=0.1, solarize_p=0.2),
    )
    return ViewPlan((whole, crop), tables=("boxes",), drawer=ProposalDrawer(settings, whole, crop))


@dataclass(frozen=True)
class ProposalDrawer:
    """The drawer of the view plan: views 1 and 2 of an image, and these extras.

    - boxes (4, K, 4) float32: the jittered boxes for RoIAlign in views 1, 2, 2s and 3, in pixels of each view;
    - cuts (3, 2K, 4) int16: the cut-outs of views 1, 2s and 3, as operations (see `proposals.proposal_cutout`);
    - regions (2, 2K, 4) int16: of views 1 and 2s, the boxes and then the mask's rectangles;
    - moved (K, 4) int16: the regions of view 3;
    - shift (2,) int64: by how much they were moved from their place in view 2, dx and dy in pixels;
    - whole () bool: whether there was no box to use, so that the whole image is used as the box.
    """

    settings: D3SSLSettings
    whole: ViewSpec
    crop: ViewSpec

    def __call__(self, rng: np.random.Generator, row: ImageRow) -> Drawn:
        """The draws of one image and the extras."""
        settings, size = self.settings, self.settings.size
        [view1] = draw_views([self.whole], rng, row.width, row.height)
        view2, boxes_K4, whole = self._crop_with_boxes(rng, row, view1)
        boxes1_K4, _ = clip_to_view(boxes_K4, view1.affine, size)
        boxes2_K4, _ = clip_to_view(boxes_K4, view2.affine, size)
        boxes2s_K4 = boxes2_K4 * (settings.small_size / size)

        pixels2_K4 = whole_boxes(boxes2_K4, size)
        shift_2 = common_shift(pixels2_K4, rng.random(2), size)
        moved_K4, boxes3_K4 = pixels2_K4 + np.tile(shift_2, 2), (boxes2_K4 + np.tile(shift_2, 2)).clip(0, size)

        sizes, views = (size, size, settings.small_size, size), (boxes1_K4, boxes2_K4, boxes2s_K4, boxes3_K4)
        numbers = rng.random((4, settings.proposals, 4))
        rois = [
            jittered(boxes, numbers[i], sizes[i], settings.jitter.ratio, settings.jitter.kind)
            for i, boxes in enumerate(views)
        ]
        pixels1_K4, pixels2s_K4 = whole_boxes(boxes1_K4, size), whole_boxes(boxes2s_K4, settings.small_size)
        cut = ((pixels1_K4, size), (pixels2s_K4, settings.small_size), (moved_K4, size))
        numbers = rng.random((3, settings.proposals, 4))
        cuts = [self._cutout(boxes, numbers[i], side) for i, (boxes, side) in enumerate(cut)]
        numbers = rng.random((2, settings.proposals, 3))
        regions = [
            np.concatenate(
                [boxes, context_rectangles(boxes, numbers[i], side, settings.mask.scale, settings.mask.aspect)]
            )
            for i, (boxes, side) in enumerate(cut[:2])
        ]
        extras: dict[str, NDArray[Any]] = {
            "boxes": np.stack(rois).astype(np.float32),
            "cuts": np.stack(cuts).astype(np.int16),
            "regions": np.stack(regions).astype(np.int16),
            "moved": moved_K4.astype(np.int16),
            "shift": shift_2,
            "whole": np.array(whole),
        }
        return Drawn([view1, view2], extras)

    def _crop_with_boxes(self, rng: np.random.Generator, row: ImageRow, view1: Draw) -> tuple[Draw, FloatBoxes, bool]:
        """A crop, K boxes (in pixels of the image) that views 1 and 2 both show, and whether there was none to use.

        A crop that shows fewer than K / 2 different boxes is drawn again. Each new crop needs half as many, but at
        least one. If no crop shows any, the whole image is used as the box.
        """
        size, least = self.settings.size, self.settings.min_side
        all_boxes = np.asarray(row.boxes if row.boxes is not None else (), np.float64).reshape(-1, 4)
        _, in_view1 = clip_to_view(all_boxes, view1.affine, size, least)
        candidates = all_boxes[in_view1]
        wanted = self.settings.proposals / 2
        for _ in range(CROP_TRIES if len(candidates) else 1):
            [view2] = draw_views([self.crop], rng, row.width, row.height)
            _, in_view2 = clip_to_view(candidates, view2.affine, size, least)
            common = candidates[in_view2]
            if len(common) >= max(1.0, wanted):
                order = rng.permutation(len(common))
                return view2, common[np.resize(order, self.settings.proposals)], False
            wanted /= 2
        image = np.array([[0, 0, row.width, row.height]], np.float64)
        return view2, image.repeat(self.settings.proposals, 0), True

    def _cutout(self, boxes_K4: WholeBoxes, numbers_K4: Numbers, size: int) -> WholeBoxes:
        """The operations of the settings' kind of cut-out, (2K, 4)."""
        cutout = self.settings.cutout
        if cutout.kind == "random":
            return random_cutout(boxes_K4, numbers_K4, size)
        if cutout.kind == "none":
            return np.zeros((2 * len(boxes_K4), 4), np.int64)
        draws_K3 = np.column_stack([between(numbers_K4[:, 0], cutout.ratio), numbers_K4[:, 1:3]])
        return proposal_cutout(boxes_K4, draws_K3, size, cutout.threshold)
