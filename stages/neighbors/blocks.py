"""Queries against the database in blocks of whole shards: read, searched, and written shard by shard.

A block of queries is one task. It streams the database, so that the memory of a task does not grow with the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.data.rows import read_shard
from stages.data.tables import SCHEMAS
from stages.neighbors.search import Block, Ids, Index, IndexSettings, Vectors, nearest

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from pipeline.store.writer import ArtifactWriter

QUERY_ROWS, DATABASE_ROWS = 16_384, 65_536
IVF_QUERY_ROWS = 65_536  # a task sorts the whole database into cells: many queries must share that


@dataclass(frozen=True)
class Job:
    """All that a task needs to know.

    Attributes:
        embeddings: the artifact that is read.
        output: where the shards of neighbours are written.
        settings: of the index.
        k: neighbours an image.
        centres: of IVF's cells.
        gpu: whether FAISS searches on a GPU.
        threads: of FAISS.
    """

    embeddings: Artifact
    output: ArtifactWriter
    settings: IndexSettings
    k: int
    centres: Vectors | None
    gpu: bool
    threads: int

    @property
    def rows(self) -> list[int]:
        """Vectors of every shard."""
        return [shard.rows or 0 for shard in self.embeddings.shards()]

    def index(self, *, exact: bool = False) -> Index:
        """An index of these settings, or a flat one."""
        settings = IndexSettings() if exact else self.settings
        return Index(settings, sum(self.rows), centres=None if exact else self.centres, gpu=self.gpu)

    def database(self) -> Iterator[Block]:
        """All vectors, block by block."""
        most = sum(self.rows) if self.settings.one_block else DATABASE_ROWS
        for shards in group(range(len(self.rows)), self.rows, most):
            yield read_block(self.embeddings, shards)

    def nearest(self, queries: Block) -> tuple[Ids, Vectors]:
        """The neighbours of these queries.

        Where the cells of an approximate index hold too few, the exact ones take their place.
        """
        ids, similarities = nearest(self.index(), queries, self.database(), self.k)
        if (short := np.flatnonzero(ids[:, -1] < 0)).size:
            some = Block(queries.ids[short], queries.vectors[short])
            ids[short], similarities[short] = nearest(self.index(exact=True), some, self.database(), self.k)
        return ids, similarities


def group(shards: Sequence[int], rows: Sequence[int], most: int) -> list[list[int]]:
    """Neighbouring shards put together, up to `most` rows, or one shard where it alone has more.

    Args:
        shards: numbers of the shards.
        rows: of every shard of the table, by its number.
        most: rows of a group.
    """
    groups: list[list[int]] = []
    size = 0
    for shard in shards:
        if not groups or size + rows[shard] > most:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += rows[shard]
    return groups


def read_block(embeddings: Artifact, shards: Sequence[int]) -> Block:
    """The ids and vectors of some shards. Raises ArtifactDamaged."""
    entries = list(embeddings.shards())
    read = [_vectors(read_shard(embeddings, entries[shard], ["image_id", "embedding"])) for shard in shards]
    width = max((vectors.shape[1] for _, vectors in read), default=0)
    return Block(
        np.concatenate([ids for ids, _ in read]),
        np.concatenate([vectors if len(ids) else np.empty((0, width), np.float32) for ids, vectors in read]),
    )


def search_shards(shards: Sequence[int], job: Job) -> int:
    """Find and write the neighbours of all images of some shards. Returns the number of images."""
    import faiss

    faiss.omp_set_num_threads(job.threads)
    queries = read_block(job.embeddings, shards)
    ids, similarities = job.nearest(queries)
    at = 0
    for shard in shards:
        part = slice(at, at + job.rows[shard])
        at = part.stop
        columns = [pa.array(queries.ids[part]), _lists(ids[part]), _lists(similarities[part])]
        table = pa.Table.from_arrays(columns, names=SCHEMAS["neighbors"].names)
        job.output.put_table(shard, table.cast(SCHEMAS["neighbors"]))
    return len(queries.ids)


def search_task(one: pa.Table, job: Job) -> pa.Table:
    """The same for Ray Data: a row with the list `shards` -> one with the number of `images`."""
    return pa.table({"images": [search_shards(one["shards"][0].as_py(), job)]})


def pick_rows(embeddings: Artifact, rows: NDArray[np.int64]) -> Block:
    """The vectors at these rising positions of the table; shards are read one at a time."""
    ids, vectors, first = [], [], 0
    for shard, entry in enumerate(embeddings.shards()):
        count = entry.rows or 0
        inside = rows[(rows >= first) & (rows < first + count)] - first
        if inside.size:
            block = read_block(embeddings, [shard])
            ids.append(block.ids[inside])
            vectors.append(block.vectors[inside])
        first += count
    return Block(np.concatenate(ids), np.concatenate(vectors))


def _vectors(table: pa.Table) -> tuple[Ids, Vectors]:
    ids = table["image_id"].to_numpy()
    flat = np.asarray(table["embedding"].combine_chunks().flatten(), np.float32)
    return ids, flat.reshape(len(ids), -1) if len(ids) else flat.reshape(0, 0)


def _lists(values_QK: NDArray[Any]) -> pa.Array:
    """(Q, K) numbers as Q lists."""
    count, k = values_QK.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * k), pa.array(values_QK.reshape(-1)))
