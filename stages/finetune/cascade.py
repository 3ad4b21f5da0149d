"""Cascade R-CNN's heads (Cai and Vasconcelos 2018): three in a row, each on the boxes that the one before has moved.

Each head is torchvision's, with a higher overlap from which a region counts as an object; its boxes are moved in the
same way for all classes. The masks' head learns on the first head's regions, as in detectron2.

Shape legend: R regions of all images, C classes with background.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

OVERLAPS = (0.5, 0.6, 0.7)  # of a region with an object, from which it counts as that object
SCALES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of what moves its box
WEIGHTS = (1.0, 0.5, 0.25)  # of each head's losses

Maps = OrderedDict[str, Tensor]
Sizes = Sequence[tuple[int, int]]  # height and width of each image
Boxes = list[Tensor]  # (R_i, 4) of each image


class CascadeHeads(nn.Module):
    """Three heads in place of torchvision's one.

    Args:
        channels: of the maps.
        classes: C.
        regions: of a training image that each head learns from.
        detections: of a test image at most.
        masks: `RoIHeads` with a masks' head, whose parts are taken; None where masks are not learnt.
    """

    def __init__(self, channels: int, classes: int, *, regions: int, detections: int, masks: RoIHeads | None) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            RoIHeads(
                MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
                TwoMLPHead(channels * 7**2, 1024),
                OneMoveForAll(1024, classes),
                fg_iou_thresh=overlap,
                bg_iou_thresh=overlap,
                batch_size_per_image=regions,
                positive_fraction=0.25,
                bbox_reg_weights=scale,
                score_thresh=0.05,
                nms_thresh=0.5,
                detections_per_img=detections,
            )
            for overlap, scale in zip(OVERLAPS, SCALES, strict=True)
        )
        if masks is not None:
            for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
                setattr(self.heads[0], name, getattr(masks, name))

    def forward(
        self, maps: Maps, proposals: Boxes, sizes: Sizes, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image, or while training the losses."""
        if self.training:
            assert targets is not None
            return [], self._learn(maps, proposals, sizes, targets)
        return self._detect(maps, proposals, sizes), {}

    def _learn(self, maps: Maps, boxes: Boxes, sizes: Sizes, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, head in enumerate(self._each(), 1):
            boxes, matched, labels, moves = head.select_training_samples(list(boxes), targets)
            logits_RC, moved_R4 = _run(head, maps, boxes, sizes)
            for_all = moved_R4.repeat(1, logits_RC.shape[1])
            classifier, box_reg = fastrcnn_loss(logits_RC, for_all, labels, moves)
            losses |= {f"loss_classifier_{number}": classifier, f"loss_box_reg_{number}": box_reg}
            if number == 1 and head.has_mask():
                losses["loss_mask"] = _mask_loss(head, maps, boxes, sizes, targets, matched, labels)
            boxes = _moved(head, moved_R4, boxes, sizes)
        return losses

    def _detect(self, maps: Maps, boxes: Boxes, sizes: Sizes) -> list[dict[str, Tensor]]:
        scores, before = [], boxes
        for head in self._each():
            before = boxes
            logits_RC, moved_R4 = _run(head, maps, boxes, sizes)
            scores.append(logits_RC.softmax(dim=1))
            boxes = _moved(head, moved_R4, boxes, sizes)
        mean_RC = torch.stack(scores).mean(dim=0)
        logits_RC, for_all = mean_RC.clamp(min=1e-12).log(), moved_R4.repeat(1, mean_RC.shape[1])
        found = head.postprocess_detections(logits_RC, for_all, before, sizes)
        detections = [{"boxes": b, "scores": s, "labels": one} for b, s, one in zip(*found, strict=True)]
        first = self._each()[0]
        if first.has_mask():
            regions = first.mask_roi_pool(maps, [one["boxes"] for one in detections], list(sizes))
            logits = first.mask_predictor(first.mask_head(regions))
            for one, masks in zip(
                detections, maskrcnn_inference(logits, [o["labels"] for o in detections]), strict=True
            ):
                one["masks"] = masks
        return detections

    def _each(self) -> list[Any]:
        return list(self.heads)


class OneMoveForAll(nn.Module):
    """Scores of the classes, and one move of the box whatever its class.

    Args:
        width: of a region's features.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.scores, self.move = nn.Linear(width, classes), nn.Linear(width, 4)

    def forward(self, regions_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) logits and (R, 4) moves."""
        return self.scores(regions_RD), self.move(regions_RD)


def _run(head: Any, maps: Maps, boxes: Boxes, sizes: Sizes) -> tuple[Tensor, Tensor]:
    logits_RC, moved_R4 = head.box_predictor(head.box_head(head.box_roi_pool(maps, boxes, list(sizes))))
    return logits_RC, moved_R4


def _moved(head: Any, moved_R4: Tensor, boxes: Boxes, sizes: Sizes) -> Boxes:
    """The boxes that a head gives, cut at the image's border; no gradient goes through them."""
    decoded = head.box_coder.decode(moved_R4.detach(), boxes)[:, 0].split([len(one) for one in boxes])
    return [clip_boxes_to_image(one, size) for one, size in zip(decoded, sizes, strict=True)]


def _mask_loss(
    head: Any,
    maps: Maps,
    boxes: Boxes,
    sizes: Sizes,
    targets: Sequence[dict[str, Tensor]],
    matched: Sequence[Tensor],
    labels: Sequence[Tensor],
) -> Tensor:
    """Of the regions that are objects, as torchvision computes it."""
    objects = [one > 0 for one in labels]
    regions = [one[which] for one, which in zip(boxes, objects, strict=True)]
    logits = head.mask_predictor(head.mask_head(head.mask_roi_pool(maps, regions, list(sizes))))
    which_object = [one[which] for one, which in zip(matched, objects, strict=True)]
    loss: Tensor = maskrcnn_loss(
        logits, regions, [one["masks"] for one in targets], [one["labels"] for one in targets], which_object
    )
    return loss
