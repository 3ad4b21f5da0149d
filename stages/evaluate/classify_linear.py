"""The `classify_linear` stage: a linear classifier on stored image vectors.

Source: docs/methods.md#linear-classification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.stage import Context, Outcome
from stages.evaluate.frozen import FrozenConfig, FrozenStage, Positives

if TYPE_CHECKING:
    from stages.evaluate.labelled_vectors import LabelledSplits


class ClassifyLinearConfig(FrozenConfig):
    """The protocol's numbers; defaults are DINO's but for the learning rates, which are tried on a held-out fifth."""

    pooling: Literal["vector", "mean"] = Field("vector", description="what the encoder gives, or the mean of patches")
    standardise: bool = Field(True, description="bring each channel to mean 0 and variance 1 over the train images")
    epochs: int = Field(100, ge=1, description="passes over the train images")
    batch_size: int = Field(256, ge=1, description="vectors a step")
    lr: Positives = Field(
        [1e-3, 1e-2, 1e-1],
        description="SGD's for 256 images; of several, the best on a held-out fifth of the train images",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's")
    weight_decay: float = Field(0.0, ge=0, description="SGD's")


class ClassifyLinear(FrozenStage[ClassifyLinearConfig]):
    """images + features -> metrics top1, top5 in per cent, one row a test image."""

    units = dict.fromkeys(("top1", "top5"), "%")
    needs = "labels"
    Config = ClassifyLinearConfig

    def run(self, context: Context) -> Outcome:
        """Trains and scores.

        Raises: SourceError for a split without usable labelled images.
        """
        from stages.evaluate.labelled_vectors import read_splits
        from stages.evaluate.linear_classifier import choose_rate, fit, standardised
        from stages.evaluate.weighted_knn import ranks

        config = self.config
        splits = read_splits(context, config.train_split, config.test_split, config.pooling)
        train, test = splits.train.vectors, splits.test.vectors
        if config.standardise:
            train, test = standardised(train, test)
        options: dict[str, Any] = {
            "classes": len(splits.classes),
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "seed": config.seed,
        }
        lr = choose_rate(train, splits.train.labels, config.lr, **options)
        classifier = fit(
            train,
            splits.train.labels,
            lr=lr,
            report=lambda epoch: context.report_progress(epoch, config.epochs, "epochs"),
            **options,
        )
        return write_ranks(context, config, splits, ranks(classifier(test), splits.test.labels).tolist(), {"lr": lr})


def write_ranks(
    context: Context, config: FrozenConfig, splits: LabelledSplits, ranks: list[int], notes: dict[str, float]
) -> Outcome:
    """Write what a classification gave.

    Args:
        context: of the stage.
        config: of the stage.
        splits: what was classified.
        ranks: of the true class of every test image; 0 is a hit.
        notes: of the outcome.
    """
    import pyarrow as pa

    from stages.data.units import hits, write

    found = hits(splits.test.keys, ranks)
    labels = [splits.classes[label] for label in splits.test.labels.tolist()]
    table = pa.table({"key": splits.test.keys, "label": labels, "rank": pa.array(ranks, pa.int32())})
    context.output.put_table(0, table)
    write(context.output, config, found.metrics(), found)
    return Outcome(
        metrics=found.metrics(),
        counts={
            "train": len(splits.train.keys),
            "test": len(ranks),
            "classes": len(splits.classes),
            "unusable": len(splits.problems),
        },
        problems=splits.problems,
        notes=dict(notes),
    )
