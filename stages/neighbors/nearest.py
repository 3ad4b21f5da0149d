"""k-nearest neighbours by cosine with FAISS, exact or approximate, with ties broken by id. No files, no config.

Shape legend: N vectors of width D, Q queries, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_SLACK = 8  # candidates beyond k: room for the image itself and for ties at the cut
_WIDEST = 1024  # candidates asked of an index (a GPU's gives 2048 at most); beyond, all vectors are compared
_GATHER = 16_000_000  # numbers gathered at once while similarities are recomputed


@dataclass(frozen=True)
class IndexSettings:
    """Which FAISS index; unset numbers are chosen from the number of vectors."""

    index: Literal["flat", "ivf", "hnsw"] = "flat"
    nlist: int | None = None  # IVF: cells
    nprobe: int | None = None  # IVF: cells searched
    m: int = 32  # HNSW: links a vector
    ef_construction: int = 200
    ef_search: int = 128


class Neighbourhood:
    """N L2-normalised vectors with rising ids; `search` gives each query's nearest others."""

    def __init__(
        self, vectors_ND: Vectors, ids_N: NDArray[np.int64], settings: IndexSettings, *, seed: int = 0
    ) -> None:
        self.vectors, self.ids = np.ascontiguousarray(vectors_ND, np.float32), ids_N
        self.exact = settings.index == "flat"
        self.facts: dict[str, Any] = {"index": settings.index, "vectors": len(ids_N), "gpus": faiss.get_num_gpus()}
        self._index = self._build(settings, seed)

    def _build(self, settings: IndexSettings, seed: int) -> Any:
        count, width = self.vectors.shape
        if settings.index == "hnsw":
            index: Any = faiss.IndexHNSWFlat(width, settings.m, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = settings.ef_construction, settings.ef_search
            self.facts |= {
                "m": settings.m,
                "ef_construction": settings.ef_construction,
                "ef_search": settings.ef_search,
            }
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)  # threads would insert in an order of their own: another graph every time
            try:
                index.add(self.vectors)
            finally:
                faiss.omp_set_num_threads(threads)
            return index
        if settings.index == "flat":
            index = faiss.IndexFlatIP(width)
        else:
            # 4 sqrt(N) cells of at least 39 vectors (FAISS's own minimum for k-means).
            nlist = min(settings.nlist or int(4 * count**0.5), max(1, count // 39))
            nprobe = min(nlist, settings.nprobe or max(16, nlist // 32))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, nlist, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed, index.cp.spherical = seed, True
            index.nprobe = nprobe
            self.facts |= {"nlist": nlist, "nprobe": nprobe}
        if faiss.get_num_gpus():
            index = faiss.index_cpu_to_all_gpus(index)
            if settings.index == "ivf":
                faiss.GpuParameterSpace().set_index_parameter(index, "nprobe", self.facts["nprobe"])
        if not index.is_trained:
            index.train(self.vectors)
        index.add(self.vectors)
        return index

    def search(self, rows_Q: NDArray[np.int64], k: int) -> tuple[NDArray[np.int64], Vectors]:
        """Ids (Q, K) and similarities (Q, K) of the k nearest others of the vectors at `rows_Q`, nearest first.

        Equal similarities are in the order of their ids. Exact with a flat index, also where ties cross the k-th place.
        """
        neighbors = np.empty((len(rows_Q), k), np.int64)
        similarities = np.empty((len(rows_Q), k), np.float32)
        open_Q, width = np.arange(len(rows_Q)), k + 1 + _SLACK
        while len(open_Q):
            width = width if width <= _WIDEST else len(self.ids)
            width = min(width, len(self.ids))
            again = []
            for start in range(0, len(open_Q), max(1, _GATHER // width)):
                block = open_Q[start : start + max(1, _GATHER // width)]
                row, similarity = self._ranked(rows_Q[block], self._candidates(rows_Q[block], width))
                neighbors[block], similarities[block] = self.ids[row[:, :k]], similarity[:, :k]
                again.append(block[self._unsettled(similarity, k)])
            if width == len(self.ids):
                break
            open_Q, width = np.concatenate(again), width * 4
        return neighbors, similarities

    def _unsettled(self, similarity_QW: Vectors, k: int) -> NDArray[np.bool_]:
        """Queries that must look at more candidates.

        Either too few were found (an approximate index's cells ran out), or the last one is as good as the k-th, so
        that equal ones with lower ids may be waiting behind it.
        """
        kth = similarity_QW[:, k - 1]
        last = np.where(np.isfinite(similarity_QW), similarity_QW, np.inf).min(axis=1)
        return ~np.isfinite(kth) | (self.exact & (kth - last < 1e-6))

    def _candidates(self, rows_Q: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """Rows (Q, width), in any order; -1 where the index found fewer."""
        if width < len(self.ids):
            return np.asarray(self._index.search(self.vectors[rows_Q], width)[1], np.int64)
        return np.broadcast_to(np.arange(len(self.ids)), (len(rows_Q), len(self.ids)))

    def _ranked(self, rows_Q: NDArray[np.int64], found_QW: NDArray[np.int64]) -> tuple[NDArray[np.int64], Vectors]:
        """Candidate rows and similarities by (similarity, id); the query itself and missing ones last, with -inf.

        Similarities are computed again, in float64: FAISS's differ in the last bits between equal vectors, and a tie
        must be a tie.
        """
        found = np.sort(found_QW, axis=1)  # rows rise with ids, so a stable sort by similarity breaks ties by id
        similarity = np.empty(found.shape, np.float32)
        columns = min(found.shape[1], max(1, _GATHER // self.vectors.shape[1]))
        queries = max(1, _GATHER // (columns * self.vectors.shape[1]))
        for q in range(0, len(rows_Q), queries):
            query = self.vectors[rows_Q[q : q + queries]].astype(np.float64)
            for c in range(0, found.shape[1], columns):
                block = np.s_[q : q + queries, c : c + columns]
                similarity[block] = np.einsum("qd,qwd->qw", query, self.vectors[found[block]].astype(np.float64))
        similarity[(found == rows_Q[:, None]) | (found < 0)] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(similarity, order, axis=1)


def recall(approximate: Neighbourhood, k: int, *, sample: int = 1000, seed: int = 0) -> float:
    """Share of the true k nearest that an approximate index finds, over a random sample of queries, in [0, 1]."""
    exact = Neighbourhood(approximate.vectors, approximate.ids, IndexSettings())
    count = len(approximate.ids)
    rows = np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))
    found, _ = approximate.search(rows, k)
    truth, _ = exact.search(rows, k)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, truth, strict=True)]))
