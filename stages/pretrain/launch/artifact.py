"""Writes the files of an encoder artifact, in the process that trained it: weights, curves and two pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.stage import Outcome
from pipeline.store.artifact import Artifact
from pipeline.store.writer import ArtifactWriter
from stages.models.encoder import Encoder
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import Pretraining, image_sources, train_data
from stages.pretrain.launch.continuing import FromKeptState
from stages.pretrain.launch.preview import preview_png, views_png
from stages.training.checkpoint import TrainingState
from stages.training.curves import curves_table


def write_artifact(
    config: PretrainConfig,
    inputs: Mapping[str, Artifact],
    output: ArtifactWriter,
    training: Pretraining,
    state: TrainingState,
    started: FromKeptState,
) -> Outcome:
    """Put every file through `output`; the same files whatever the number of ranks and the device.

    Args:
        config: of the stage.
        inputs: finished artifacts by dotted input path.
        output: of the artifact in the making.
        training: as rank 0 has it, trained; its method is moved to the CPU.
        state: where the training ended.
        started: what the training began with; keeps its state where the config asks for that.

    Returns:
        What the stage reports: the last row's terms, how many steps, what was skipped.
    """
    notes: dict[str, Any] = {
        "ranks": {str(step): ranks for step, ranks in state.worlds.items()},  # from which step on how many trained
        "checkpoints": {
            "made": state.saves,
            "seconds": round(state.saving_seconds, 3),
            "of_seconds": round(state.seconds, 3),
        },
    }
    if config.keep_state:
        notes["training_state_bytes"] = started.keep(training.method, state, output)
    trained = training.method.cpu().eval().encoder()
    with tempfile.TemporaryDirectory() as folder:
        files = trained.save(Path(folder), method=config.method.name)
        for file in sorted(files):
            output.put_file(file.name, file)
        # What a reader of the artifact gets: neither the training's memory layout nor its synchronised batch norms.
        encoder = Encoder.load(folder).eval()
    first_batch = train_data(config, image_sources(config, inputs), training.method.view_plan(), encoder)
    output.put_file("curves.json", json.dumps(state.curves).encode())
    output.put_file("curves.parquet", curves_table(state.curves))
    output.put_file("views.png", views_png(first_batch, training.method, encoder))
    output.put_file("preview.png", preview_png(encoder, state.curves, config, inputs))
    last = state.curves[-1]
    terms = [name for name in (*config.method.term_weights(), "total") if name in last]
    return Outcome(
        metrics={**{name: last[name] for name in terms}, "images_per_s": last["images_per_s"]},
        counts={"steps": state.step, **{f"skipped: {reason}": n for reason, n in state.skipped.items()}},
        problems=[{"key": key, "reason": reason} for key, reason in state.problems.items()],
        notes=notes,
        preview="preview.png",
    )
