"""Classification: which images, their crops, the linear layer on the encoder, and the test.

Shape legend: B images, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from stages.data.ahead import in_batches
from stages.data.images import decode
from stages.data.pictures import RGB, grid
from stages.data.prepared import prepared, split_error
from stages.data.rows import iter_rows
from stages.data.units import hits
from stages.finetune.classification import ClassificationConfig
from stages.finetune.data.examples import Example, LabelledBatch, normalised
from stages.finetune.data.placement import Pixels, jittered, mirrored, resized_crop
from stages.finetune.model import FinetunedModel
from stages.finetune.work import Examples, FinetuneWork, Tested
from stages.models.encoder import Encoder
from stages.models.inference import centre_square
from stages.training.settings import TrainingConfig

SHOWN = 12  # test images of the picture


class Classifier(FinetunedModel):
    """A linear layer on the encoder's vector, or on the mean of its patches; cross-entropy.

    Args:
        encoder: where training starts from.
        classes: C.
        config: of the stage.
    """

    def __init__(self, encoder: Encoder, classes: int, config: ClassificationConfig) -> None:
        super().__init__(encoder, layer_decay=config.layer_decay, batch_norm=config.batch_norm)
        self.pooling, self.smoothing = config.pooling, config.label_smoothing
        self.head = nn.Linear(encoder.vector_width if config.pooling == "vector" else encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """(B, C)."""
        found = self.trunk(images_B3HW)
        vector_BD = found.vector if self.pooling == "vector" else found.map.mean(dim=(2, 3))
        logits_BC: Tensor = self.head(vector_BD)
        return logits_BC

    def compute_terms(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Cross-entropy, with smoothed targets where the config says so."""
        logits_BC = self.logits(batch.images).float()
        loss = functional.cross_entropy(logits_BC, batch.stacked("label"), label_smoothing=self.smoothing)
        return {"cross_entropy": loss}


@dataclass(frozen=True)
class CropWithLabel:
    """A random crop and its label."""

    config: ClassificationConfig

    def __call__(self, row: dict[str, Any], pixels: Pixels, rng: np.random.Generator) -> Example:
        """The example of a row."""
        config, (height, width) = self.config, pixels.shape[:2]
        crop = resized_crop(rng, width, height, size=config.size, scale=config.crop_scale, ratio=config.crop_ratio)
        cut = mirrored(crop, rng, config.flip).pixels(pixels)
        label = np.array(row["label_id"], np.int64)
        return Example(jittered(rng, cut, config.colour_jitter), {"label": label})


class ClassificationWork(FinetuneWork):
    """The `finetune_classification` stage on a rank."""

    Config: ClassVar[type[TrainingConfig]] = ClassificationConfig

    def examples(self) -> Examples:
        """The labelled train images, or the share of them that is asked for."""
        config, images = self.settings, self.inputs["images"]
        labels = labels_of(images, "train_split", config.train_split)
        ids = share_of_labels(labels, config.label_fraction, config.label_seed)
        return Examples(ids, ["label_id"], CropWithLabel(config))

    def build(self, encoder: Encoder) -> Classifier:
        """The encoder with its linear layer."""
        return Classifier(encoder, len(self.classes), self.settings)

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the logits; numbers where the images name none."""
        images = self.inputs["images"]
        names = [str(name) for name in images.manifest.notes.get("classes", ())]
        highest = max(row["label_id"] for row in iter_rows(images, ["label_id"]) if row["label_id"] is not None)
        return names + [str(number) for number in range(len(names), highest + 1)]

    def facts(self) -> dict[str, Any]:
        """The classes, and what the linear layer reads."""
        return {"task": "classification", "classes": self.classes, "pooling": self.settings.pooling}

    def test(self, model: FinetunedModel, device: torch.device) -> Tested:
        """Top-1 and top-5 of the central crops."""
        assert isinstance(model, Classifier)
        config, images, classes = self.settings, self.inputs["images"], self.classes
        labels = labels_of(images, "test_split", config.test_split)
        problems: list[dict[str, str]] = []

        def cut(row: Mapping[str, Any]) -> tuple[str, int, RGB]:
            return row["key"], row["image_id"], centre_square(decode(row["image"]), config.resize, config.size)

        keys: list[str] = []
        ranks: list[int] = []
        truths: list[int] = []
        guesses: list[int] = []
        shown: dict[int, RGB] = {}  # by its place in the test
        picked = set(np.linspace(0, len(labels) - 1, SHOWN).round().astype(int).tolist())
        size = config.resources.batch_size or config.batch_size
        found = prepared(images, ["key", "image"], cut, set(labels), problems=problems)
        for batch in in_batches(found, size):
            pixels = [torch.from_numpy(one) for _, _, one in batch]
            logits_BC = predict(model, normalised(pixels, model.trunk.mean, model.trunk.std, 1, device))
            truth_B = torch.tensor([labels[image_id] for _, image_id, _ in batch])
            ranks += (logits_BC > logits_BC.gather(1, truth_B[:, None])).sum(1).tolist()
            guesses += logits_BC.argmax(1).tolist()
            truths += truth_B.tolist()
            shown |= {place: one for place, (_, _, one) in enumerate(batch, len(keys)) if place in picked}
            keys += [key for key, _, _ in batch]
        if not keys:
            raise SourceError(f"none of the {len(labels)} labelled images of split {config.test_split!r} can be used")
        units = hits(keys, ranks)
        columns = {
            "key": keys,
            "label": [classes[one] for one in truths],
            "predicted": [classes[one] for one in guesses],
            "rank": pa.array(ranks, pa.int32()),
        }
        captions = [f"{classes[truths[place]]}, seen as {classes[guesses[place]]}" for place in shown]
        return Tested(
            units.metrics(),
            units,
            pa.table(columns),
            {"test": len(keys), "classes": len(classes), "unusable": len(problems)},
            grid(list(shown.values()), columns=4, captions=captions, title="test images"),
            problems,
        )


@torch.no_grad()
def predict(model: Classifier, images_B3HW: Tensor) -> Tensor:
    """(B, C) logits on the CPU."""
    return model.logits(images_B3HW).float().cpu()


def labels_of(images: Artifact, option: str, split: str) -> dict[int, int]:
    """Class of each labelled image of a split, by its id. Raises SourceError where there is none."""
    rows = iter_rows(images, ["split", "label_id"])
    found = {r["image_id"]: r["label_id"] for r in rows if r["split"] == split and r["label_id"] is not None}
    if not found:
        raise split_error("fine-tuning", images, split, "a label", f"set {option} to a split that has")
    return found


def share_of_labels(labels: Mapping[int, int], fraction: float, seed: int) -> Sequence[int]:
    """Ids of a share of each class's images, at least one of each; a smaller share is part of a larger one.

    Args:
        labels: class by id.
        fraction: of the images of a class.
        seed: which ones.
    """
    if fraction == 1:
        return sorted(labels)
    chosen: list[int] = []
    for one in sorted(set(labels.values())):
        ids = [image_id for image_id in sorted(labels) if labels[image_id] == one]
        order = np.random.default_rng((seed, one)).permutation(len(ids))
        chosen += [ids[i] for i in order[: max(1, round(fraction * len(ids)))]]
    return sorted(chosen)
