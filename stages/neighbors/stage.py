"""The `neighbors` stage: for every image the k most similar others, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Input, Outcome, Stage, StageConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.neighbors.nearest import Neighbourhood

_BLOCK = 4096  # queries searched at once
_SHOWN = 2000  # images whose neighbours the preview shows, and random pairs that it compares them with


class NeighborsConfig(StageConfig):
    """How many neighbours, and how they are searched."""

    embeddings: Input["embeddings"]
    k: int = Field(20, ge=1, description="neighbours an image; never itself")
    index: Literal["flat", "ivf", "hnsw"] = Field(
        "flat", description="flat is exact (up to about 2 million images on a GPU); the others' recall is measured"
    )
    nlist: int | None = Field(None, ge=1, description="ivf: cells; default 4 sqrt(images)")
    nprobe: int | None = Field(None, ge=1, description="ivf: cells searched; default a 32nd of them, at least 16")
    m: int = Field(32, ge=2, description="hnsw: links of a vector")
    ef_construction: int = Field(200, ge=1, description="hnsw: candidates while building (one thread: repeatable)")
    ef_search: int = Field(128, ge=1, description="hnsw: candidates while searching")
    recall_sample: int = Field(1000, ge=1, description="ivf, hnsw: queries that are compared with the exact answer")
    seed: int = Field(0, description="of the cells and of the sample")


class Neighbors(Stage[NeighborsConfig]):
    """embeddings -> neighbors. Runs in the driver's process, on its GPUs if FAISS sees any; all vectors in memory."""

    kind = "neighbors"
    uses_ray = False
    Config = NeighborsConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """More neighbours than there are other images, as soon as the images are counted."""
        counted: Feed | None = feeds["embeddings"]
        while counted is not None and counted.counts is None:
            counted = counted.inputs.get("images")
        images = counted.counts.get("images") if counted is not None and counted.counts is not None else None
        if counted is not None and images is not None and self.config.k >= images:
            what = f"k is {self.config.k}, but each of the {images} images of {counted.stage} has {images - 1} others"
            yield "k", what, f"set it to {max(1, images - 1)} or less, or add images"

    def run(self, context: Context) -> Outcome:
        """Writes the neighbours of all images, and a picture of how near they are."""
        try:
            from stages.neighbors.nearest import IndexSettings, Neighbourhood, recall
        except ImportError as error:
            raise SourceError(
                f"{context.name}: FAISS is not installed ({error}): "
                "install tessera[cpu], or tessera[gpu] for a GPU index"
            ) from error

        config = self.config
        shards = _read(context.inputs["embeddings"])
        ids, vectors = (np.concatenate([shard[i] for shard in shards]) for i in (0, 1))
        if config.k > len(ids) - 1:
            raise SourceError(
                f"stages.{context.name}.k: k is {config.k}, but each of the {len(ids)} images has only "
                f"{max(0, len(ids) - 1)} others: set it to {max(1, len(ids) - 1)} or less, or add images"
            )
        settings = IndexSettings(**config.model_dump(include=set(IndexSettings.__dataclass_fields__)))
        index = Neighbourhood(vectors, ids, settings, seed=config.seed)
        self._write(context, shards, index)
        # Which image set the ids are of: training refuses a table of another one.
        origin = context.inputs["embeddings"].manifest.inputs.get("images")
        metrics, notes = {}, {"k": config.k, "images": origin, **index.facts}
        if config.index != "flat":
            metrics["recall"] = recall(index, config.k, sample=config.recall_sample, seed=config.seed)
            notes |= {"recall": metrics["recall"], "recall_sample": min(config.recall_sample, len(ids))}
            context.say(f"{context.name}: {config.index} finds {metrics['recall']:.1%} of the true {config.k} nearest")
        context.output.put_file("preview.png", _preview(index, config.k, config.seed))
        return Outcome(metrics=metrics, counts={"images": len(ids)}, notes=notes, preview="preview.png")

    def _write(self, context: Context, shards: list[Shard], index: Neighbourhood) -> None:
        import pyarrow as pa

        from stages.data.tables import SCHEMAS

        done, total = 0, sum(len(ids) for ids, _ in shards)
        for shard, (ids, _) in enumerate(shards):
            first = done
            if context.output.shard_done(shard) is None:
                found, similarity = [], []
                for start in range(0, len(ids), _BLOCK):
                    rows = np.arange(first + start, first + min(start + _BLOCK, len(ids)))
                    neighbors, similarities = index.search(rows, self.config.k)
                    found.append(neighbors)
                    similarity.append(similarities)
                    context.report_progress(first + start + len(rows), total, "images")
                columns = [pa.array(ids), _lists(found, self.config.k), _lists(similarity, self.config.k)]
                table = pa.Table.from_arrays(columns, names=SCHEMAS["neighbors"].names).cast(SCHEMAS["neighbors"])
                context.output.put_table(shard, table)
            done = first + len(ids)
            context.report_progress(done, total, "images")


Shard = tuple[NDArray[np.int64], NDArray[np.float32]]  # ids (n,), vectors (n, D)


def _read(embeddings: Artifact) -> list[Shard]:
    from stages.data.rows import read_shard

    shards = []
    for shard in embeddings.shards():
        table = read_shard(embeddings, shard, ["image_id", "embedding"])
        column = table["embedding"].combine_chunks()
        ids = table["image_id"].to_numpy()
        vectors = np.asarray(column.flatten(), np.float32)
        shards.append((ids, vectors.reshape(len(ids), -1) if len(ids) else vectors.reshape(0, 0)))
    width = max((vectors.shape[1] for _, vectors in shards), default=0)
    return [(ids, vectors if len(ids) else vectors.reshape(0, width)) for ids, vectors in shards]


def _lists(blocks: list[NDArray[Any]], k: int) -> Any:
    import pyarrow as pa

    if not blocks:
        return pa.array([], pa.list_(pa.int64()))
    flat = np.concatenate(blocks).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, k, dtype=np.int32)), pa.array(flat))


def _preview(index: Neighbourhood, k: int, seed: int) -> bytes:
    """How similar neighbours are, and how similar any two images: where the curves meet, neighbours mean little."""
    from stages.data.pictures import histograms

    count = len(index.ids)
    rows = np.unique(np.linspace(0, count - 1, min(_SHOWN, count)).astype(int))
    _, similarities = index.search(rows, k)
    generator = np.random.default_rng(seed)
    one = generator.integers(0, count, _SHOWN)
    other = (one + generator.integers(1, count, _SHOWN)) % count  # never the same image
    pairs = (index.vectors[one] * index.vectors[other]).sum(axis=1)
    shown = {"nearest neighbour": similarities[:, 0], f"neighbour {k}": similarities[:, -1], "two random images": pairs}
    return histograms(
        shown, title=f"Similarity of {count} images to their neighbours", label="cosine of the embeddings"
    )
