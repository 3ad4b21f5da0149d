"""Training in the driver's own process, without Ray: `resources: {workers: 0}`."""

from __future__ import annotations

import torch

from pipeline.stage import Context, Outcome
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.fit import check_start
from stages.pretrain.launch.artifact import write_artifact
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.launch.continuing import FromKeptState
from stages.pretrain.launch.loading import loader_workers
from stages.pretrain.launch.notices import noticing_signals
from stages.pretrain.launch.relay import CurveLog
from stages.pretrain.launch.replay import leaver
from stages.training.checkpoint import CheckpointFolder
from stages.training.loop import TrainingInterrupted, train


def device_of(config: PretrainConfig) -> str:
    """Where the driver's process trains: on a GPU where there is one, unless `resources.gpus` is 0."""
    return "cuda" if config.resources.gpus != 0 and torch.cuda.is_available() else "cpu"


def train_alone(config: PretrainConfig, context: Context, curves: CurveLog) -> Outcome:
    """Train here, from the last checkpoint where there is one, and write the artifact's files."""
    check_start(config, context, (1, 1))
    checkpoints = CheckpointFolder(
        context.output.progress_folder / "checkpoints", context.output.whole, say=context.say
    )
    training = assemble(
        config,
        context.inputs,
        device=device_of(config),
        loader_workers=loader_workers(config, torch.get_num_threads()),
    )
    curves.total = training.last_step
    leave_replay = leaver(config, context.inputs, training, context.output)
    started = FromKeptState(checkpoints, context.inputs, training.last_step)
    with noticing_signals() as notices:
        try:
            state = train(training, started, curves.add, leave_replay, notices)
        except TrainingInterrupted as error:
            context.say(f"{context.name}: {error}")
            raise KeyboardInterrupt from None
    for row in state.curves:  # what an earlier, interrupted process had logged belongs to this run's record too
        curves.add(row)
    return write_artifact(config, context.inputs, context.output, training, state, started)
