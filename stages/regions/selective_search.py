"""The `selective_search` stage: region proposals of every image, for the methods that contrast regions (D3SSL)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Context, Input, Outcome, Resources, Stage, StageConfig


class SelectiveSearch(Stage["SelectiveSearch.Config"]):
    """Boxes of Uijlings et al. (IJCV 2013) by OpenCV, filtered as D3SSL asks, best first."""

    kind = "boxes"
    version = 1
    packages = ("opencv-contrib-python-headless",)

    class Config(StageConfig):
        images: Input["images"]
        strategy: Literal["single", "fast", "quality"] = Field(
            "fast", description="colour spaces and groupings to combine: about 25, 170 or 800 boxes an image"
        )
        size: int | None = Field(
            320, ge=32, description="longest side to search at, in pixels; larger images are shrunk; null: as stored"
        )
        # The paper's scale 300 is the middle of the three segmentations 150, 300, 450 of `fast`; OpenCV's min_size is
        # fixed at the paper's 100 pixels.
        base_k: int = Field(150, ge=1, description="scale of the first graph segmentation")
        inc_k: int = Field(150, ge=1, description="added for each further one (fast has 3, quality 5, single 1)")
        sigma: float = Field(0.9, gt=0, description="blur before the graph segmentation, in pixels")
        min_side: float = Field(32, ge=1, description="smallest width and height of a box, in pixels of the image")
        max_aspect: float = Field(3, ge=1, description="largest ratio of the longer to the shorter side")
        min_scale: float = Field(0.3, ge=0, le=1, description="smallest sqrt(box area / image area)")
        max_scale: float = Field(0.8, gt=0, le=1, description="largest sqrt(box area / image area)")
        max_boxes: int = Field(100, ge=1, description="boxes kept an image, the best ones")

        @model_validator(mode="after")
        def _scales(self) -> SelectiveSearch.Config:
            if self.min_scale >= self.max_scale:
                raise ValueError(f"min_scale {self.min_scale} must be below max_scale {self.max_scale}")
            return self

    def run(self, context: Context) -> Outcome:
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
