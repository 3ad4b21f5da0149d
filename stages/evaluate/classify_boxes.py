"""The `classify_boxes` stage: weighted k-NN on the patches of an image's largest object (FLSL's protocol).

Source: docs/methods.md#bbox-aligned-k-nn. The computations are in `bbox_knn_votes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.errors import SourceError, UsageError
from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Mismatch
from stages.evaluate.frozen import FrozenConfig, FrozenStage

if TYPE_CHECKING:
    from torch import Tensor


class ClassifyBoxesConfig(FrozenConfig):
    """The protocol's numbers; defaults are the paper's."""

    k: int = Field(140, ge=1, description="train tokens that a test token asks: the paper's 20 times 7")
    temperature: float = Field(0.07, gt=0, description="a token's vote weighs exp(cosine / temperature)")
    grid: int = Field(3, ge=1, description="cells along a side of the grid over the box")
    official_geometry: bool = Field(False, description="the released script's, which misplaces boxes of wide images")


class ClassifyBoxes(FrozenStage[ClassifyBoxesConfig]):
    """images + features (fit: centre) -> metrics top1, top5 in per cent."""

    units = dict.fromkeys(("top1", "top5"), "%")
    needs = "labels"
    Config = ClassifyBoxesConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Also features of whole images: the protocol is of the central crop."""
        yield from super().mismatches(feeds)
        features, images = feeds["features"], feeds["images"]
        if getattr(features.config, "fit", "centre") != "centre":
            yield "features", f"{features.stage} is not of the images' central square", "name features with fit: centre"
        if images.counts is not None and images.counts.get("objects") == 0:
            yield "images", f"{images.stage} has no object boxes", "ingest with a layout that has boxes (coco, voc)"

    def run(self, context: Context) -> Outcome:
        """Lets the train tokens vote.

        Raises: SourceError for a split without usable boxes, UsageError for fewer train tokens than `k`.
        """
        from stages.data.units import hits, write
        from stages.evaluate.bbox_knn_votes import best_places

        config, problems = self.config, list[dict[str, str]]()
        train, train_labels, _ = self._tokens(context, config.train_split, problems)
        test, test_labels, keys = self._tokens(context, config.test_split, problems)
        if config.k > train.shape[0] * train.shape[1]:
            there = train.shape[0] * train.shape[1]
            raise UsageError(f"stages.{context.name}.k: {config.k}, but there are {there} train tokens: lower it")
        places = best_places(
            train,
            train_labels,
            test,
            test_labels,
            classes=1 + int(max(train_labels.max(), test_labels.max())),
            k=config.k,
            temperature=config.temperature,
        )
        found = hits(keys, places.tolist())
        write(context.output, config, found.metrics(), found)
        counts = {"train": len(train), "test": len(test), "unusable": len(problems)}
        return Outcome(metrics=found.metrics(), counts=counts, problems=problems)

    def _tokens(self, context: Context, split: str, problems: list[dict[str, str]]) -> tuple[Tensor, Tensor, list[str]]:
        """Tokens over the largest box of each image (N, grid^2, D), labels (N,) and keys."""
        import numpy as np
        import torch

        from stages.data.rows import iter_rows
        from stages.evaluate.bbox_knn_votes import object_patches
        from stages.evaluate.stored_features import NO_FEATURES, iter_features

        rows = {
            row["image_id"]: row
            for row in iter_rows(context.inputs["images"], ["key", "split", "label_id", "objects", "width", "height"])
            if row["split"] == split and row["label_id"] is not None
        }
        tokens, labels, keys = [], [], []
        for image in iter_features(context.inputs["features"], rows.keys()):
            row = rows.pop(image.image_id)
            boxes = np.array([one["box"] for one in row["objects"] or () if not one["crowd"]], np.float64)
            assert image.map is not None
            side = image.map.shape[0]
            found = object_patches(
                boxes,
                row["width"],
                row["height"],
                resize=round(side * 16 * 8 / 7),
                crop=side * 16,
                patch=16,
                grid=self.config.grid,
                official_geometry=self.config.official_geometry,
            )
            if found is None:
                problems.append({"key": str(row["key"]), "reason": "it has no box in the central crop"})
                continue
            tokens.append(image.map.reshape(-1, image.map.shape[-1])[found[1]])
            labels.append(row["label_id"])
            keys.append(str(row["key"]))
        problems += [{"key": str(row["key"]), "reason": NO_FEATURES} for row in rows.values()]
        if not tokens:
            raise SourceError(
                f"{context.name}: no image of split {split!r} has a label, a box in its middle and features"
            )
        return torch.from_numpy(np.stack(tokens)), torch.tensor(labels), keys
