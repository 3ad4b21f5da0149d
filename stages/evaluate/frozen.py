"""What evaluations have in common, and those on stored features: settings, and what a plan checks. Free of torch.

One `features` artifact serves every evaluation that can use it: the encoder runs once over the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, Field

from pipeline.stage import Feed, Input, Stage, StageConfig
from stages.data.requirements import Holding, Mismatch, lacking, single_class

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store.artifact import Artifact


class FeatureConfig(StageConfig):
    """Which images, and their features."""

    images: Input["images"] = Field(description="with what the evaluation needs: splits, labels, masks, boxes")
    features: Input["features"] = Field(description="of these images")


class FrozenConfig(FeatureConfig):
    """Images of two splits, and their features."""

    train_split: str = Field("train", description="the images that are learnt from, or compared with")
    test_split: str = Field("val", description="the images that are scored")
    seed: int = Field(0, ge=0, description="of everything drawn at random")


def _all_positive(values: list[float]) -> list[float]:
    if not values or min(values) <= 0:
        raise ValueError(f"{values}: give positive numbers")
    return values


Positives = Annotated[list[float], AfterValidator(_all_positive)]  # values of a hyper-parameter to choose among

E = TypeVar("E", bound=StageConfig)
F = TypeVar("F", bound=FeatureConfig)
C = TypeVar("C", bound=FrozenConfig)


class Evaluation(Stage[E]):
    """Writes an artifact of kind `metrics` that keeps its test units (units.py)."""

    kind = "metrics"
    uses_ray = False
    shows_metrics = True

    @classmethod
    def resampled(cls, artifact: Artifact, draws: int, seed: int) -> dict[str, NDArray[Any]]:
        """The metrics again on bootstrap samples of the test's units."""
        from stages.data.units import resample

        return resample(artifact, draws, seed)


class FeatureStage(Evaluation[F]):
    """An evaluation on stored features."""

    whole_images: ClassVar[bool] = False  # it cannot use features of the central square

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Features of other images, or of the images' middle where all of them is needed."""
        yield from unfit("features", feeds["features"], feeds["images"], whole=self.whole_images)


def unfit(path: str, features: Feed, images: Feed, *, whole: bool) -> Iterator[Mismatch]:
    """Why features cannot be used with these images.

    Args:
        path: of the field that names the features.
        features: of some images.
        images: that are evaluated on.
        whole: features of the central square do not do.
    """
    described = features.inputs.get("images")
    if described is not None and described.fingerprint != images.fingerprint:
        yield (
            path,
            f"{features.stage} holds the features of {described.stage}, and this stage evaluates on {images.stage}",
            f"name a features stage of {images.stage}",
        )
    if whole and getattr(features.config, "fit", None) == "centre":
        yield (
            path,
            f"{features.stage} has fit: centre, so that the borders of the images have no features",
            "name features with fit: squeeze or aspect",
        )


class FrozenStage(FeatureStage[C]):
    """An evaluation that learns from one split, or compares with it, and scores another."""

    needs: ClassVar[Holding] = "masks"  # what the images of both splits must hold

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Also images without labels or masks, or with one class only."""
        yield from super().mismatches(feeds)
        splits = {"train_split": self.config.train_split, "test_split": self.config.test_split}
        yield from lacking(feeds["images"], self.needs, splits)
        if self.needs == "masks":
            yield from single_class(feeds["images"], splits)
