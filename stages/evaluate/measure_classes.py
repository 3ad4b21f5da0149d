"""The `measure_classes` stage: how far classes lie apart and how wide they are (DSA's measures).

Source: docs/methods.md#class-separation. The computation is in `class_separation.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Outcome
from stages.evaluate.frozen import FrozenConfig, FrozenStage


class MeasureClassesConfig(FrozenConfig):
    """Whose vectors; only the test split is measured."""

    pooling: Literal["vector", "mean"] = Field("vector", description="what the encoder gives, or the mean of patches")


class MeasureClasses(FrozenStage[MeasureClassesConfig]):
    """images + features -> metrics inter_class_distance, intra_class_variance, their ratio; one row a class."""

    units = dict.fromkeys(("separation", "inter_class_distance", "intra_class_variance"), "")
    objectives = {"separation": "max", "inter_class_distance": "max", "intra_class_variance": "min"}
    needs = "labels"
    Config = MeasureClassesConfig

    def run(self, context: Context) -> Outcome:
        """Measures the test split.

        Raises: SourceError for images of fewer than two classes.
        """
        import pyarrow as pa
        import torch

        from stages.data.units import Units, write
        from stages.evaluate.class_separation import class_separation
        from stages.evaluate.labelled_vectors import class_names, read_split

        config = self.config
        problems: list[dict[str, str]] = []
        test = read_split(context, "test_split", config.test_split, config.pooling, problems)
        classes, labels = class_names(context.inputs["images"], test), test.labels
        present = torch.unique(labels).tolist()
        if len(present) < 2:
            raise SourceError(
                f"{context.name}: all labelled images of split {config.test_split!r} are of one class, "
                f"{classes[present[0]]}: name another split"
            )
        found = class_separation(test.vectors, labels)
        distance, variance = found.inter_class_distance.item(), found.intra_class_variance.item()
        metrics = {
            "separation": distance / max(variance, 1e-12) ** 0.5,
            "inter_class_distance": distance,
            "intra_class_variance": variance,
        }
        names = [classes[label] for label in present]
        context.output.put_table(0, pa.table({"class": names, "variance": found.variances.tolist()}))
        write(context.output, config, metrics, Units())
        return Outcome(
            metrics=metrics,
            counts={"test": len(labels), "classes": len(present), "unusable": len(problems)},
            problems=problems,
        )
