"""What stages that train an encoder have in common, as the pipeline sees them. Free of torch: planning imports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.stage import Stage
from stages.training.settings import TrainingConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

T = TypeVar("T", bound=TrainingConfig)


class EncoderTraining(Stage[T]):
    """Writes an artifact of kind `encoder`, on Ray Train or in the driver's own process."""

    kind = "encoder"
    whole_cluster = True
    worker_gpus = 1.0
    tracked_as = "model"

    @property
    def uses_ray(self) -> bool:  # type: ignore[override]
        """False with `resources.workers: 0`, which trains in the driver's own process."""
        return self.config.resources.workers != 0

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """A GPU that training in the driver's process would not find."""
        if self.config.resources.workers == 0 and self.config.resources.gpus:
            import torch

            if not torch.cuda.is_available():
                what = "torch sees no GPU on this machine, and workers: 0 trains here"
                yield "resources.gpus", what, "set it to 0 to train on the CPU, or install torch's build for the driver"

    @classmethod
    def complete_export(cls, artifact: Artifact, folder: Path) -> list[Path]:
        """The code that computes the encoder's features, and a README; the encoder is made from the files once."""
        from stages.models.export import complete

        return complete(artifact, folder)
