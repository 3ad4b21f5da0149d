"""What `segment_knn` and `segment_logistic` share: CAPI's protocol around a classifier of single patches.

Source: docs/methods.md#dense-classifiers. Planning imports this file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Outcome
from stages.evaluate.frozen import FrozenConfig, FrozenStage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.data.mask_classes import MaskClasses
    from stages.evaluate.patch_labels import Patches

Choice = dict[str, float | str]  # hyper-parameters of a classifier, by their names


class PatchClassifierConfig(FrozenConfig):
    """What every classifier of patches is told."""

    patches: int = Field(4_000_000, ge=100, description="train patches at most, the same number of every image")


P = TypeVar("P", bound=PatchClassifierConfig)


class PatchClassifierStage(FrozenStage[P]):
    """images + features -> metrics miou, pixel_accuracy, mean_accuracy in per cent, one row a class."""

    units = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "%")
    whole_images = True

    @abstractmethod
    def choices(self) -> list[Choice]:
        """The hyper-parameters to choose among."""

    @abstractmethod
    def tried(self, context: Context, train: Patches, vectors: Tensor) -> Iterator[tuple[Choice, Tensor]]:
        """Each choice with the classes that it gives to other vectors, (N,).

        Args:
            context: of the stage.
            train: what the classifier learns from.
            vectors: (N, D).

        Raises: UsageError where no choice can be used with these patches.
        """

    @abstractmethod
    def fitted(self, context: Context, train: Patches, choice: Choice) -> Callable[[Tensor], Tensor]:
        """A classifier of vectors: (N, D) -> classes (N,)."""

    def run(self, context: Context) -> Outcome:
        """Chooses the hyper-parameters on a tenth of the train images, fits on all and segments the test images.

        Raises: SourceError for a split without usable masks or with patches of one class only, and for a single train
            image where there is something to choose.
        """
        import torch

        from stages.data.mask_classes import MaskClasses
        from stages.data.segmented_test import SegmentedTest
        from stages.evaluate.patch_labels import enlarged
        from stages.evaluate.stored_features import iter_masked, masked_ids

        config, images, features = self.config, context.inputs["images"], context.inputs["features"]
        classes = MaskClasses.of(images)
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        ids = masked_ids(context.name, images, splits)
        problems: list[dict[str, str]] = []
        train, mean, deviation, choice, reached = self._chosen(context, classes, ids["train_split"], problems)
        classify = self.fitted(context, train, choice)
        test = SegmentedTest(classes, ids["test_split"])
        wanted = set(ids["test_split"])
        for done, image in enumerate(iter_masked(images, features, classes, wanted, problems), 1):
            height, width = image.map.shape[:2]
            found = classify((torch.from_numpy(image.map).flatten(0, 1) - mean) / deviation)
            labels = enlarged(found.reshape(height, width).numpy(), image.labels.shape)
            test.add(image.image_id, image.key, image.labels, labels)
            context.report_progress(done, len(wanted), "test images")
        notes = choice | ({} if reached is None else {"held_out_miou": reached})
        counts = {"train": len(ids["train_split"]), "patches": len(train.vectors)}
        return test.finish(context, config, problems, counts, notes)

    def _chosen(
        self, context: Context, classes: MaskClasses, ids: list[int], problems: list[dict[str, str]]
    ) -> tuple[Patches, Tensor, Tensor, Choice, float | None]:
        """The train patches, their scale, the best choice and what it reached on the held-out tenth."""
        from stages.data.confusion import scores
        from stages.evaluate.held_out import held_out
        from stages.evaluate.patch_labels import draw_patches, scale

        config, choices = self.config, self.choices()

        def drawn(chosen: list[int], before: int) -> Patches:
            most = max(1, config.patches * len(chosen) // len(ids))
            report = lambda done: context.report_progress(before + done, len(ids), "train images")  # noqa: E731
            return draw_patches(context, classes, chosen, most, config.seed, problems, report)

        if len(choices) == 1:
            train = drawn(ids, 0)
            mean, deviation = scale(train)
            return self._usable(context, train.standardised(mean, deviation)), mean, deviation, choices[0], None
        if len(ids) < 2:
            raise SourceError(
                f"{context.name}: hyper-parameters are chosen on held-out train images, and split "
                f"{config.train_split!r} has one image with a mask: give one value of each, or name another split"
            )
        rest_rows, held_rows = held_out(len(ids), config.seed, parts=10)
        rest = drawn([ids[row] for row in rest_rows], 0)
        held = drawn([ids[row] for row in held_rows], len(rest_rows))
        mean, deviation = scale(rest)
        rest, held = self._usable(context, rest.standardised(mean, deviation)), held.standardised(mean, deviation)
        reached: list[tuple[float, Choice]] = []
        for choice, found in self.tried(context, rest, held.vectors):
            matrix = held.matrix(found)
            reached.append((scores(matrix).miou if matrix.any() else 0.0, choice))
        best, choice = max(reached, key=lambda one: one[0])  # of equals the first
        return rest.joined(held.labelled()), mean, deviation, choice, best

    def _usable(self, context: Context, patches: Patches) -> Patches:
        """The patches that have a class. Raises SourceError for fewer than two classes."""
        usable = patches.labelled()
        if not (usable.labels != usable.labels[:1]).any():
            raise SourceError(
                f"{context.name}: the patches of split {self.config.train_split!r} are of one class or void, going by "
                "the most frequent class of a patch: every encoder would get the same score (name another split)"
            )
        return usable
