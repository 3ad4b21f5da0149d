"""Settings that several methods share: crops, heads, the teacher's schedule. Torch-free."""

from __future__ import annotations

from math import gcd

from pydantic import Field

from pipeline.stage import Settings

Range = tuple[float, float]  # the smaller number first


class Crops(Settings):
    """`count` random resized crops of one size."""

    size: int = Field(gt=0, description="side in pixels; a multiple of the ViT's patch")
    count: int = Field(ge=0)
    scale: Range = Field(description="area of a crop as a fraction of the image's")


class HeadSettings(Settings):
    """A projection head: width -> hidden -> hidden -> bottleneck, l2, prototypes."""

    prototypes: int = Field(gt=0, description="K, the number of scores")
    hidden: int = Field(2048, gt=0)
    bottleneck: int = Field(256, gt=0, description="width of the l2-normalised embedding")
    fixed_gain: bool = Field(True, description="prototypes have length 1 (DINO's norm_last_layer)")


class DenseSettings(Settings):
    """Alignment of patches in Leopart's order
    (docs/methods.md#dense-alignment): Sinkhorn on the target grid, then RoIAlign."""

    temperature: float = Field(0.1, gt=0, description="of the student's softmax")
    epsilon: float = Field(0.05, gt=0, description="of Sinkhorn on the teacher's scores")
    iterations: int = Field(3, ge=1, description="of Sinkhorn")
    grid: int = Field(7, ge=1, description="cells a side that an overlap is resampled to")


class TeacherSettings(Settings):
    """The teacher's momentum, a cosine from `momentum` to `momentum_end` over the run."""

    momentum: float = Field(0.996, ge=0, le=1)
    momentum_end: float = Field(1.0, ge=0, le=1)


class TeacherTemperature(Settings):
    """DINO's teacher temperature: linear by epoch from start to end, then constant."""

    start: float = Field(0.04, gt=0)
    end: float = Field(0.07, gt=0)
    epochs: int = Field(30, ge=0, description="warm-up epochs")


def pairing_group(global_batch: int) -> int:
    """How many consecutive images form a group for pairing, where a config does not say: 4 or 2 if they divide the
    global batch, else its smallest divisor above 1.
    """
    common = gcd(4, global_batch)
    return common if common > 1 else next(d for d in range(3, global_batch + 1) if global_batch % d == 0)
