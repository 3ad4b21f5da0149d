"""What a score is made of: one row for each independent unit of a test (an image, a video, an episode).

Kept in the artifact beside the metrics, so that a comparison can draw units again (bootstrap) without any encoder:
intervals of a score, and of the difference of two scores on the same units.

Shape legend: N units, R draws, C classes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.data.confusion import Matrix, scores

if TYPE_CHECKING:
    from pipeline.stage import StageConfig
    from pipeline.store.artifact import Artifact
    from pipeline.store.writer import ArtifactWriter

FILE = "units.parquet"


class Units:
    """Collects the units of one evaluation, in the order of the test.

    A metric is the mean of its units' values, or a score of the sum of their confusion matrices.

    Args:
        absent: see `confusion.scores`.
    """

    def __init__(self, absent: Literal["skip", "zero"] = "skip") -> None:
        self.absent = absent
        self.names: list[str] = []
        self.values: dict[str, list[float]] = {}
        self.weights: list[float] = []
        self.matrices: list[Matrix] = []

    def add(self, name: str, values: Mapping[str, float], weight: float = 1.0) -> None:
        """One unit.

        Args:
            name: what tells it from others, such as the image's key.
            values: metric -> the unit's own value; the same metrics for every unit.
            weight: how much it counts in the mean, such as the objects of an image.
        """
        self.names.append(name)
        self.weights.append(weight)
        for metric, value in values.items():
            self.values.setdefault(metric, []).append(float(value))

    def add_matrix(self, name: str, matrix: Matrix) -> None:
        """One image of a segmentation, by its confusion matrix (C, C)."""
        self.names.append(name)
        self.matrices.append(matrix)

    def metrics(self) -> dict[str, float]:
        """The metrics over all units.

        Raises: ValueError where no pixel of any unit has a class.
        """
        if self.matrices:
            return scores(np.sum(self.matrices, axis=0), self.absent).metrics()
        weights = np.asarray(self.weights)
        return {name: float(np.average(values, weights=weights)) for name, values in self.values.items()}

    def table(self) -> pa.Table:
        """As it is stored. Confusion matrices keep the pairs that occur."""
        columns: dict[str, Any] = {"unit": self.names}
        if self.matrices:
            sparse = [np.flatnonzero(matrix) for matrix in self.matrices]
            columns["pairs"] = pa.array([pairs.astype(np.int32) for pairs in sparse], pa.list_(pa.int32()))
            columns["pixels"] = pa.array(
                [matrix.ravel()[pairs] for matrix, pairs in zip(self.matrices, sparse, strict=True)],
                pa.list_(pa.int64()),
            )
            about = {"classes": str(len(self.matrices[0])), "absent": self.absent}
            return pa.table(columns).replace_schema_metadata(about)
        columns["weight"] = self.weights
        return pa.table(columns | self.values)


def hits(names: Sequence[str], ranks: Sequence[int]) -> Units:
    """The units of a classification: `top1` and `top5` of every image, in per cent.

    Args:
        names: of the images.
        ranks: the place of the true class among the predictions; 0 is a hit.
    """
    found = Units()
    for name, rank in zip(names, ranks, strict=True):
        found.add(name, {"top1": 100.0 * (rank < 1), "top5": 100.0 * (rank < 5)})
    return found


def write(output: ArtifactWriter, config: StageConfig, metrics: Mapping[str, float], units: Units) -> None:
    """Put metrics.json, with the protocol that gave them, and the units into an artifact."""
    text = json.dumps({**metrics, "protocol": config.model_dump(mode="json", exclude={"resources"})}, indent=2)
    output.put_file("metrics.json", text.encode())
    data = io.BytesIO()
    pq.write_table(units.table(), data)
    output.put_file(FILE, data.getvalue())


def resample(artifact: Artifact, draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Every metric on bootstrap samples of the units, (R,) each.

    Artifacts with the same units are drawn alike by the same seed, so that differences of their scores can be taken
    draw by draw.

    Args:
        artifact: of kind `metrics`.
        draws: R.
        seed: of the draws.
    """
    if all(entry.name != FILE for entry in artifact.manifest.files):
        return {}
    return drawn_again(pq.read_table(artifact.local(FILE)), draws, seed)


def drawn_again(table: pa.Table, draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Every metric on bootstrap samples of the rows of a `Units.table`, (R,) each; nothing where it has no row.

    Args:
        table: of units.
        draws: R.
        seed: of the draws.
    """
    count = len(table)
    if not count:
        return {}
    generator = np.random.default_rng((seed, count))
    times_RN = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    if "pairs" in table.column_names:
        return _resampled_matrices(table, times_RN)
    weight_N = table["weight"].to_numpy()
    total_R = np.maximum(times_RN @ weight_N, np.finfo(float).tiny)
    names = [name for name in table.column_names if name not in ("unit", "weight")]
    return {name: (times_RN @ (table[name].to_numpy() * weight_N)) / total_R for name in names}


def _resampled_matrices(table: pa.Table, times_RN: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    from scipy.sparse import csr_matrix

    classes, absent = int(table.schema.metadata[b"classes"]), table.schema.metadata[b"absent"].decode()
    pairs, pixels = (table[name].combine_chunks() for name in ("pairs", "pixels"))
    shape = (len(table), classes * classes)
    counts = csr_matrix((pixels.flatten().to_numpy(), pairs.flatten().to_numpy(), pairs.offsets.to_numpy()), shape)
    sums = np.asarray(times_RN @ counts)
    drawn = [scores(one.reshape(classes, classes), absent).metrics() for one in sums]
    return {name: np.array([one[name] for one in drawn]) for name in drawn[0]}


def keys_of(artifact: Artifact) -> Sequence[str]:
    """The names of an artifact's units, in order; none where it keeps no units."""
    if all(entry.name != FILE for entry in artifact.manifest.files):
        return []
    names: list[str] = pq.read_table(artifact.local(FILE), columns=["unit"])["unit"].to_pylist()
    return names
