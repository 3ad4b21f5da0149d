"""The `classify_knn` stage: weighted k-NN on frozen image vectors (DINO's protocol, methods.md 6.3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.errors import SourceError
from pipeline.stage import Context, Input, Outcome, Stage, StageConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.evaluate.vectors import Judged, Vectors

_SHOWN_IMAGES, _SHOWN_NEIGHBORS = 6, 5


class ClassifyKnnConfig(StageConfig):
    images: Input["images"] = Field(description="with labels and splits")
    encoder: Input["encoder"]
    train_split: str = Field("train", description="the images that vote")
    test_split: str = Field("val", description="the images that are classified")
    k: int = Field(20, ge=1, description="neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="a neighbour's vote weighs exp(cosine / temperature)")
    pooling: Literal["cls", "mean"] = Field("cls", description="[CLS] (token mean where there is none), or map mean")
    resize: int = Field(256, gt=0, description="short side in pixels before the crop")
    crop: int = Field(224, gt=0, description="side in pixels of the central square that is encoded")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward pass")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, description="of the random encoder")

    @model_validator(mode="after")
    def _crop_fits(self) -> ClassifyKnnConfig:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize")
        return self


class ClassifyKnn(Stage[ClassifyKnnConfig]):
    """images + encoder -> metrics top1, top5 in per cent (and top1_random, top5_random), one row a test image."""

    kind = "metrics"
    packages = ("timm",)
    uses_ray = False
    shows_metrics = True
    Config = ClassifyKnnConfig

    def run(self, context: Context) -> Outcome:
        from stages.evaluate.vectors import encode_split, judge
        from stages.models.encoder import Encoder
        from stages.models.inference import require_size

        config, images = self.config, context.inputs["images"]
        classes: list[str] = list(images.manifest.notes.get("classes", ()))
        splits = self._labelled(context.name, images)
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.crop, f"stages.{context.name}.crop")
        encoders = {"": encoder}
        if config.random_baseline:
            encoders["_random"] = encoder.untrained_twin(config.seed)

        problems: list[dict[str, str]] = []
        encoded: list[Vectors] = []
        total = sum(len(labels) for labels in splits.values())
        for labels in splits.values():
            encoded.append(
                encode_split(
                    images,
                    labels,
                    encoders,
                    config,
                    batch_size=context.resources.batch_size or 64,
                    problems=problems,
                    progress=partial(_report, context, sum(len(part.ids) for part in encoded), total),
                )
            )
        train, test = encoded
        self._require_voters(context.name, train, test)
        count = max(len(classes), 1 + max(int(part.labels.max()) for part in (train, test)))
        judged = {
            suffix: judge(train, test, suffix, count, k=config.k, temperature=config.temperature) for suffix in encoders
        }
        metrics = {
            name + suffix: value for suffix, result in judged.items() for name, value in result.metrics().items()
        }
        self._write(context, metrics, _names(classes, count), test, judged)
        self._preview(context, _names(classes, count), train, test, judged[""])
        return Outcome(
            metrics=metrics,
            counts={
                "train": len(train.labels),
                "test": len(test.labels),
                "classes": count,
                "unreadable": len(problems),
            },
            problems=problems,
            preview="preview.png",
        )

    def _labelled(self, stage: str, images: Artifact) -> dict[str, dict[int, int]]:
        """{"train": {image_id: label_id}, "test": ...}. Raises SourceError for a split without labels."""
        from stages.evaluate.features import rows, split_error

        wanted = {"train": self.config.train_split, "test": self.config.test_split}
        found: dict[str, dict[int, int]] = {part: {} for part in wanted}
        for row in rows(images, ["split", "label_id"]):
            for part, split in wanted.items():
                if row["split"] == split and row["label_id"] is not None:
                    found[part][row["image_id"]] = row["label_id"]
        for part, split in wanted.items():
            if not found[part]:
                raise split_error(
                    stage,
                    images,
                    split,
                    "a label",
                    f"set stages.{stage}.{part}_split to a split that has, ingest class folders, or ingest with "
                    "label: largest_object where there are boxes",
                )
        return found

    def _require_voters(self, stage: str, train: Vectors, test: Vectors) -> None:
        if not len(test.labels):
            raise SourceError(
                f"{stage}: no image of split {self.config.test_split!r} can be decoded; see the images' stage"
            )
        if self.config.k > len(train.labels):
            raise SourceError(
                f"{stage}: k is {self.config.k}, but split {self.config.train_split!r} has {len(train.labels)} usable "
                f"labelled images: set stages.{stage}.k to {max(1, len(train.labels))} or less"
            )

    def _write(
        self,
        context: Context,
        metrics: Mapping[str, float],
        classes: list[str],
        test: Vectors,
        judged: Mapping[str, Judged],
    ) -> None:
        import pyarrow as pa

        result = judged[""]
        table = {
            "image_id": pa.array(test.ids, pa.int64()),
            "label": [classes[label] for label in test.labels.tolist()],
            "prediction": [classes[label] for label in result.predictions.tolist()],
            "rank": pa.array(result.ranks.tolist(), pa.int32()),  # of the true class; 0 is a hit
        }
        if "_random" in judged:
            table["rank_random"] = pa.array(judged["_random"].ranks.tolist(), pa.int32())
        context.output.put_table(0, pa.table(table))
        text = json.dumps({**metrics, "protocol": self.config.model_dump(mode="json", exclude={"resources"})}, indent=2)
        context.output.put_file("metrics.json", text.encode())

    def _preview(self, context: Context, classes: list[str], train: Vectors, test: Vectors, result: Judged) -> None:
        """Test images beside the train images that voted for them."""
        import numpy as np

        from stages.data.images import decode
        from stages.data.pictures import neighbor_strip
        from stages.evaluate.features import rows

        shown = np.unique(np.linspace(0, len(test.ids) - 1, _SHOWN_IMAGES).astype(int)).tolist()
        voters = result.neighbors[shown, :_SHOWN_NEIGHBORS].tolist()
        wanted = {test.ids[i] for i in shown} | {train.ids[row] for near in voters for row in near}
        pixels = {row["image_id"]: decode(row["image"]) for row in rows(context.inputs["images"], ["image"], wanted)}
        sheet = neighbor_strip(
            [pixels[test.ids[i]] for i in shown],
            [[pixels[train.ids[row]] for row in near] for near in voters],
            [[classes[int(train.labels[row])] for row in near] for near in voters],
            query_captions=[
                f"{truth} (right)" if truth == given else f"{truth} -> {given}"
                for truth, given in ((classes[int(test.labels[i])], classes[int(result.predictions[i])]) for i in shown)
            ],
            title="Test images (truth -> prediction), each beside the train images that voted most",
        )
        context.output.put_file("preview.png", sheet)


def _report(context: Context, before: int, total: int, done: int) -> None:
    context.report_progress(before + done, total, "images")


def _names(classes: list[str], count: int) -> list[str]:
    return [*classes, *(str(i) for i in range(len(classes), count))]
