"""What one actor of the stages does: hold a frozen encoder, turn batches of rows into vectors, or into patches too.

Actors import torch and timm, 3.5 s of a CPU; the driver only names these classes to Ray, so that both are imported
when they are called.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from stages.data.images import decode
from stages.embeddings.settings import FeaturesConfig
from stages.models.settings import Backbone

if TYPE_CHECKING:
    import torch

    from pipeline.store.artifact import Artifact
    from stages.models.inference import RGB, Inference

Row = dict[str, Any]


def frozen(
    source: Artifact | Backbone,
    precision: Literal["fp32", "bf16"],
    seed: int,
    device: torch.device | None = None,
) -> Inference:
    """The encoder of an artifact, or the backbone; random weights are the same in every process."""
    import torch

    from stages.models.encoder import Encoder
    from stages.models.inference import Inference

    if isinstance(source, Backbone):
        torch.manual_seed(seed)
        encoder = Encoder.build(source)
    else:
        encoder = Encoder.load(source)
    return Inference(encoder, device=device, precision=precision)


# ---------------------------------------------------------------------------------------------- one vector an image
def prepare(row: Row, *, resize: int, crop: int) -> Row:
    """The encoded bytes become the (crop, crop, 3) pixels that the encoder sees. Raises ImageError."""
    from stages.models.inference import centre_square

    return {"image_id": row["image_id"], "pixels": centre_square(decode(row["image"]), resize, crop)}


class Embedder:
    """Rows that `prepare` made -> rows with `embedding`, L2-normalised float32."""

    def __init__(
        self,
        source: Artifact | Backbone,
        pooling: Literal["cls", "mean"],
        precision: Literal["fp32", "bf16"],
        seed: int,
        crop: int,
        stage: str,
    ) -> None:
        from stages.models.inference import require_size

        self.inference = frozen(source, precision, seed)
        require_size(self.inference.encoder, crop, f"stages.{stage}.crop")
        self.pooling = pooling

    def __call__(self, rows: list[Row]) -> list[Row]:
        """A batch of them, in order."""
        vectors = self.inference.pooled([row["pixels"] for row in rows], self.pooling).cpu().numpy()
        return [{"embedding": vector} for vector in vectors]


# ------------------------------------------------------------------------------------------------ a vector a patch
def prepare_whole(row: Row, *, config: FeaturesConfig, stride: int) -> Row:
    """The encoded bytes become the (H, W, 3) pixels that the encoder sees. Raises ImageError."""
    return {"image_id": row["image_id"], "key": row["key"], "pixels": fitted(decode(row["image"]), config, stride)}


def fitted(pixels: RGB, config: FeaturesConfig, stride: int) -> RGB:
    """The image at the size in which it is encoded; `stride` is the encoder's."""
    from stages.models.inference import centre_square, squeeze

    size = config.size
    if config.fit == "centre":
        return centre_square(pixels, round(size * 8 / 7), size)
    if config.fit == "squeeze":
        return squeeze(pixels, size, size)
    root = (pixels.shape[0] / pixels.shape[1]) ** 0.5
    height, width = (max(round(side / stride), 1) * stride for side in (size * root, size / root))
    return squeeze(pixels, height, width)


class DenseEmbedder:
    """Rows that `prepare_whole` made -> rows of the table `features`."""

    def __init__(self, source: Artifact | Backbone, config: FeaturesConfig, device: torch.device | None = None) -> None:
        self.inference, self.layer = frozen(source, config.precision, config.seed, device), config.layer

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        """A batch of them, in order; a forward pass for each run of images of one size."""
        made: list[Row | Exception] = []
        for _, group in groupby(rows, key=lambda row: row["pixels"].shape):
            same = list(group)
            vector_BD, map_BDhw = self.inference([row["pixels"] for row in same], layer=self.layer)
            vectors, maps = vector_BD.half().cpu(), map_BDhw.permute(0, 2, 3, 1).half().cpu()
            for row, vector, map_hwD in zip(same, vectors, maps, strict=True):
                if vector.isfinite().all() and map_hwD.isfinite().all():
                    made.append(
                        {
                            "key": row["key"],
                            "vector": vector.numpy(),
                            "patches": map_hwD.flatten().numpy(),
                            "grid_height": map_hwD.shape[0],
                            "grid_width": map_hwD.shape[1],
                        }
                    )
                else:
                    made.append(OverflowError("a feature is beyond 65504, the largest half float, or is not a number"))
        return made
