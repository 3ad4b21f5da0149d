"""The `embeddings` stage: one L2-normalised vector per image, from an earlier encoder or any timm model.

Ray Data actors hold the model; `neighbors` reads what they write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.stage import Context, Input, Outcome, Stage, StageConfig
from stages.models import weights
from stages.models.settings import Backbone

_SHOWN = 32  # photographs in the preview


class EmbeddingsConfig(StageConfig):
    """Whose features, of which part of an image."""

    images: Input["images"]
    encoder: Input["encoder"] | None = Field(None, description="an earlier pretrain stage; or give a backbone")
    backbone: Backbone | None = Field(None, description="a timm model or a checkpoint file; or name an encoder")
    pooling: Literal["cls", "mean"] = Field("cls", description="[CLS] (token mean where there is none), or map mean")
    resize: int = Field(256, gt=0, description="short side in pixels before the crop")
    crop: int = Field(224, gt=0, description="side in pixels of the central square that is encoded")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward pass; the column is float32")
    seed: int = Field(0, description="of the random weights of a backbone that has no others")

    @model_validator(mode="after")
    def _rules(self) -> EmbeddingsConfig:
        if (self.encoder is None) == (self.backbone is None):
            raise ValueError("exactly one of encoder and backbone says where features come from; set one of them")
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize")
        return self


class Embeddings(Stage[EmbeddingsConfig]):
    """images + encoder -> embeddings. Equal up to float rounding whatever the number of workers."""

    kind = "embeddings"
    packages = ("timm",)
    Config = EmbeddingsConfig

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """Weights of its own backbone that cannot be had."""
        yield from weights.obstacles(self.config, say)

    def run(self, context: Context) -> Outcome:
        """Writes the vectors of all images, and a contact sheet of some, alike ones side by side."""
        import functools

        import ray

        from stages.data.pictures import grid
        from stages.data.rows import sample_rows
        from stages.data.tables import SCHEMAS
        from stages.embeddings.embedder import Embedder, prepare
        from stages.map_images.ray_data import map_images

        config, images = self.config, context.inputs["images"]
        source = context.inputs["encoder"] if config.backbone is None else config.backbone.anywhere()
        arguments: tuple[Any, ...] = (source, config.pooling, config.precision, config.seed, config.crop, context.name)
        fit = functools.partial(prepare, resize=config.resize, crop=config.crop)
        gpu = ray.cluster_resources().get("GPU", 0) >= 1
        summary = map_images(
            context,
            images,
            Embedder,
            schema=SCHEMAS["embeddings"],
            arguments=arguments,
            prepare=fit,
            batch_rows=256 if gpu else 32,
            gpus=1.0 if gpu else 0.0,
            threads=8 if gpu else 2,
        )
        shown = list(_readable(sample_rows(images, _SHOWN, ["image"])))
        vectors = np.array([row["embedding"] for row in Embedder(*arguments)([fit(row) for row in shown])])
        sheet = grid(
            [shown[i]["pixels"] for i in _along_first_component(vectors)],
            columns=8,
            title="Photographs along the first principal component of their embeddings",
            cell=160,
        )
        context.output.put_file("preview.png", sheet)
        return Outcome(
            counts={"images": summary.images, "failed": summary.failed},
            problems=summary.problems,
            preview="preview.png",
        )


def _readable(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows whose image can be decoded; the others are among the stage's problems already."""
    from stages.data.images import ImageError, decode

    for row in rows:
        with contextlib.suppress(ImageError):
            yield {**row, "pixels": decode(row["image"])}


def _along_first_component(vectors_ND: NDArray[np.floating[Any]]) -> list[int]:
    """Row numbers in the order of the first principal component: like should lie beside like."""
    centred = vectors_ND - vectors_ND.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    return [int(i) for i in np.argsort(centred @ axis, kind="stable")]
