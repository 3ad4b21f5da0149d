"""The `segment_linear` stage: a linear layer, or a small decoder, on frozen patch features, scored by mIoU.

Source: docs/methods.md#linear-segmentation.

Reading order: this file wires, `segment_linear_steps.py` encodes, trains and scores, `segment_linear_views.py` cuts the
images, `segmentation_decoders.py` has the decoders and their training, `confusion.py` the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import lacking, single_class
from stages.evaluate.frozen import Evaluation
from stages.evaluate.segment_linear_settings import SegmentLinearConfig
from stages.models.planned import backbone_of, undivided

_SHOWN_IMAGES = 6


class SegmentLinear(Evaluation[SegmentLinearConfig]):
    """images + encoder -> metrics miou, pixel_accuracy, mean_accuracy in per cent (and *_random), one row a class."""

    version = 3
    packages = ("timm",)
    units = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "%")
    objectives = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "max")
    Config = SegmentLinearConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """Images without masks, a split without any, or with masks of one class; sizes of no whole patches."""
        sizes = {"train_size": self.config.train_size, "test_size": self.config.test_size}
        yield from undivided(backbone_of(feeds.get("encoder")), sizes)
        splits = {"train_split": self.config.train_split, "test_split": self.config.test_split}
        yield from lacking(feeds["images"], "masks", splits)
        yield from single_class(feeds["images"], splits)

    def run(self, context: Context) -> Outcome:
        """Trains and scores.

        Raises: SourceError for a split without masks, or without pixels of two classes, UsageError for a size that
            does not split into patches.
        """
        from stages.data.confusion import scores
        from stages.data.mask_classes import MaskClasses
        from stages.data.segmented_test import class_table, picture
        from stages.data.units import Units, write
        from stages.evaluate.segment_linear_steps import LinearSegmentation
        from stages.evaluate.stored_features import masked_ids
        from stages.models.encoder import Encoder
        from stages.models.inference import Inference, require_size

        config, images = self.config, context.inputs["images"]
        classes = MaskClasses.of(images)
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        train_ids, test_ids = masked_ids(context.name, images, splits).values()
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.train_size, f"stages.{context.name}.train_size")
        require_size(encoder, config.test_size, f"stages.{context.name}.test_size")
        inferences = {"": Inference(encoder, precision=config.precision)}
        if config.random_baseline:
            inferences["_random"] = Inference(encoder.untrained_twin(config.seed), precision=config.precision)

        problems: list[dict[str, str]] = []
        units = Units(absent=config.absent)
        evaluation = LinearSegmentation(context, config, classes, inferences, problems, units)
        cache = evaluation.cache_train(train_ids)
        probes = {name: evaluation.train(cache, name) for name in inferences}
        matrices, shown = evaluation.test(test_ids, probes, show=_SHOWN_IMAGES)

        results = {name: scores(matrix, config.absent) for name, matrix in matrices.items()}
        metrics = {key: value for name, result in results.items() for key, value in result.metrics(name).items()}
        context.output.put_table(0, class_table(classes, results, matrices[""].sum(axis=1)))
        write(context.output, config, metrics, units)
        context.output.put_file("preview.png", picture(shown, classes))
        return Outcome(
            metrics=metrics,
            counts={
                "train": len(train_ids),
                "test": len(test_ids),
                "classes": len(classes.names),
                "unreadable": len(problems),
            },
            problems=problems,
            notes={"lr" + name: trained.lr for name, trained in probes.items()},
            preview="preview.png",
        )
