"""The `embeddings` stage: one L2-normalised vector per image, from an earlier encoder or any timm model.

Ray Data actors hold the model; `neighbors` reads what they write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.stage import Context, Feed, Outcome, Stage, nodes
from stages.embeddings.settings import EmbeddingsConfig
from stages.models import weights
from stages.models.planned import undivided

_SHOWN = 32  # photographs in the preview


class Embeddings(Stage[EmbeddingsConfig]):
    """images + encoder -> embeddings. Equal up to float rounding whatever the number of workers."""

    kind = "embeddings"
    version = 2
    worker_gpus = 1.0
    packages = ("timm",)
    Config = EmbeddingsConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """A crop that does not split into a ViT's patches."""
        yield from undivided(self.config.whose(feeds), {"crop": self.config.crop})

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """Weights of its own backbone that cannot be had."""
        yield from weights.obstacles(self.config, say)

    def run(self, context: Context) -> Outcome:
        """Writes the vectors of all images, and a contact sheet of some, alike ones side by side."""
        import functools

        from stages.data.tables import SCHEMAS
        from stages.embeddings.embedder import Embedder, prepare
        from stages.map_images.ray_data import map_images

        config, images = self.config, context.inputs["images"]
        source = context.inputs["encoder"] if config.backbone is None else config.backbone.anywhere()
        arguments: tuple[Any, ...] = (source, config.pooling, config.precision, config.seed, config.crop, context.name)
        fit = functools.partial(prepare, resize=config.resize, crop=config.crop)
        gpu = any(node.get("GPU", 0) >= 1 for node in nodes())
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
        context.output.put_file("preview.png", _preview(context))
        return Outcome(
            counts={"images": summary.images, "failed": summary.failed},
            problems=summary.problems,
            preview="preview.png",
        )


def _preview(context: Context) -> bytes:
    """Some photographs, alike ones side by side."""
    from stages.data.images import decode
    from stages.data.pictures import grid
    from stages.data.rows import iter_rows, sample_rows

    vectors = {row["image_id"]: row["embedding"] for row in sample_rows(context.output, _SHOWN, ["embedding"])}
    photographs = [decode(row["image"]) for row in iter_rows(context.inputs["images"], ["image"], ids=vectors.keys())]
    return grid(
        [photographs[i] for i in _along_first_component(np.array(list(vectors.values())))],
        columns=8,
        title="Photographs along the first principal component of their embeddings",
        cell=160,
    )


def _along_first_component(vectors_ND: NDArray[np.floating[Any]]) -> list[int]:
    """Row numbers in the order of the first principal component: like should lie beside like."""
    centred = vectors_ND - vectors_ND.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    return [int(i) for i in np.argsort(centred @ axis, kind="stable")]
