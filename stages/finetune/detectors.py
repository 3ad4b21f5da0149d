"""Faster and Mask R-CNN from torchvision's parts, on an encoder's maps.

Shape legend: B images, D channels of a map, R regions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.errors import UsageError
from stages.finetune.cascade import CascadeHeads
from stages.finetune.data.examples import LabelledBatch
from stages.finetune.detection import DetectionConfig
from stages.finetune.levels import four_widths
from stages.finetune.model import FinetunedModel
from stages.models.encoder import Encoder

PYRAMID = 256  # channels of a pyramid's levels
RATIOS = (0.5, 1.0, 2.0)  # of the anchors


class Detector(FinetunedModel):
    """An encoder, a neck, region proposals and the heads of boxes and masks.

    Args:
        encoder: where training starts from.
        classes: of objects, without background.
        config: of the stage.
    """

    def __init__(self, encoder: Encoder, classes: int, config: DetectionConfig) -> None:
        super().__init__(encoder, layer_decay=config.layer_decay, batch_norm=config.batch_norm)
        kind = config.neck or ("fpn" if encoder.is_pyramid else "simple")
        _require_kind(encoder, kind)
        necks: dict[str, type[Pyramid | C4 | SimplePyramid]] = {"fpn": Pyramid, "c4": C4, "simple": SimplePyramid}
        self.neck = necks[kind](encoder)
        parts = _c4_parts(encoder, classes, config) if kind == "c4" else _pyramid_parts(classes, config)
        build = MaskRCNN if config.masks else FasterRCNN
        made = build(
            _Widths(self.neck.out_channels),
            rpn_pre_nms_top_n_test=config.proposals,
            rpn_post_nms_top_n_test=config.proposals,
            rpn_pre_nms_top_n_train=2 * config.proposals,
            rpn_post_nms_top_n_train=2 * config.proposals,
            box_batch_size_per_image=config.regions,
            box_detections_per_img=config.detections,
            # Images come sized and normalised; torchvision only batches them.
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            _skip_resize=True,
            **parts,
        )
        self.rpn, self.roi_heads = made.rpn, made.roi_heads
        if kind == "c4":
            self.roi_heads.box_head = RegionStage(pooled=True)
            if config.masks:
                self.roi_heads.mask_head = RegionStage(pooled=False)
        if config.cascade:
            if kind == "c4":
                raise UsageError("cascade: its heads read a pyramid, and neck is c4")
            self.roi_heads = CascadeHeads(
                self.neck.out_channels,
                classes + 1,
                regions=config.regions,
                detections=config.detections,
                masks=made.roi_heads if config.masks else None,
            )
        self._share_last_stage()

    def _share_last_stage(self) -> None:
        """The heads on C4 regions run the encoder's last stage: they hold no copy of it."""
        for head in self.roi_heads.children():
            if isinstance(head, RegionStage):
                head.use(self.trunk)

    def forward_maps(self, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """Levels by name, from fine to coarse."""
        found: OrderedDict[str, Tensor] = self.neck(self.trunk, images_B3HW)
        return found

    def compute_terms(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Losses of region proposals and heads, by torchvision's names."""
        targets = [{"boxes": one["boxes"], "labels": one["labels"] + 1, **_masks(one)} for one in batch.targets]
        images, maps = ImageList(batch.images, batch.sizes), self.forward_maps(batch.images)
        maps = OrderedDict((name, one.float()) for name, one in maps.items())
        with torch.autocast(batch.images.device.type, enabled=False):  # boxes need the precision
            proposals, of_proposals = self.rpn(images, maps, targets)
            _, of_heads = self.roi_heads(maps, proposals, batch.sizes, targets)
        return {**of_proposals, **of_heads}

    @torch.no_grad()
    def detect(self, images_B3HW: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Boxes, labels (0-based), scores and, with masks, (R, 1, 28, 28) mask probabilities of each image.

        Args:
            images_B3HW: normalised, in eval mode.
            sizes: height and width of each within the batch.
        """
        maps = self.forward_maps(images_B3HW)
        proposals, _ = self.rpn(ImageList(images_B3HW, list(sizes)), maps)
        found, _ = self.roi_heads(maps, proposals, list(sizes))
        return [{**one, "labels": one["labels"] - 1} for one in found]


def _masks(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"masks": target["masks"]} if "masks" in target else {}


class Pyramid(nn.Module):
    """Four maps of doubling strides -> five levels of 256 channels (Lin et al. 2017)."""

    out_channels = PYRAMID

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(four_widths(encoder), PYRAMID, extra_blocks=LastLevelMaxPool())

    def forward(self, encoder: Encoder, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """Levels "0" to "3" and "pool"."""
        maps = encoder.levels(images_B3HW)
        levels: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(i), one) for i, one in enumerate(maps)))
        return levels


class SimplePyramid(nn.Module):
    """ViTDet (Li et al. 2022): the last map at 4, 2, 1 and 1/2 times its size, each brought to 256 channels."""

    out_channels = PYRAMID

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        width = encoder.width

        def twice(fan_in: int, fan_out: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(fan_in, fan_out, kernel_size=2, stride=2)

        half, quarter = width // 2, width // 4
        scales = [
            (nn.Sequential(twice(width, half), LayerNorm2d(half), nn.GELU(), twice(half, quarter)), 4),
            (twice(width, half), 2),
            (nn.Identity(), 1),
            (nn.MaxPool2d(2), 1),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width // less, PYRAMID, 1, bias=False),
                LayerNorm2d(PYRAMID),
                nn.Conv2d(PYRAMID, PYRAMID, 3, padding=1, bias=False),
                LayerNorm2d(PYRAMID),
            )
            for scale, less in scales
        )

    def forward(self, encoder: Encoder, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """Levels "0" to "3" and "pool"."""
        map_BDhw = encoder(images_B3HW).map
        found = OrderedDict((str(i), level(map_BDhw)) for i, level in enumerate(self.levels))
        found["pool"] = nn.functional.max_pool2d(found["3"], 1, stride=2)
        return found


class C4(nn.Module):
    """A ResNet's C4 map as it is."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.out_channels = four_widths(encoder)[2]

    def forward(self, encoder: Encoder, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """One level, "0"."""
        return OrderedDict([("0", encoder.stem_to_c4(images_B3HW))])


class RegionStage(nn.Module):
    """The encoder's last stage on regions cut from its C4 map, and their mean where boxes are classified."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self._encoder: list[Encoder] = []  # in a list: the encoder is the detector's part, not this one's

    def use(self, encoder: Encoder) -> None:
        """The encoder whose stage this is."""
        self._encoder = [encoder]

    def forward(self, regions_RDhw: Tensor) -> Tensor:
        """(R, D', h/2, w/2), or (R, D')."""
        maps = self._encoder[0].c5(regions_RDhw)
        return maps.mean(dim=(2, 3)) if self.pooled else maps


class _Widths(nn.Module):
    """What torchvision's constructors ask of a backbone."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


def _pyramid_parts(classes: int, config: DetectionConfig) -> dict[str, Any]:
    return {
        "num_classes": classes + 1,
        "rpn_anchor_generator": AnchorGenerator(tuple((side,) for side in config.anchors), (RATIOS,) * 5),
    }


def _c4_parts(encoder: Encoder, classes: int, config: DetectionConfig) -> dict[str, Any]:
    deep = four_widths(encoder)[3]
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator((tuple(config.anchors),), (RATIOS,)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        "box_head": nn.Identity(),
        "box_predictor": FastRCNNPredictor(deep, classes + 1),
    }
    if config.masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
        parts["mask_head"] = nn.Identity()
        parts["mask_predictor"] = MaskRCNNPredictor(deep, PYRAMID, classes + 1)
    return parts


def _require_kind(encoder: Encoder, kind: str) -> None:
    name = encoder.backbone.name
    if kind == "simple" and encoder.is_pyramid:
        raise UsageError(f"neck: simple is for ViTs, and {name} has maps of several strides: name fpn")
    if kind == "c4" and not encoder.is_resnet:
        raise UsageError(f"neck: c4 is for ResNets, and {name} is none: name another")
    if kind == "fpn" and not encoder.is_pyramid:
        raise UsageError(f"neck: fpn needs maps of several strides, and those of {name} have one: name simple")
