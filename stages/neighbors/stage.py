"""The `neighbors` stage: for every image the k most similar others, by the cosine of their embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Input, Outcome, Stage, StageConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.neighbors.nearest import Neighbourhood

_BLOCK = 4096  # queries searched at once
_SHOWN_IMAGES, _SHOWN_NEIGHBORS = 6, 6


class NeighborsConfig(StageConfig):
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

    def run(self, context: Context) -> Outcome:
        try:
            from stages.neighbors.nearest import IndexSettings, Neighbourhood, recall
        except ImportError as error:
            raise SourceError(
                f"{context.name}: FAISS is not installed ({error}): "
                "install tessera[cpu], or tessera[gpu] for a GPU index"
            ) from error

        config = self.config
        parts = _read(context.inputs["embeddings"])
        ids, vectors = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        if config.k > len(ids) - 1:
            raise SourceError(
                f"{context.name}: k is {config.k}, but each of the {len(ids)} images has only {max(0, len(ids) - 1)} "
                f"others: set stages.{context.name}.k to {max(1, len(ids) - 1)} or less, or add images"
            )
        settings = IndexSettings(**config.model_dump(include=set(IndexSettings.__dataclass_fields__)))
        index = Neighbourhood(vectors, ids, settings, seed=config.seed)
        self._write(context, parts, index)
        # Which image set the ids are of: training refuses a table of another one.
        origin = context.inputs["embeddings"].manifest.inputs.get("images")
        metrics, notes = {}, {"k": config.k, "images": origin, **index.facts}
        if config.index != "flat":
            metrics["recall"] = recall(index, config.k, sample=config.recall_sample, seed=config.seed)
            notes |= {"recall": metrics["recall"], "recall_sample": min(config.recall_sample, len(ids))}
            context.say(f"{context.name}: {config.index} finds {metrics['recall']:.1%} of the true {config.k} nearest")
        preview = self._preview(context, index)
        return Outcome(metrics=metrics, counts={"images": len(ids)}, notes=notes, preview=preview)

    def _write(self, context: Context, parts: list[Part], index: Neighbourhood) -> None:
        import pyarrow as pa

        from stages.data.tables import SCHEMAS

        done, total = 0, sum(len(ids) for ids, _ in parts)
        for part, (ids, _) in enumerate(parts):
            first = done
            if context.output.shard_done(part) is None:
                found, similarity = [], []
                for start in range(0, len(ids), _BLOCK):
                    rows = np.arange(first + start, first + min(start + _BLOCK, len(ids)))
                    neighbors, similarities = index.search(rows, self.config.k)
                    found.append(neighbors)
                    similarity.append(similarities)
                    context.report_progress(first + start + len(rows), total, "images")
                columns = [pa.array(ids), _lists(found, self.config.k), _lists(similarity, self.config.k)]
                table = pa.Table.from_arrays(columns, names=SCHEMAS["neighbors"].names).cast(SCHEMAS["neighbors"])
                context.output.put_table(part, table)
            done = first + len(ids)
            context.report_progress(done, total, "images")

    def _preview(self, context: Context, index: Neighbourhood) -> str | None:
        """A few photographs, each beside its nearest neighbours.

        The pictures are in the images artifact that the embeddings name as their input; this stage has no edge to it,
        and its result does not depend on it.
        """
        from pipeline.store.store import ArtifactStore

        embeddings = context.inputs["embeddings"]
        kind, _, fingerprint = embeddings.manifest.inputs.get("images", "").partition("/")
        store = ArtifactStore(embeddings.objects.address)
        images = store.find(kind, fingerprint) if fingerprint else None
        if images is None:
            context.say(f"{context.name}: no preview, the images of {embeddings.name} are not in the store any more")
            return None
        from stages.data.images import decode
        from stages.data.pictures import neighbor_strip

        rows = np.unique(np.linspace(0, len(index.ids) - 1, _SHOWN_IMAGES).astype(int))
        neighbors, similarities = index.search(rows, min(self.config.k, _SHOWN_NEIGHBORS))
        pixels = {
            image_id: decode(data) for image_id, data in _encoded(images, {*index.ids[rows], *neighbors.flat}).items()
        }
        sheet = neighbor_strip(
            [pixels[int(index.ids[row])] for row in rows],
            [[pixels[int(image_id)] for image_id in found] for found in neighbors],
            [[f"{similarity:.3f}" for similarity in found] for found in similarities],
            title="Photographs and their nearest neighbours (cosine of the embeddings)",
        )
        context.output.put_file("preview.png", sheet)
        return "preview.png"


Part = tuple[NDArray[np.int64], NDArray[np.float32]]  # ids (n,), vectors (n, D)


def _read(embeddings: Artifact) -> list[Part]:
    from stages.data.tables import open_shard

    parts = []
    for entry in embeddings.shards():
        table = open_shard(embeddings, entry, ["image_id", "embedding"])
        column = table["embedding"].combine_chunks()
        ids = table["image_id"].to_numpy()
        vectors = np.asarray(column.flatten(), np.float32)
        parts.append((ids, vectors.reshape(len(ids), -1) if len(ids) else vectors.reshape(0, 0)))
    width = max((vectors.shape[1] for _, vectors in parts), default=0)
    return [(ids, vectors if len(ids) else vectors.reshape(0, width)) for ids, vectors in parts]


def _lists(blocks: list[NDArray[Any]], k: int) -> Any:
    import pyarrow as pa

    if not blocks:
        return pa.array([], pa.list_(pa.int64()))
    flat = np.concatenate(blocks).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, k, dtype=np.int32)), pa.array(flat))


def _encoded(images: Artifact, wanted: set[Any]) -> dict[int, bytes]:
    """The bytes of these images; only parts that hold one of them are read past their ids."""
    from stages.data.tables import iter_batches, open_shard

    found: dict[int, bytes] = {}
    for entry in images.shards():
        ids = open_shard(images, entry, ["image_id"])["image_id"].to_pylist()
        rows = [row for row, image_id in enumerate(ids) if image_id in wanted]
        for row in rows:
            for batch in iter_batches(images, entry, ["image_id", "image"], rows=(row, row + 1)):
                found |= {one["image_id"]: one["image"] for one in batch.to_pylist()}
    return found
