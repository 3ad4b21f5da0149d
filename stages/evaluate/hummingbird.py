"""The `hummingbird` stage: patches get the labels of the memory patches most like them, without training.

Source: docs/methods.md#in-context-segmentation. The computations are in `in_context.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.stage import Context, Outcome
from stages.evaluate.frozen import FrozenConfig, FrozenStage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.data.mask_classes import MaskClasses, MaskLabels
    from stages.evaluate.vector_bank import VectorBank

IMAGES = 8  # test images that are looked up together


class HummingbirdConfig(FrozenConfig):
    """The protocol's numbers; defaults are the paper's."""

    k: int = Field(30, ge=1, description="memory patches that a patch is compared with")
    temperature: float = Field(0.02, gt=0, description="a memory patch weighs exp(cosine / temperature)")
    memory: int = Field(
        10_240_000, ge=1, description="patches kept at most; each image gives the same number, rare classes first"
    )
    void_as_background: bool = Field(
        False, description="void counts as the first class in the memory, as in the public code; else it is left out"
    )


class Hummingbird(FrozenStage[HummingbirdConfig]):
    """images + features -> metrics miou, pixel_accuracy, mean_accuracy in per cent, one row a class."""

    units = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "%")
    whole_images = True
    Config = HummingbirdConfig

    def run(self, context: Context) -> Outcome:
        """Fills the memory and segments the test images.

        Raises: SourceError for a split without usable masks, or with pixels of one class only.
        """
        import torch

        from stages.data.ahead import in_batches
        from stages.data.mask_classes import MaskClasses
        from stages.data.segmented_test import SegmentedTest
        from stages.evaluate.in_context import recall_shares, segment
        from stages.evaluate.stored_features import iter_masked, masked_ids

        config, images, features = self.config, context.inputs["images"], context.inputs["features"]
        classes = MaskClasses.of(images)
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        ids = masked_ids(context.name, images, splits)
        problems: list[dict[str, str]] = []
        memory, shares = self._memory(context, classes, ids["train_split"], problems)
        test = SegmentedTest(classes, ids["test_split"])
        k, wanted = min(config.k, len(memory)), set(ids["test_split"])
        # Several images at a time, because a search reads the whole memory.
        for images_B in in_batches(iter_masked(images, features, classes, wanted, problems), IMAGES):
            similarity, rows = memory.nearest(torch.cat([_unit(image.map) for image in images_B]), k)
            sizes = [image.map.shape[0] * image.map.shape[1] for image in images_B]
            for image, near, which in zip(
                images_B, torch.split(similarity, sizes), torch.split(rows, sizes), strict=True
            ):
                recalled = recall_shares(near, shares.gather(which), config.temperature)
                found = segment(recalled.reshape(*image.map.shape[:2], -1), *image.labels.shape)
                test.add(image.image_id, image.key, image.labels, found.numpy())
            context.report_progress(len(test.units.names), len(wanted), "test images")
        counts = {"train": len(ids["train_split"]), "memory": len(memory)}
        return test.finish(context, config, problems, counts)

    def _memory(
        self, context: Context, classes: MaskClasses, ids: list[int], problems: list[dict[str, str]]
    ) -> tuple[VectorBank, VectorBank]:
        """Unit features and class shares of the memory's patches."""
        import numpy as np
        import torch

        from stages.evaluate.in_context import rare_first
        from stages.evaluate.stored_features import iter_masked, require_some
        from stages.evaluate.vector_bank import VectorBank

        config, scratch = self.config, context.output.scratch
        quota = max(1, config.memory // len(ids))
        memory, shares = VectorBank(scratch / "memory"), VectorBank(scratch / "shares")
        source = iter_masked(context.inputs["images"], context.inputs["features"], classes, set(ids), problems)
        for done, image in enumerate(source, 1):
            cells_NC = self._shares(image.labels, image.map.shape[:2], len(classes.names)).flatten(0, 1)
            rows = torch.arange(len(cells_NC))[cells_NC.any(dim=1)]
            if len(rows) > quota:
                draws = np.random.default_rng((config.seed, image.image_id)).random(len(cells_NC))
                rows = rare_first(cells_NC, draws, quota)
            memory.append(_unit(image.map)[rows])
            shares.append(cells_NC[rows])
            context.report_progress(done, len(ids), "train images")
        require_some(context.name, len(memory), f"{len(ids)} train", problems)
        return memory, shares

    def _shares(self, labels_HW: MaskLabels, grid: tuple[int, ...], classes: int) -> Tensor:
        from stages.evaluate.in_context import CELL, cell_labels, class_shares

        background = self.config.void_as_background
        return class_shares(cell_labels(labels_HW, *grid), CELL, classes, void_as_background=background)


def _unit(map_hwD: object) -> Tensor:
    """A map's patches as unit vectors, (h w, D)."""
    import torch

    patches = torch.as_tensor(map_hwD).flatten(0, 1)
    return torch.nn.functional.normalize(patches, dim=1)
