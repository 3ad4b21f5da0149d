"""The `segment_linear` stage: a linear layer on frozen patch features, scored by mIoU.

Source: docs/methods.md#linear-segmentation.

Reading order: this file wires, `segment_linear_steps.py` encodes, trains and scores, `linear_probe.py` is the layer,
`confusion.py` the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.stage import Context, Feed, Outcome, Stage
from stages.evaluate.requirements import lacking, single_class
from stages.evaluate.segment_linear_settings import SegmentLinearConfig
from stages.models.planned import backbone_of, undivided

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store.artifact import Artifact
    from stages.evaluate.confusion import Scores
    from stages.evaluate.mask_classes import MaskClasses
    from stages.evaluate.segment_linear_steps import ShownImage

_SHOWN_IMAGES = 6


class SegmentLinear(Stage[SegmentLinearConfig]):
    """images + encoder -> metrics miou, pixel_accuracy, mean_accuracy in per cent (and *_random), one row a class."""

    kind = "metrics"
    version = 3
    packages = ("timm",)
    uses_ray = False
    shows_metrics = True
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
        from stages.evaluate.confusion import scores
        from stages.evaluate.mask_classes import MaskClasses
        from stages.evaluate.segment_linear_steps import LinearSegmentation
        from stages.evaluate.units import Units, write
        from stages.models.encoder import Encoder
        from stages.models.inference import Inference, require_size

        config, images = self.config, context.inputs["images"]
        classes = MaskClasses.of(images)
        train_ids, test_ids = self._masked(context.name, images)
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.train_size, f"stages.{context.name}.train_size")
        require_size(encoder, config.test_size, f"stages.{context.name}.test_size")
        inferences = {"": Inference(encoder, precision=config.precision)}
        if config.random_baseline:
            inferences["_random"] = Inference(encoder.untrained_twin(config.seed), precision=config.precision)

        problems: list[dict[str, str]] = []
        units = Units()
        evaluation = LinearSegmentation(context, config, classes, inferences, problems, units)
        cache = evaluation.cache_train(train_ids)
        probes = {name: evaluation.train(cache, name) for name in inferences}
        matrices, shown = evaluation.test(test_ids, probes, show=_SHOWN_IMAGES)

        results = {name: scores(matrix, config.absent) for name, matrix in matrices.items()}
        metrics = {key: value for name, result in results.items() for key, value in result.metrics(name).items()}
        self._write(context, classes, results, matrices[""].sum(axis=1))
        write(context.output, config, metrics, units)
        self._preview(context, classes, shown)
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

    @classmethod
    def resampled(cls, artifact: Artifact, draws: int, seed: int) -> dict[str, NDArray[Any]]:
        """The metrics again on bootstrap samples of the test images."""
        from stages.evaluate.units import resample

        return resample(artifact, draws, seed)

    def _masked(self, stage: str, images: Artifact) -> tuple[list[int], list[int]]:
        """Ids of the train and of the test images that have a mask. Raises SourceError for a split without masks."""
        from stages.data.rows import iter_rows
        from stages.evaluate.features import split_error

        splits = {"train": self.config.train_split, "test": self.config.test_split}
        with_mask: dict[str, list[int]] = {split: [] for split in splits.values()}
        for row in iter_rows(images, ["split", "mask"]):
            if row["split"] in with_mask and row["mask"] is not None:
                with_mask[row["split"]].append(row["image_id"])
        for role, split in splits.items():
            if not with_mask[split]:
                remedy = f"set stages.{stage}.{role}_split to a split that has, or ingest with a layout that has masks"
                raise split_error(stage, images, split, "a mask", remedy)
        return with_mask[splits["train"]], with_mask[splits["test"]]

    def _write(
        self,
        context: Context,
        classes: MaskClasses,
        results: Mapping[str, Scores],
        pixels: Any,  # of each class, in all test masks
    ) -> None:
        import pyarrow as pa

        columns: dict[str, Any] = {"class": classes.names, "index": classes.values, "pixels": pixels}
        for name, result in results.items():
            # null where the class is in neither truth nor prediction
            columns["iou" + name] = pa.array(result.iou, from_pandas=True)
            columns["accuracy" + name] = pa.array(result.accuracy, from_pandas=True)
        context.output.put_table(0, pa.table(columns))

    def _preview(self, context: Context, classes: MaskClasses, shown: Sequence[ShownImage]) -> None:
        """A line for each test image: the photograph, the truth, the prediction."""
        from stages.data.pictures import class_colours, colour_mask, grid

        pictures = []
        for pixels, truth, prediction in shown:
            pictures += [pixels, colour_mask(truth, classes.names), colour_mask(prediction, classes.names)]
        sheet = grid(
            pictures,
            columns=3,
            captions=["image", "truth (black: void)", "prediction"] * len(shown),
            legend=list(zip(classes.names, class_colours(len(classes.names)), strict=True)),
        )
        context.output.put_file("preview.png", sheet)
