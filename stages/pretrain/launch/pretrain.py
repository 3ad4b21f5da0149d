"""The `pretrain` stage's work: train in the driver's own process or on Ray Train, then write the encoder artifact."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from pipeline.stage import Context, Outcome
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import Pretraining, assemble, loader_workers
from stages.pretrain.launch.preview import curves_table, preview_png, views_png
from stages.pretrain.launch.ray_train import train_on_ray
from stages.pretrain.launch.relay import CurveLog
from stages.pretrain.launch.replay import leaver
from stages.training.checkpoint import CheckpointFolder, TrainingState, read_checkpoint
from stages.training.loop import train


def pretrain(config: PretrainConfig, context: Context) -> Outcome:
    """Train (or continue), save the encoder, its curves and its picture."""
    curves = CurveLog(context)
    if config.backbone is not None:  # the workers' working folder is not the driver's
        config = config.model_copy(update={"backbone": config.backbone.anywhere()})
    if config.resources.workers == 0:
        checkpoints = CheckpointFolder(
            context.output.progress_folder / "checkpoints", context.fingerprint, say=context.say
        )
        workers = loader_workers(config, torch.get_num_threads())
        training = assemble(
            config, context.inputs, device="cuda" if torch.cuda.is_available() else "cpu", loader_workers=workers
        )
        curves.total = training.total_steps
        leave_replay = leaver(config, context.inputs, training, context.output)
        state = train(training, checkpoints, curves.add, leave_replay)
    else:
        final = train_on_ray(config, context, curves)
        training = assemble(config, context.inputs)
        state = read_checkpoint(final, training.method, None, context.fingerprint)
    for row in state.curves:  # what an earlier, interrupted process had logged belongs to this run's record too
        curves.add(row)
    return _write(config, context, training, state)


def _write(config: PretrainConfig, context: Context, training: Pretraining, state: TrainingState) -> Outcome:
    encoder = training.method.cpu().eval().encoder()
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder), method=config.method.name)
        for file in sorted(Path(folder).iterdir()):
            context.output.put_file(file.name, file)
    context.output.put_file("curves.json", json.dumps(state.curves).encode())
    context.output.put_file("curves.parquet", curves_table(state.curves))
    context.output.put_file("views.png", views_png(training.data, training.method.view_plan(), encoder))
    context.output.put_file("preview.png", preview_png(encoder, state.curves, config, context.inputs))
    last = state.curves[-1]
    terms = [name for name in (*config.method.term_weights(), "total") if name in last]
    return Outcome(
        metrics={**{name: last[name] for name in terms}, "images_per_s": last["images_per_s"]},
        counts={"steps": state.step, **{f"skipped: {reason}": n for reason, n in state.skipped.items()}},
        problems=[{"key": key, "reason": reason} for key, reason in state.problems.items()],
        preview="preview.png",
    )
