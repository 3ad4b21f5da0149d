"""What a stage tells the launcher about its training, in two halves.

`Launch` is the driver's half and free of torch, as a driver with Ray Train needs none. `Work` is the ranks' half: each
of them makes it from the settings and the inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config import registry
from pipeline.stage import Context, Outcome
from stages.training.settings import TrainingConfig

if TYPE_CHECKING:
    import torch

    from pipeline.store.artifact import Artifact
    from pipeline.store.writer import ArtifactWriter
    from stages.training.checkpoint import TrainingState
    from stages.training.loop import Checkpoints, LeaveReplay, Training


@dataclass(frozen=True)
class Launch:
    """A training to start."""

    config: TrainingConfig
    work: str  # "package.module:Class" of its `Work`
    loader: str  # module with what loader processes run: they import it before their first image
    check_start: Callable[[Context, tuple[int, int]], None]  # asks again whether numbers fit: fewest and most workers
    usable_counts: Callable[[int, int], list[int]]  # those numbers of workers, from one to another, that can share


class Work(ABC):
    """The parts of one training as a rank puts them together, and the artifact's files at its end.

    Args:
        settings: of the stage, an instance of `Config` or what `model_dump` made of one.
        inputs: finished artifacts by dotted input path.
        output: of the artifact in the making.
    """

    Config: ClassVar[type[TrainingConfig]]

    def __init__(self, settings: Any, inputs: Mapping[str, Artifact], output: ArtifactWriter) -> None:
        self.settings: Any = self.Config.model_validate(settings)
        self.inputs, self.output = inputs, output

    @classmethod
    def of(cls, path: str, settings: Any, inputs: Mapping[str, Artifact], output: ArtifactWriter) -> Work:
        """The work that `Launch.work` names."""
        made: Work = registry.imported(path)(settings, inputs, output)
        return made

    @abstractmethod
    def assemble(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        loader_workers: int = 0,
    ) -> Training:
        """The training as `rank` of `world_size` sees it.

        Args:
            rank: which part of every batch this is, from 0.
            world_size: how many ranks share a batch.
            device: where the batches end up.
            loader_workers: processes that read images; 0 does it in this one.
        """

    def checkpoints(self, own: Checkpoints, training: Training) -> Checkpoints:
        """Where the training continues from: its own checkpoints, as it stands."""
        return own

    def take_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Receives the whole optimiser of a training whose ranks held a share of it each, before `write`."""
        return

    def leave_replay(self, training: Training) -> LeaveReplay:
        """What the loop calls on every rank after a step that went wrong; keeps nothing as it stands."""
        return lambda bad: ""

    @abstractmethod
    def write(self, training: Training, state: TrainingState) -> Outcome:
        """Put the artifact's files through the output, on one rank.

        Args:
            training: whose method is trained.
            state: where it has ended.
        """
