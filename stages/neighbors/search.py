"""k-nearest neighbours by cosine, database block by database block, exact or approximate, ties broken by id.

Memory holds the queries and one block of the database, however large the set is. No files, no config.

Shape legend: N vectors of width D in a block, Q queries, K neighbours, W candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]

_SLACK = 8  # candidates beyond k: room for the image itself and for ties at the cut
_WIDEST = 1024  # candidates asked of FAISS (a GPU gives 2048 at most); beyond, a whole block is compared
_GATHER = 8_000_000  # numbers gathered at once while similarities are computed again
_CLOSE = 1e-6  # FAISS's similarities differ from ours by less


class Block(NamedTuple):
    """L2-normalised vectors with rising ids."""

    ids: Ids  # (N,)
    vectors: Vectors  # (N, D)


@dataclass(frozen=True)
class IndexSettings:
    """Which FAISS index; unset numbers are chosen from the number of vectors."""

    index: Literal["flat", "ivf", "hnsw"] = "flat"
    nlist: int | None = None  # IVF: cells
    nprobe: int | None = None  # IVF: cells searched
    m: int = 32  # HNSW: links a vector
    ef_construction: int = 200
    ef_search: int = 128

    @property
    def one_block(self) -> bool:
        """Whether the database must be one block: an HNSW graph is built over all vectors."""
        return self.index == "hnsw"

    def cells(self, count: int) -> tuple[int, int]:
        """IVF: cells, and cells searched. 4 sqrt(N) cells of at least 39 vectors (FAISS's own minimum for k-means)."""
        nlist = min(self.nlist or int(4 * count**0.5), max(1, count // 39))
        return nlist, min(nlist, self.nprobe or max(16, nlist // 32))

    def facts(self, count: int) -> dict[str, Any]:
        """What the artifact's notes say of the index."""
        found: dict[str, Any] = {"index": self.index, "vectors": count}
        if self.index == "ivf":
            found["nlist"], found["nprobe"] = self.cells(count)
        if self.index == "hnsw":
            found |= {"m": self.m, "ef_construction": self.ef_construction, "ef_search": self.ef_search}
        return found


def training_rows(count: int) -> int:
    """IVF: how many vectors the cells are found from. All of up to 65,536; of more, 64 for each of 4 sqrt(N) cells."""
    return min(count, max(65_536, int(256 * count**0.5)))


def train_cells(vectors_ND: Vectors, settings: IndexSettings, count: int, seed: int) -> Vectors:
    """IVF: the centres of the cells (nlist, D).

    Args:
        vectors_ND: `training_rows(count)` of the vectors.
        settings: of the index.
        count: vectors of the whole set.
        seed: of k-means.
    """
    nlist, _ = settings.cells(count)
    width = vectors_ND.shape[1]
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(quantizer, width, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = seed, True
    index.train(np.ascontiguousarray(vectors_ND, np.float32))
    centres: Vectors = faiss.rev_swig_ptr(quantizer.get_xb(), nlist * width).reshape(nlist, width).copy()
    return centres


class Index:
    """Finds candidates in one block after the other.

    Args:
        settings: which index.
        count: vectors of the whole set.
        centres: of IVF's cells.
        gpu: search on FAISS's first GPU (not HNSW, which has no GPU form).
    """

    def __init__(self, settings: IndexSettings, count: int, *, centres: Vectors | None = None, gpu: bool = False):
        self.settings, self.count, self.centres = settings, count, centres
        self.exact = settings.index == "flat"
        self._gpu = faiss.StandardGpuResources() if gpu and not settings.one_block else None
        self._block: Block | None = None
        self._index: Any = None

    def enter(self, block: Block) -> None:
        """Search this block from now on."""
        self._block, width = block, block.vectors.shape[1]
        if self.settings.index == "ivf":
            assert self.centres is not None
            quantizer = faiss.IndexFlatIP(width)
            quantizer.add(self.centres)
            self._index = faiss.IndexIVFFlat(quantizer, width, len(self.centres), faiss.METRIC_INNER_PRODUCT)
            self._index.is_trained = True
            if self._gpu is not None:
                self._index = faiss.index_cpu_to_gpu(self._gpu, 0, self._index)
            self._index.nprobe = self.settings.cells(self.count)[1]
            self._index.add(block.vectors)
        if self.settings.index == "hnsw":
            self._index = faiss.IndexHNSWFlat(width, self.settings.m, faiss.METRIC_INNER_PRODUCT)
            hnsw = self._index.hnsw
            hnsw.efConstruction, hnsw.efSearch = self.settings.ef_construction, self.settings.ef_search
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)  # threads would insert in an order of their own: another graph every time
            try:
                self._index.add(block.vectors)
            finally:
                faiss.omp_set_num_threads(threads)

    def candidates(self, queries_QD: Vectors, width: int) -> Ids:
        """Rows of the block (Q, width), in any order; -1 where an approximate index found fewer."""
        assert self._block is not None
        vectors = self._block.vectors
        if width == len(vectors):
            return np.broadcast_to(np.arange(width), (len(queries_QD), width))
        if not self.exact:
            found = self._index.search(queries_QD, width)[1]
        elif self._gpu is not None:
            found = faiss.knn_gpu(self._gpu, queries_QD, vectors, width, metric=faiss.METRIC_INNER_PRODUCT)[1]
        else:
            found = faiss.knn(queries_QD, vectors, width, metric=faiss.METRIC_INNER_PRODUCT)[1]
        return np.asarray(found, np.int64)


def nearest(index: Index, queries: Block, database: Iterable[Block], k: int) -> tuple[Ids, Vectors]:
    """Ids (Q, K) and similarities (Q, K) of the K nearest others of each query, nearest first.

    Equal similarities are in the order of their ids. Exact with a flat index, also where ties cross the k-th place.
    Where an approximate index finds fewer than K, the id is -1 and the similarity -inf.
    """
    best = np.full((len(queries.ids), k), -1, np.int64), np.full((len(queries.ids), k), -np.inf, np.float32)
    for block in database:
        if len(block.ids) and len(queries.ids):
            index.enter(block)
            _merge_block(index, queries, block, best)
    return best


def _merge_block(index: Index, queries: Block, block: Block, best: tuple[Ids, Vectors]) -> None:
    """Puts what one block holds into the K best of each query."""
    ids, similarities = best
    width = min(ids.shape[1] + 1 + _SLACK, len(block.ids))
    open_Q = np.arange(len(queries.ids))
    while len(open_Q):
        width = width if width <= _WIDEST else len(block.ids)
        again = []
        step = max(1, _GATHER // width)
        for at in range(0, len(open_Q), step):
            some = open_Q[at : at + step]
            rows_QW = index.candidates(queries.vectors[some], width)
            similarity_QW = _similarities(queries, some, block, rows_QW)
            found_QW = np.where(rows_QW >= 0, block.ids[rows_QW], -1)
            merged, kth = _best_of(ids[some], similarities[some], found_QW, similarity_QW)
            # As good as the k-th is the worst candidate: equal ones with lower ids may wait behind it in the block.
            worst = np.where(np.isfinite(similarity_QW), similarity_QW, np.inf).min(axis=1)
            unsettled = index.exact & (width < len(block.ids)) & (kth - worst < _CLOSE)
            settled = some[~unsettled]
            ids[settled], similarities[settled] = merged[0][~unsettled], merged[1][~unsettled]
            again.append(some[unsettled])
        open_Q, width = np.concatenate(again), min(width * 4, len(block.ids))


def _best_of(ids_QK: Ids, similarity_QK: Vectors, more_QW: Ids, better_QW: Vectors) -> tuple[tuple[Ids, Vectors], Any]:
    """The K best of both by (similarity, id), and the k-th similarity (Q,)."""
    k = ids_QK.shape[1]
    ids, similarity = np.concatenate([ids_QK, more_QW], 1), np.concatenate([similarity_QK, better_QW], 1)
    by_id = np.argsort(ids, axis=1, kind="stable")
    ids, similarity = np.take_along_axis(ids, by_id, 1), np.take_along_axis(similarity, by_id, 1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    ids, similarity = np.take_along_axis(ids, order, 1), np.take_along_axis(similarity, order, 1)
    ids[~np.isfinite(similarity)] = -1
    return (ids, similarity), similarity[:, -1]


def _similarities(queries: Block, some: Ids, block: Block, rows_QW: Ids) -> Vectors:
    """Cosines (Q, W) of queries and candidate rows; -inf for the query itself and for missing rows.

    Computed again in float64: FAISS's differ in the last bits between equal vectors, and a tie must be a tie.
    """
    similarity = np.empty(rows_QW.shape, np.float32)
    width = block.vectors.shape[1]
    columns = min(rows_QW.shape[1], max(1, _GATHER // width))
    step = max(1, _GATHER // (columns * width))
    for q in range(0, len(some), step):
        query = queries.vectors[some[q : q + step]].astype(np.float64)
        for c in range(0, rows_QW.shape[1], columns):
            part = np.s_[q : q + step, c : c + columns]
            similarity[part] = np.einsum("qd,qwd->qw", query, block.vectors[rows_QW[part]].astype(np.float64))
    missing = (rows_QW < 0) | (block.ids[rows_QW] == queries.ids[some][:, None])
    similarity[missing] = -np.inf
    return similarity
