"""The `segment_knn` stage: every patch gets the class of most of its nearest train patches (CAPI's dense k-NN).

Source: docs/methods.md#dense-classifiers. `patch_classification.py` has the protocol around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from pipeline.errors import UsageError
from pipeline.stage import Context
from stages.evaluate.patch_classification import Choice, PatchClassifierConfig, PatchClassifierStage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.evaluate.patch_labels import Patches

Distance = Literal["cosine", "l2"]


class SegmentKnnConfig(PatchClassifierConfig):
    """The protocol's numbers; defaults are CAPI's."""

    k: list[int] = Field([1, 3, 10, 30], description="patches that vote; the best on a tenth of the train images")
    distance: list[Distance] = Field(["cosine", "l2"], description="likewise")

    @field_validator("k")
    @classmethod
    def _positive(cls, counts: list[int]) -> list[int]:
        if not counts or min(counts) < 1:
            raise ValueError(f"{counts}: give positive numbers")
        return counts

    @field_validator("distance")
    @classmethod
    def _some(cls, names: list[Distance]) -> list[Distance]:
        if not names:
            raise ValueError("name at least one")
        return names


class SegmentKnn(PatchClassifierStage[SegmentKnnConfig]):
    """images + features -> metrics miou, pixel_accuracy, mean_accuracy in per cent, one row a class."""

    Config = SegmentKnnConfig

    def choices(self) -> list[Choice]:
        """Every number of neighbours with every distance."""
        return [{"k": k, "distance": distance} for distance in self.config.distance for k in self.config.k]

    def tried(self, context: Context, train: Patches, vectors: Tensor) -> Iterator[tuple[Choice, Tensor]]:
        """One search a distance: fewer neighbours are the first of more."""
        from stages.evaluate.patch_neighbors import LabelledNeighbors, majority

        usable = [k for k in self.config.k if k <= len(train.vectors)]
        self._require(context, train, usable)
        for distance in self.config.distance:
            near = LabelledNeighbors(train, distance).labels_of(vectors, max(usable))
            for k in usable:
                yield {"k": k, "distance": distance}, majority(near[:, :k], train.pixels.shape[1] - 1)

    def fitted(self, context: Context, train: Patches, choice: Choice) -> Callable[[Tensor], Tensor]:
        """The vote of the nearest train patches."""
        from stages.evaluate.patch_neighbors import LabelledNeighbors, majority

        k, distance = int(choice["k"]), str(choice["distance"])
        self._require(context, train, [k] if k <= len(train.vectors) else [])
        neighbors, classes = LabelledNeighbors(train, distance), train.pixels.shape[1] - 1
        return lambda vectors: majority(neighbors.labels_of(vectors, k), classes)

    def _require(self, context: Context, train: Patches, usable: list[int]) -> None:
        if not usable:
            raise UsageError(
                f"stages.{context.name}.k: {min(self.config.k)}, but there are {len(train.vectors)} train patches with "
                "a class: lower it, or raise patches"
            )
