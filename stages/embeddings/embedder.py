"""What one actor of the `embeddings` stage does: hold a frozen encoder, turn batches of rows into vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from stages.data.images import decode
from stages.models.encoder import Encoder
from stages.models.inference import Inference, centre_square, require_size
from stages.models.settings import Backbone

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


def prepare(row: dict[str, Any], *, resize: int, crop: int) -> dict[str, Any]:
    """The encoded bytes become the (crop, crop, 3) pixels that the encoder sees. Raises ImageError."""
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
        if isinstance(source, Backbone):
            torch.manual_seed(seed)  # random weights are the same in every actor
            encoder = Encoder.build(source)
        else:
            encoder = Encoder.load(source)
        require_size(encoder, crop, f"stages.{stage}.crop")
        self.inference = Inference(encoder, precision=precision)
        self.pooling = pooling

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A batch of them, in order."""
        vectors = self.inference.pooled([row["pixels"] for row in rows], self.pooling).cpu().numpy()
        return [{"embedding": vector} for vector in vectors]
