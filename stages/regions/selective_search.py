"""The `selective_search` stage: region proposals of every image, for the methods that contrast regions (D3SSL)."""

from __future__ import annotations

from pipeline.stage import Context, Outcome, Resources, Stage
from stages.regions.settings import SelectiveSearchConfig


class SelectiveSearch(Stage[SelectiveSearchConfig]):
    """Boxes of Uijlings et al. (IJCV 2013) by OpenCV, filtered as D3SSL asks, best first."""

    kind = "boxes"
    version = 1
    packages = ("opencv-contrib-python-headless",)
    Config = SelectiveSearchConfig

    def run(self, context: Context) -> Outcome:
        """Writes the boxes of all images, and a contact sheet of some."""
        from stages.data.tables import SCHEMAS
        from stages.map_images.ray_data import map_images
        from stages.regions.proposals import propose_row, show_boxes

        images, settings = context.inputs["images"], self.config.model_copy(update={"resources": Resources()})
        done = map_images(context, images, propose_row, arguments=(settings,), schema=SCHEMAS["boxes"])
        context.output.put_file("preview.png", show_boxes(images, settings))
        boxes, whole = done.counts["total_boxes"], done.counts["whole_image"]
        return Outcome(
            metrics={"boxes_per_image": boxes / done.images},
            counts={"images": done.images, "failed": done.failed, "boxes": boxes, "only_whole_image": whole},
            problems=done.problems,
            preview="preview.png",
        )
