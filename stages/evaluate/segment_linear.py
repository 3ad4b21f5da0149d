"""The `segment_linear` stage: a linear layer on frozen patch features, scored by mIoU (methods.md 6.1 and 6.2)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.stage import Context, Input, Outcome, Stage, StageConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.evaluate.confusion import Scores
    from stages.evaluate.segments import Classes

_SHOWN = 6


class SegmentLinearConfig(StageConfig):
    images: Input["images"] = Field(description="with masks and splits")
    encoder: Input["encoder"]
    train_split: str = Field("train", description="the images that the linear layer learns from")
    test_split: str = Field("val", description="the images it is scored on")
    train_size: int = Field(336, gt=0, description="side in pixels of a training crop (a multiple of the patch)")
    test_size: int = Field(448, gt=0, description="side in pixels that a whole test image is resized to")
    crops: int = Field(1, ge=0, description="random crops of a train image, encoded once; 0: the whole image, resized")
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="area of a crop as a fraction of the image's")
    label_size: int = Field(
        100, gt=0, description="side at which logits and masks meet in training; tests use all pixels"
    )
    samples: int = Field(100_000, gt=0, description="training images in all, repeats included")
    batch_size: int = Field(128, gt=0)
    lr: float | list[float] = Field(
        3e-3, description="Adam's; of a list, the best on a held-out fifth of the train images (paper: 1e-4 to 1e-2)"
    )
    absent: Literal["skip", "zero"] = Field("skip", description="a class in neither truth nor prediction, in the mean")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder's forward pass")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, description="of crops, the linear layer, the order of images and the random encoder")

    @model_validator(mode="after")
    def _rules(self) -> SegmentLinearConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {list(self.crop_scale)} must rise within (0, 1]")
        if not (self.lr if isinstance(self.lr, list) else [self.lr]) or min(np.atleast_1d(self.lr)) <= 0:
            raise ValueError(f"lr {self.lr} must be a positive number, or a list of them")
        return self


class SegmentLinear(Stage[SegmentLinearConfig]):
    """images + encoder -> metrics miou, pixel_accuracy, mean_accuracy in per cent (and *_random), one row a class."""

    kind = "metrics"
    packages = ("timm",)
    uses_ray = False
    shows_metrics = True
    Config = SegmentLinearConfig

    def run(self, context: Context) -> Outcome:
        from stages.evaluate.confusion import scores
        from stages.evaluate.segments import Classes, cache_train, evaluate, train_probe
        from stages.models.encoder import Encoder
        from stages.models.inference import Inference, require_size

        config, images = self.config, context.inputs["images"]
        classes = Classes.of(images)
        train_ids, test_ids = self._masked(context.name, images)
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.train_size, f"stages.{context.name}.train_size")
        require_size(encoder, config.test_size, f"stages.{context.name}.test_size")
        inferences = {"": Inference(encoder, precision=config.precision)}
        if config.random_baseline:
            inferences["_random"] = Inference(encoder.untrained_twin(config.seed), precision=config.precision)
        problems: list[dict[str, str]] = []

        cache = cache_train(images, train_ids, classes, inferences, config, context, problems)
        probes = {name: train_probe(cache, name, len(classes.names), config, context) for name in inferences}
        matrices, shown = evaluate(
            images, test_ids, classes, inferences, probes, config, context, problems, show=_SHOWN
        )

        results = {name: scores(matrix, config.absent) for name, matrix in matrices.items()}
        metrics = {key: value for name, result in results.items() for key, value in result.metrics(name).items()}
        self._write(context, metrics, classes, results, matrices[""].sum(axis=1))
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
            notes={"lr" + name: probe.lr for name, probe in probes.items()},
            preview="preview.png",
        )

    def _masked(self, stage: str, images: Artifact) -> tuple[list[int], list[int]]:
        """Ids with a mask of both splits. Raises SourceError for a split without masks."""
        from stages.evaluate.features import rows, split_error

        found: dict[str, list[int]] = {self.config.train_split: [], self.config.test_split: []}
        for row in rows(images, ["split", "mask"]):
            if row["split"] in found and row["mask"] is not None:
                found[row["split"]].append(row["image_id"])
        for part, split in (("train", self.config.train_split), ("test", self.config.test_split)):
            if not found[split]:
                remedy = f"set stages.{stage}.{part}_split to a split that has, or ingest with a layout that has masks"
                raise split_error(stage, images, split, "a mask", remedy)
        return found[self.config.train_split], found[self.config.test_split]

    def _write(
        self, context: Context, metrics: dict[str, float], classes: Classes, results: dict[str, Scores], pixels: Any
    ) -> None:
        import pyarrow as pa

        columns: dict[str, Any] = {"class": classes.names, "index": classes.kept, "pixels": pixels}
        for name, result in results.items():
            # null where the class is in neither truth nor prediction
            columns["iou" + name] = pa.array(result.iou, from_pandas=True)
            columns["accuracy" + name] = pa.array(result.accuracy, from_pandas=True)
        context.output.put_table(0, pa.table(columns))
        text = json.dumps({**metrics, "protocol": self.config.model_dump(mode="json", exclude={"resources"})}, indent=2)
        context.output.put_file("metrics.json", text.encode())

    def _preview(self, context: Context, classes: Classes, shown: list[tuple[Any, Any, Any]]) -> None:
        """Test images: the photograph, the truth, the prediction."""
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
