"""What the fine-tuning stages have in common: what a plan checks, how they start, how their score is drawn again.

Planning imports this file and must stay fast: torch and Ray are imported when a stage runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Holding, Mismatch, lacking
from stages.finetune.fit import check_start, conflicts, split_size, usable_counts
from stages.finetune.settings import FinetuneConfig
from stages.models.planned import backbone_of, undivided
from stages.training.launch.start import start
from stages.training.launch.work import Launch
from stages.training.stage import EncoderTraining

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store.artifact import Artifact

F = TypeVar("F", bound=FinetuneConfig)


class Finetune(EncoderTraining[F]):
    """Writes an artifact of kind `encoder`: the trained encoder, its head, its curves, and its score with its units.

    So it is a cell of a comparison beside the frozen evaluations of the encoder that it starts from, and a row of it
    where other evaluations take it as their encoder.
    """

    packages = ("timm",)
    shows_metrics = True
    exports = ("encoder.safetensors", "encoder.json", "filter*.safetensors")  # not the head
    needs: ClassVar[Holding] = "labels"  # what the images must hold
    work: ClassVar[str]  # import path of what a rank does
    sizes: ClassVar[tuple[str, ...]] = ()  # options that are sides of images which the encoder sees

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Images without what is learnt from, sizes of no whole patches, numbers that do not fit together."""
        splits = {"train_split": self.config.train_split, "test_split": self.config.test_split}
        yield from lacking(feeds["images"], self.needs, splits)
        sides = {path: getattr(self.config, path) for path in self.sizes}
        yield from undivided(backbone_of(feeds.get("encoder")), {k: v for k, v in sides.items() if v is not None})
        counted = "images" if self.needs == "objects" else self.needs  # boxes are counted one by one
        there = self.learnt_from(split_size(feeds["images"].notes, self.config.train_split, counted))
        counts = [max(n, 1) for n in self.config.resources.worker_counts or (1,)]
        found = [one for n in dict.fromkeys(counts) for one in conflicts(self.config, workers=n, images=there)]
        yield from dict.fromkeys(found)

    def learnt_from(self, images: int | None) -> int | None:
        """How many of the train images are used; all, as it stands."""
        return images

    @classmethod
    def resampled(cls, artifact: Artifact, draws: int, seed: int) -> dict[str, NDArray[Any]]:
        """The metrics again on bootstrap samples of the test's units."""
        from stages.data.units import resample

        return resample(artifact, draws, seed)

    def run(self, context: Context) -> Outcome:
        """Train, or continue a training that was interrupted, then test."""
        config = self.config
        launch = Launch(
            config,
            work=self.work,
            loader="stages.finetune.data.examples",
            check_start=partial(check_start, config),
            usable_counts=partial(usable_counts, config),
        )
        return start(launch, context)
