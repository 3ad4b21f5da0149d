"""Detection: which images, how boxes and masks follow their sizes, the detector, and the test by average precision.

Shape legend: B images, N objects of an image, H W sides of an image, R detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pipeline.errors import SourceError
from stages.data.images import decode
from stages.data.object_masks import rasterise
from stages.data.pictures import RGB, draw_boxes, grid
from stages.data.prepared import prepared, split_error
from stages.data.rows import iter_rows
from stages.finetune.average_precision import class_precisions, match
from stages.finetune.cascade import WEIGHTS
from stages.finetune.data.examples import Example, normalised
from stages.finetune.data.placement import Pixels, Placement, jittered, mirrored, scaled_crop, whole
from stages.finetune.detection import DetectionConfig
from stages.finetune.detectors import Detector
from stages.finetune.model import FinetunedModel
from stages.finetune.work import Examples, FinetuneWork, Tested
from stages.models.encoder import Encoder
from stages.training.settings import TrainingConfig

STEP = 32  # a short side is drawn from the multiples of this
LEAST = 1.0  # pixels a side of a box that is learnt from
SHOWN, SHOWN_BOXES, SHOWN_SCORE = 6, 12, 0.3  # test images of the picture, boxes of each, from this score on


@dataclass(frozen=True)
class SizedWithObjects:
    """The whole image at a random size, or scaled into a square, with its objects."""

    config: DetectionConfig

    def __call__(self, row: dict[str, Any], pixels: Pixels, rng: np.random.Generator) -> Example:
        """The example of a row."""
        config, (height, width) = self.config, pixels.shape[:2]
        placed = mirrored(place(rng, width, height, config), rng, config.flip)
        objects = learnable(row["objects"], masks=config.masks)
        boxes_N4 = placed.boxes(np.array([one["box"] for one in objects], np.float32).reshape(-1, 4))
        kept = np.flatnonzero((boxes_N4[:, 2:] - boxes_N4[:, :2] >= LEAST).all(axis=1))
        targets: dict[str, NDArray[Any]] = {
            "boxes": boxes_N4[kept],
            "labels": np.array([objects[i]["category_id"] for i in kept], np.int64),
        }
        if config.masks:
            drawn = [rasterise(objects[i]["mask"], width, height).astype(np.uint8) for i in kept]
            placed_masks = [placed.mask(one, 0) for one in drawn]
            empty = np.zeros((0, placed.size[1], placed.size[0]), np.uint8)
            targets["masks"] = np.stack(placed_masks) if drawn else empty
        return Example(jittered(rng, placed.pixels(pixels), config.colour_jitter), targets)


def place(rng: np.random.Generator, width: int, height: int, config: DetectionConfig) -> Placement:
    """Where a training image lies: all of it at a drawn size, or large-scale jitter in a square."""
    if config.square is not None:
        factor = float(rng.uniform(*config.scale)) * config.square / max(width, height)
        return scaled_crop(rng, width, height, size=config.square, factor=factor)
    low, high = config.short
    choices = [side for side in range(STEP, int(high) + 1, STEP) if side >= low] or [round(low)]
    return whole(width, height, fitted(width, height, int(rng.choice(choices)), config.long))


def fitted(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """Width and height with the short side as asked, or with the long one at its limit."""
    factor = min(short / min(width, height), long / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def learnable(objects: Sequence[Mapping[str, Any]] | None, *, masks: bool) -> list[Mapping[str, Any]]:
    """Objects that are no crowds, with a box that has an area and, where masks are learnt, a mask."""
    return [
        one
        for one in objects or ()
        if not one["crowd"]
        and one["box"][2] > one["box"][0]
        and one["box"][3] > one["box"][1]
        and (not masks or one["mask"] is not None)
    ]


class DetectionWork(FinetuneWork):
    """The `finetune_detection` stage on a rank."""

    Config: ClassVar[type[TrainingConfig]] = DetectionConfig

    @property
    def terms(self) -> dict[str, float]:  # type: ignore[override]
        """A cascade's later heads count less."""
        return {
            f"{name}_{number}": weight
            for number, weight in enumerate(WEIGHTS, 1)
            for name in ("loss_classifier", "loss_box_reg")
        }

    def examples(self) -> Examples:
        """The train images that have an object to learn from."""
        config, images = self.settings, self.inputs["images"]
        rows = iter_rows(images, ["split", "objects"])
        ids = [
            row["image_id"]
            for row in rows
            if row["split"] == config.train_split and learnable(row["objects"], masks=config.masks)
        ]
        if not ids:
            what = "an object with a mask" if config.masks else "a box"
            remedy = "set train_split to a split that has, or ingest with a layout that has objects"
            raise split_error("fine-tuning", images, config.train_split, what, remedy)
        return Examples(ids, ["objects"], SizedWithObjects(config))

    def build(self, encoder: Encoder) -> Detector:
        """The encoder with neck and heads."""
        return Detector(encoder, len(self.classes), self.settings)

    def multiple(self, encoder: Encoder) -> int:
        """Whole patches, or whole cells of the coarsest map."""
        return encoder.stride if encoder.is_vit else 32

    @property
    def classes(self) -> list[str]:
        """Names by category_id."""
        return [str(name) for name in self.inputs["images"].manifest.notes.get("classes", ())]

    def facts(self) -> dict[str, Any]:
        """The classes, and what the detector is."""
        kept = {name: getattr(self.settings, name) for name in ("masks", "cascade", "neck", "anchors", "detections")}
        return {"task": "detection", "classes": self.classes, **kept}

    def test(self, model: FinetunedModel, device: torch.device) -> Tested:
        """Average precision of boxes and, with masks, of masks."""
        assert isinstance(model, Detector)
        config, images, classes = self.settings, self.inputs["images"], self.classes
        rows = iter_rows(images, ["split", "objects"])
        ids = {row["image_id"] for row in rows if row["split"] == config.test_split and row["objects"] is not None}
        problems: list[dict[str, str]] = []
        listed: list[tuple[str, int, int]] = []
        truth: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        shown: list[RGB] = []
        picked = set(np.linspace(0, max(0, len(ids) - 1), SHOWN).round().astype(int).tolist())

        def read(row: Mapping[str, Any]) -> tuple[str, RGB, list[Mapping[str, Any]]]:
            return row["key"], decode(row["image"]), row["objects"]

        for key, pixels, objects in prepared(images, ["key", "image", "objects"], read, ids, problems=problems):
            place_of = len(listed)
            listed.append((key, pixels.shape[1], pixels.shape[0]))
            truth += coco_objects(place_of, objects, pixels.shape[:2], masks=config.masks)
            seen = predict(model, pixels, config, self.multiple(model.trunk), device)
            found += coco_results(place_of, seen)
            if place_of in picked:
                shown.append(_drawn(pixels, seen, classes))
        if not any(not one["iscrowd"] for one in truth):
            unusable = f"{len(problems)} unusable images"
            raise SourceError(f"no image of split {config.test_split!r} has an object to find ({unusable})")
        units = match(listed, truth, found, classes, masks=config.masks)
        counts = np.bincount([one["category_id"] for one in truth if not one["iscrowd"]], minlength=len(classes))
        columns: dict[str, Any] = {"class": classes, "objects": counts}
        for suffix in ("", "_mask") if config.masks else ("",):
            columns[f"ap{suffix}"] = pa.array(class_precisions(units, len(classes), suffix), from_pandas=True)
        return Tested(
            units.metrics(),
            units,
            pa.table(columns),
            {"test": len(listed), "objects": int(counts.sum()), "detections": len(found), "unusable": len(problems)},
            grid(shown, columns=3, title=f"test images: what is found with a score of at least {SHOWN_SCORE}"),
            problems,
        )


def coco_objects(
    image: int, objects: Sequence[Mapping[str, Any]], size: tuple[int, int], *, masks: bool
) -> list[dict[str, Any]]:
    """An image's objects as COCO writes them.

    Args:
        image: its id.
        objects: of the images' table.
        size: (height, width) of the image.
        masks: with their masks; objects without one are left out.
    """
    from pycocotools import mask as coco_mask

    made = []
    for one in objects:
        x0, y0, x1, y1 = (float(value) for value in one["box"])
        if masks and one["mask"] is None:
            continue
        entry = {
            "image_id": image,
            "category_id": int(one["category_id"]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": int(one["crowd"]),
        }
        if masks:
            drawn = rasterise(one["mask"], size[1], size[0])
            entry["segmentation"] = coco_mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
        made.append(entry)
    return made


def coco_results(image: int, seen: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """An image's detections as COCO writes them."""
    from pycocotools import mask as coco_mask

    made = []
    for i, (x0, y0, x1, y1) in enumerate(seen["boxes"].tolist()):
        entry = {
            "image_id": image,
            "category_id": int(seen["labels"][i]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(seen["scores"][i]),
        }
        if "masks" in seen:
            entry["segmentation"] = coco_mask.encode(np.asfortranarray(seen["masks"][i]))
        made.append(entry)
    return made


@torch.no_grad()
def predict(
    model: Detector, pixels: RGB, config: DetectionConfig, multiple: int, device: torch.device
) -> dict[str, NDArray[Any]]:
    """Boxes (R, 4) in the image's own pixels, labels, scores and, with masks, (R, H, W) uint8; best first.

    Args:
        model: in eval mode.
        pixels: of the image.
        config: how it is tested.
        multiple: see `DetectionWork.multiple`.
        device: of the model.
    """
    height, width = pixels.shape[:2]
    short, long = (config.test_short, config.test_long) if config.square is None else (config.square,) * 2
    placed = whole(width, height, fitted(width, height, short, long))
    image = torch.from_numpy(placed.pixels(pixels))
    size = (placed.size[1], placed.size[0])
    [found] = model.detect(normalised([image], model.trunk.mean, model.trunk.std, multiple, device), [size])
    scale = torch.tensor([width / placed.size[0], height / placed.size[1]] * 2, device=device)
    boxes_R4 = found["boxes"] * scale
    seen = {
        "boxes": boxes_R4.cpu().numpy(),
        "labels": found["labels"].cpu().numpy(),
        "scores": found["scores"].cpu().numpy(),
    }
    if "masks" in found:
        pasted = paste_masks_in_image(found["masks"], boxes_R4, (height, width))
        seen["masks"] = (pasted.reshape(-1, height, width) >= 0.5).byte().cpu().numpy()
    return seen


def _drawn(pixels: RGB, seen: Mapping[str, NDArray[Any]], classes: Sequence[str]) -> RGB:
    kept = np.flatnonzero(seen["scores"] >= SHOWN_SCORE)[:SHOWN_BOXES]
    labels = [f"{classes[seen['labels'][i]]} {seen['scores'][i]:.2f}" for i in kept]
    return draw_boxes(pixels, seen["boxes"][kept], labels)
