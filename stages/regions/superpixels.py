"""The `superpixels` stage: a map of small coherent regions of every image, for methods that pool over them (ViCE)."""

from __future__ import annotations

from pipeline.stage import Context, Outcome, Resources, Stage
from stages.regions.settings import SuperpixelsConfig


class Superpixels(Stage[SuperpixelsConfig]):
    """SLIC and its relatives by OpenCV, labels 0..n-1 without gaps; defaults are ViCE's."""

    kind = "superpixels"
    version = 1
    packages = ("opencv-contrib-python-headless",)
    Config = SuperpixelsConfig

    def run(self, context: Context) -> Outcome:
        """Writes the maps of all images, and a contact sheet of some."""
        from stages.data.tables import SCHEMAS
        from stages.map_images.ray_data import map_images
        from stages.regions.segments import segment_row, show_superpixels

        images, settings = context.inputs["images"], self.config.model_copy(update={"resources": Resources()})
        done = map_images(context, images, segment_row, arguments=(settings,), schema=SCHEMAS["superpixels"])
        context.output.put_file("preview.png", show_superpixels(images, settings))
        return Outcome(
            metrics={"superpixels_per_image": done.counts["superpixels"] / done.images},
            counts={"images": done.images, "failed": done.failed, **done.counts},
            problems=done.problems,
            preview="preview.png",
        )
