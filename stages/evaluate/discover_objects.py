"""The `discover_objects` stage: one box an image from patch correlations, without training (LOST).

Source: docs/methods.md#object-discovery. The computation is in `seed_expansion.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Mismatch
from stages.evaluate.frozen import FeatureConfig, FeatureStage

_SHOWN = 12


class DiscoverObjectsConfig(FeatureConfig):
    """The protocol's numbers; defaults are LOST's."""

    split: str | None = Field(None, description="the images of this split only; default: all")
    k: int = Field(100, ge=1, description="patches of the lowest degree that the seed may be expanded by")
    iou: float = Field(0.5, gt=0, le=1, description="with any object of the image, from which a box is right")


class DiscoverObjects(FeatureStage[DiscoverObjectsConfig]):
    """images + features -> metric corloc in per cent, one row an image."""

    units = {"corloc": "%"}
    whole_images = True
    Config = DiscoverObjectsConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Also images without boxes."""
        yield from super().mismatches(feeds)
        images = feeds["images"]
        if images.counts is not None and images.counts.get("objects") == 0:
            yield "images", f"{images.stage} has no object boxes", "ingest with a layout that has boxes (coco, voc)"

    def run(self, context: Context) -> Outcome:
        """Finds and scores the boxes.

        Raises: SourceError where no image has both boxes and features.
        """
        import numpy as np
        import pyarrow as pa
        import torch
        from torchvision.ops import box_iou

        from stages.data.images import decode
        from stages.data.pictures import draw_boxes, grid
        from stages.data.rows import iter_rows
        from stages.data.units import Units, write
        from stages.evaluate.seed_expansion import discover
        from stages.evaluate.stored_features import NO_FEATURES, iter_features

        config, images = self.config, context.inputs["images"]
        there = {}
        for row in iter_rows(images, ["key", "split", "objects", "width", "height"]):
            boxes = [one["box"] for one in row["objects"] or () if not one["crowd"]]
            if boxes and config.split in (None, row["split"]):
                there[row["image_id"]] = (str(row["key"]), np.array(boxes, np.float32), row["width"], row["height"])
        found, rows = Units(), []
        for done, image in enumerate(iter_features(context.inputs["features"], there.keys()), 1):
            key, boxes_N4, width, height = there[image.image_id]
            assert image.map is not None
            cell_h, cell_w = height / image.map.shape[0], width / image.map.shape[1]
            x0, y0, x1, y1 = discover(torch.from_numpy(image.map), config.k)
            box = [x0 * cell_w, y0 * cell_h, x1 * cell_w, y1 * cell_h]
            overlap = box_iou(torch.tensor([box]), torch.from_numpy(boxes_N4)).max().item()
            found.add(key, {"corloc": 100.0 * (overlap >= config.iou)})
            rows.append({"image_id": image.image_id, "key": key, "box": box, "iou": overlap})
            context.report_progress(done, len(there), "images")
        if not rows:
            which = f" of split {config.split!r}" if config.split else ""
            raise SourceError(f"{context.name}: no image{which} has object boxes and features")
        with_features = {row["image_id"] for row in rows}
        problems = [{"key": there[i][0], "reason": NO_FEATURES} for i in sorted(there.keys() - with_features)]
        context.output.put_table(0, pa.Table.from_pylist(rows))
        write(context.output, config, found.metrics(), found)
        picked = rows[:: max(1, len(rows) // _SHOWN)][:_SHOWN]
        boxes_of = {row["image_id"]: row["box"] for row in picked}
        drawn = [
            draw_boxes(decode(row["image"]), np.array([boxes_of[row["image_id"]]]))
            for row in iter_rows(images, ["image"], ids=boxes_of.keys())
        ]
        context.output.put_file(
            "preview.png", grid(drawn, columns=4, captions=[f"IoU {row['iou']:.2f}" for row in picked])
        )
        counts = {"images": len(rows), "unusable": len(problems)}
        return Outcome(metrics=found.metrics(), counts=counts, problems=problems, preview="preview.png")
