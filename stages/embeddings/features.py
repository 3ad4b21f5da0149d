"""The `features` stage: what an encoder gives for every image, one vector and one vector a patch, in half floats.

Patch features are large (600 KB for 448 pixels and a ViT-S/16), so that output shards are cut by their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.stage import Context, Feed, Outcome, Stage, nodes
from stages.embeddings.settings import FeaturesConfig
from stages.models import weights
from stages.models.planned import no_layer, undivided

if TYPE_CHECKING:
    from stages.embeddings.embedder import DenseEmbedder

_SHARD_BYTES = 128 << 20  # of features in an output shard: a worker holds two or three times that
_SHOWN = 12  # photographs in the preview
_SHOWN_GRID = 32  # rows and columns of their maps there


class DenseFeatures(Stage[FeaturesConfig]):
    """images + encoder -> features. Equal up to float rounding whatever the number of workers."""

    kind = "features"
    worker_gpus = 1.0
    packages = ("timm",)
    exports = ("part-*.parquet",)
    Config = FeaturesConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """Sizes that the encoder cannot take, and a layer that it does not have."""
        backbone = self.config.whose(feeds)
        if self.config.fit != "aspect":  # which takes whole patches
            yield from undivided(backbone, {"size": self.config.size})
        elif backbone is not None and (side := backbone.only_size or backbone.size_step):
            what = f"aspect gives images of many sizes, and {backbone.name} takes those of {side} pixels"
            yield "fit", what, f"set it to squeeze or centre, and size to {side}"
        if (missing := no_layer(backbone, self.config.layer)) is not None:
            yield "layer", *missing

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """Weights of its own backbone that cannot be had."""
        yield from weights.obstacles(self.config, say)

    def run(self, context: Context) -> Outcome:
        """Writes the features of all images, and the maps of some as colours.

        Raises: UsageError for a size or a layer that the encoder does not have.
        """
        import functools

        import torch

        from stages.data.tables import SCHEMAS
        from stages.embeddings.embedder import DenseEmbedder, prepare_whole
        from stages.map_images.ray_data import map_images

        config, images = self.config, context.inputs["images"]
        source = context.inputs["encoder"] if config.backbone is None else config.backbone.anywhere()
        embedder = DenseEmbedder(source, config, torch.device("cpu"))
        stride, one = embedder.inference.encoder.stride, self._try_out(context.name, embedder)
        del embedder
        size = sum(one[name].nbytes for name in ("vector", "patches"))
        gpu = any(node.get("GPU", 0) >= 1 for node in nodes())
        summary = map_images(
            context,
            images,
            DenseEmbedder,
            schema=SCHEMAS["features"],
            arguments=(source, config),
            prepare=functools.partial(prepare_whole, config=config, stride=stride),
            batch_rows=64 if gpu else 16,
            shard_rows=max(_SHARD_BYTES // size, 1),
            gpus=1.0 if gpu else 0.0,
            threads=8 if gpu else 2,
        )
        context.output.put_file("preview.png", _preview(context))
        return Outcome(
            counts={"images": summary.images, "failed": summary.failed},
            problems=summary.problems,
            notes={"vector_width": len(one["vector"]), "width": len(one["patches"]) // _cells(one)},
            preview="preview.png",
        )

    def _try_out(self, stage: str, embedder: DenseEmbedder) -> dict[str, Any]:
        """The features of a black image, before any worker starts. Raises UsageError."""
        from stages.models.inference import require_size

        config, encoder = self.config, embedder.inference.encoder
        if config.fit != "aspect":
            require_size(encoder, config.size, f"stages.{stage}.size")
        side = config.size if config.fit != "aspect" else max(round(config.size / encoder.stride), 1) * encoder.stride
        try:
            [one] = embedder([{"key": "", "pixels": np.zeros((side, side, 3), np.uint8)}])
        except (IndexError, KeyError) as error:
            raise UsageError(
                f"stages.{stage}.layer: the encoder has no layer {config.layer} (a ViT's are its blocks, from 0; "
                "those of models with levels of several strides are 1 to 4)"
            ) from error
        if isinstance(one, Exception):
            raise UsageError(f"stages.{stage}: even a black image has features out of range: {one}") from one
        return one


def _cells(row: dict[str, Any]) -> int:
    return int(row["grid_height"]) * int(row["grid_width"])


def _preview(context: Context) -> bytes:
    """Photographs beside their patches in colours: the first three principal components over all of them."""
    from stages.data.images import decode
    from stages.data.pictures import grid, pca_colours
    from stages.data.rows import iter_rows

    maps = dict(_sample_maps(context))
    images = iter_rows(context.inputs["images"], ["image"], ids=maps.keys())
    photographs = [decode(row["image"]) for row in images]
    colours = pca_colours(np.stack(list(maps.values())).transpose(0, 3, 1, 2), side=160)
    pictures = [picture for pair in zip(photographs, colours, strict=True) for picture in pair]
    title = "Photographs and their patch features, the first three principal components as colours"
    return grid(pictures, columns=6, title=title, cell=160)


def _sample_maps(context: Context) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Ids of some images, spread evenly, each with its map on a grid that all share: (_SHOWN_GRID, _SHOWN_GRID, D)."""
    from stages.data.rows import iter_batches

    shards = list(context.output.shards())
    ends = np.cumsum([0, *(shard.rows or 0 for shard in shards)])
    for at in np.unique(np.linspace(0, ends[-1] - 1, min(_SHOWN, ends[-1])).astype(int)):
        index = int(np.searchsorted(ends, at, side="right")) - 1
        row, columns = int(at - ends[index]), ["image_id", "patches", "grid_height", "grid_width"]
        [batch] = iter_batches(context.output, shards[index], columns, start=row, stop=row + 1, batch_rows=4)
        [image_id], [height], [width] = (batch[name].to_pylist() for name in ("image_id", "grid_height", "grid_width"))
        map_hwD = batch["patches"][0].values.to_numpy().astype(np.float32).reshape(height, width, -1)
        nearest = (np.arange(_SHOWN_GRID) * side // _SHOWN_GRID for side in (height, width))
        yield image_id, map_hwD[np.ix_(*nearest)]
