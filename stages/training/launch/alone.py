"""Training in the driver's own process, without Ray: `resources: {workers: 0}`."""

from __future__ import annotations

import torch

from pipeline.stage import Context, Outcome
from stages.training.checkpoint import CheckpointFolder
from stages.training.launch.loading import loader_workers
from stages.training.launch.notices import noticing_signals
from stages.training.launch.relay import CurveLog
from stages.training.launch.work import Launch, Work
from stages.training.loop import TrainingInterrupted, train
from stages.training.settings import TrainingConfig


def device_of(config: TrainingConfig) -> str:
    """Where the driver's process trains: on a GPU where there is one, unless `resources.gpus` is 0."""
    return "cuda" if config.resources.gpus != 0 and torch.cuda.is_available() else "cpu"


def train_alone(launch: Launch, context: Context, curves: CurveLog) -> Outcome:
    """Train here, from the last checkpoint where there is one, and write the artifact's files."""
    config = launch.config
    launch.check_start(context, (1, 1))
    own = CheckpointFolder(context.output.progress_folder / "checkpoints", context.output.whole, say=context.say)
    work = Work.of(launch.work, config, context.inputs, context.output)
    workers = loader_workers(config, torch.get_num_threads())
    training = work.assemble(device=device_of(config), loader_workers=workers)
    curves.total = training.last_step
    leave_replay = work.leave_replay(training)
    checkpoints = work.checkpoints(own, training)
    with noticing_signals() as notices:
        try:
            state = train(training, checkpoints, curves.add, leave_replay, notices)
        except TrainingInterrupted as error:
            context.say(f"{context.name}: {error}")
            raise KeyboardInterrupt from None
    for row in state.curves:  # what an earlier, interrupted process had logged belongs to this run's record too
        curves.add(row)
    return work.write(training, state)
