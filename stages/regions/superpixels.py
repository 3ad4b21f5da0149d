"""The `superpixels` stage: a map of small coherent regions of every image, for methods that pool over them (ViCE)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.stage import Context, Input, Outcome, Resources, Stage, StageConfig


class Superpixels(Stage["Superpixels.Config"]):
    """SLIC and its relatives by OpenCV, labels 0..n-1 without gaps; defaults are ViCE's."""

    kind = "superpixels"
    version = 1
    packages = ("opencv-contrib-python-headless",)

    class Config(StageConfig):
        images: Input["images"]
        algorithm: Literal["slic", "slico", "mslic", "grid"] = Field(
            "slic",
            description="slic; slico adapts the compactness; mslic follows content more closely, 5 times as slow; "
            "grid: rectangles that ignore content (the ablation)",
        )
        region_size: int = Field(20, ge=2, description="mean side of a superpixel, in pixels of the image")
        compactness: float = Field(10, gt=0, description="weight of distance against colour (OpenCV's ruler)")
        iterations: int = Field(5, ge=1, description="rounds of clustering")
        min_element: int = Field(
            25,
            ge=0,
            le=100,
            description="connectivity: parts under this per cent of a mean superpixel join a neighbour",
        )
        blur_sigma: float | None = Field(4, gt=0, description="of a 3x3 Gaussian blur before; null: none")

    def run(self, context: Context) -> Outcome:
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
