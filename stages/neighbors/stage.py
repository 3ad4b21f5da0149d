"""The `neighbors` stage: for every image the k most similar others, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Input, Outcome, Stage, StageConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.neighbors.blocks import Job
    from stages.neighbors.search import IndexSettings, Vectors

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
    """embeddings -> neighbors: blocks of queries against blocks of the database, on Ray Data for large sets.

    No process holds more than a block of each, except with `hnsw`, whose graph needs all vectors in one.
    """

    kind = "neighbors"
    worker_gpus = 1.0
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
        """Writes the neighbours of all images, and a picture of how near they are.

        Continues with the shards that are missing.
        """
        try:
            import faiss

            from stages.neighbors.blocks import Job
            from stages.neighbors.search import IndexSettings
        except ImportError as error:
            raise SourceError(
                f"{context.name}: FAISS is not installed ({error}): "
                "install tessera[cpu], or tessera[gpu] for a GPU index"
            ) from error
        from stages.neighbors.on_ray import search

        config, embeddings = self.config, context.inputs["embeddings"]
        count = embeddings.rows or 0
        if config.k > count - 1:
            raise SourceError(
                f"stages.{context.name}.k: k is {config.k}, but each of the {count} images has only "
                f"{max(0, count - 1)} others: set it to {max(1, count - 1)} or less, or add images"
            )
        settings = IndexSettings(**config.model_dump(include=set(IndexSettings.__dataclass_fields__)))
        centres = _centres(embeddings, settings, config.seed) if config.index == "ivf" else None
        job = Job(
            embeddings, context.output, settings, config.k, centres, gpu=False, threads=faiss.omp_get_max_threads()
        )
        gpus = search(context, job)
        # Which image set the ids are of: training refuses a table of another one.
        origin = embeddings.manifest.inputs.get("images")
        metrics, notes = {}, {"k": config.k, "images": origin, **settings.facts(count), "gpus": gpus}
        if config.index != "flat":
            metrics["recall"] = _recall(job, config.recall_sample, config.seed)
            notes |= {"recall": metrics["recall"], "recall_sample": min(config.recall_sample, count)}
            context.say(f"{context.name}: {config.index} finds {metrics['recall']:.1%} of the true {config.k} nearest")
        context.output.put_file("preview.png", _preview(job, config.seed))
        return Outcome(metrics=metrics, counts={"images": count}, notes=notes, preview="preview.png")


def _centres(embeddings: Artifact, settings: IndexSettings, seed: int) -> Vectors:
    """IVF: the centres of the cells, from a sample of the vectors where there are many."""
    from stages.neighbors.blocks import pick_rows
    from stages.neighbors.search import train_cells, training_rows

    count = embeddings.rows or 0
    rows = np.sort(np.random.default_rng(seed).choice(count, training_rows(count), replace=False))
    return train_cells(pick_rows(embeddings, rows).vectors, settings, count, seed)


def _recall(job: Job, sample: int, seed: int) -> float:
    """Share of the true k nearest that an approximate index finds, over a random sample of queries, in [0, 1]."""
    from stages.neighbors.blocks import pick_rows
    from stages.neighbors.search import nearest

    count = sum(job.rows)
    rows = np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))
    queries = pick_rows(job.embeddings, rows)
    found, _ = job.nearest(queries)
    truth, _ = nearest(job.index(exact=True), queries, job.database(), job.k)
    return float(np.mean([len(np.intersect1d(a, b)) / job.k for a, b in zip(found, truth, strict=True)]))


def _preview(job: Job, seed: int) -> bytes:
    """How similar neighbours are, and how similar any two images: where the curves meet, neighbours mean little."""
    from stages.data.pictures import histograms
    from stages.data.rows import sample_rows
    from stages.neighbors.blocks import pick_rows

    count = sum(job.rows)
    similarities = np.stack([row["similarities"] for row in sample_rows(job.output, _SHOWN, ["similarities"])])
    generator = np.random.default_rng(seed)
    some = np.sort(generator.choice(count, min(_SHOWN, count), replace=False))
    vectors = pick_rows(job.embeddings, some).vectors
    one = generator.integers(0, len(some), _SHOWN)
    other = (one + generator.integers(1, len(some), _SHOWN)) % len(some)  # never the same image
    pairs = (vectors[one] * vectors[other]).sum(axis=1)
    shown = {
        "nearest neighbour": similarities[:, 0],
        f"neighbour {job.k}": similarities[:, -1],
        "two random images": pairs,
    }
    return histograms(
        shown, title=f"Similarity of {count} images to their neighbours", label="cosine of the embeddings"
    )
