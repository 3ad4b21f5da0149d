"""The end of every evaluation that gives each pixel a class: scores, the artifact's files and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.stage import Context, Outcome, StageConfig
from stages.data.confusion import Matrix, Scores, confusion, scores
from stages.data.images import decode
from stages.data.mask_classes import MaskClasses, MaskLabels
from stages.data.pictures import RGB, class_colours, colour_mask, grid
from stages.data.rows import iter_rows
from stages.data.units import Units, write

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

_SHOWN_IMAGES = 6


class SegmentedTest:
    """Collects the predictions of a test.

    Args:
        classes: of the masks.
        image_ids: of the test images, in the order in which they come.
        absent: see `confusion.scores`.
    """

    def __init__(
        self, classes: MaskClasses, image_ids: Sequence[int], absent: Literal["skip", "zero"] = "skip"
    ) -> None:
        self.classes = classes
        self.units = Units(absent)
        self._picked = {image_ids[int(i)] for i in np.linspace(0, len(image_ids) - 1, _SHOWN_IMAGES)}
        self._shown: dict[int, tuple[MaskLabels, NDArray[np.int64]]] = {}

    def add(self, image_id: int, key: str, truth_HW: MaskLabels, prediction_HW: NDArray[np.int64]) -> None:
        """One test image; negative truth is void."""
        self.units.add_matrix(key, confusion(truth_HW, prediction_HW, len(self.classes.names)))
        if image_id in self._picked:
            self._shown[image_id] = (truth_HW, prediction_HW)

    @property
    def matrix(self) -> Matrix:
        """Pixels of all images by true and predicted class."""
        total: Matrix = np.sum(self.units.matrices, axis=0)
        return total

    def finish(
        self,
        context: Context,
        config: StageConfig,
        problems: list[dict[str, str]],
        counts: dict[str, int],
        notes: dict[str, Any] | None = None,
    ) -> Outcome:
        """Write metrics, units, a row a class and the picture.

        Args:
            context: of the stage; its input `images` holds the photographs.
            config: of the stage.
            problems: images that could not be used.
            counts: what else the outcome counts.
            notes: of the outcome.

        Raises: SourceError where no pixel has a class, or all have the same.
        """
        self.require_classes(context.name, problems)
        result = scores(self.matrix)
        pixels = self.matrix.sum(axis=1)
        context.output.put_table(0, class_table(self.classes, {"": result}, pixels))
        write(context.output, config, result.metrics(), self.units)
        context.output.put_file("preview.png", self.picture(context.inputs["images"]))
        return Outcome(
            metrics=result.metrics(),
            counts={**counts, "test": len(self.units.names), "classes": len(pixels)} | {"unusable": len(problems)},
            problems=problems,
            notes=notes or {},
            preview="preview.png",
        )

    def require_classes(self, stage: str, problems: list[dict[str, str]]) -> None:
        """Refuse a test without pixels of two classes.

        Raises: SourceError.
        """
        if not self.units.names or not self.matrix.any():
            raise SourceError(
                f"{stage}: no pixel of the test images has a class, all is void or unusable ({len(problems)} "
                f"unusable): check ignore_index ({self.classes.ignore_index}) and the masks"
            )
        require_classes(stage, "test images", self.matrix.sum(axis=1), self.classes)

    def picture(self, images: Artifact) -> bytes:
        """Some test images, spread over the test, with truth and prediction."""
        rows = iter_rows(images, ["image"], ids=self._shown.keys())
        return picture([(decode(row["image"]), *self._shown[row["image_id"]]) for row in rows], self.classes)


def require_classes(stage: str, which: str, pixels: NDArray[np.int64], classes: MaskClasses) -> None:
    """Refuse masks of one class: every encoder would get mIoU 100.

    Args:
        stage: its name in the pipeline.
        which: whose masks they are, for the error.
        pixels: of each class, (C,).
        classes: of the masks.

    Raises: SourceError.
    """
    present = [name for name, count in zip(classes.names, pixels, strict=True) if count]
    if len(present) == 1:
        raise SourceError(
            f"{stage}: every pixel of the {which} that counts is of one class, {present[0]}: every encoder would get "
            "the same score (see the preview.png of the images, and the options of their masks)"
        )


def class_table(classes: MaskClasses, results: Mapping[str, Scores], pixels: NDArray[np.int64]) -> pa.Table:
    """A row a class.

    Args:
        classes: of the masks.
        results: scores by the suffix of their columns.
        pixels: of each class in all test masks, (C,).
    """
    columns: dict[str, Any] = {"class": classes.names, "index": classes.values, "pixels": pixels}
    for name, result in results.items():
        # null where the class is in neither truth nor prediction
        columns["iou" + name] = pa.array(result.iou, from_pandas=True)
        columns["accuracy" + name] = pa.array(result.accuracy, from_pandas=True)
    return pa.table(columns)


def picture(shown: Sequence[tuple[RGB, MaskLabels, NDArray[np.int64]]], classes: MaskClasses) -> bytes:
    """A line for each test image: the photograph, the truth, the prediction."""
    pictures = []
    for pixels, truth, prediction in shown:
        pictures += [pixels, colour_mask(truth, classes.names), colour_mask(prediction, classes.names)]
    return grid(
        pictures,
        columns=3,
        captions=["image", "truth (black: void)", "prediction"] * len(shown),
        legend=list(zip(classes.names, class_colours(len(classes.names)), strict=True)),
    )
