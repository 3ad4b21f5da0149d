"""Training runs of a config on made-up artifacts, for the tests of several methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import assemble
from stages.training.checkpoint import CheckpointFolder, TrainingState
from stages.training.loop import train

State = dict[str, torch.Tensor]


def commit(store: ArtifactStore, kind: str, digit: str, rows: list[dict[str, Any]], **fields: Any) -> Artifact:
    """A finished table of one part; columns that a row leaves out are null."""
    writer = store.begin(kind, digit * 24)
    full = [dict.fromkeys(SCHEMAS[kind].names) | row for row in rows]
    writer.put_table(0, pa.Table.from_pylist(full, schema=SCHEMAS[kind]))
    return writer.commit(**fields)


def run(config: dict[str, Any], inputs: dict[str, Artifact], folder: Path) -> tuple[TrainingState, State]:
    """Train to the end, from the last checkpoint in `folder`; the method's state afterwards."""
    assembled = assemble(PretrainConfig.model_validate(config), inputs)
    progress = train(assembled, CheckpointFolder(folder, "f", say=print))
    return progress, assembled.method.state_dict()


def run_whole_and_cut(
    config: dict[str, Any], inputs: dict[str, Artifact], folder: Path, *, at: int
) -> tuple[TrainingState, State, TrainingState, State]:
    """The same run twice: never stopped, and killed when the row of step `at` is logged, then continued."""
    whole, expected = run(config, inputs, folder / "whole")

    class Killed(Exception):
        pass

    def stop(row: dict[str, float]) -> None:
        if row["step"] == at:
            raise Killed

    cut = assemble(PretrainConfig.model_validate(config), inputs)
    with pytest.raises(Killed):
        train(cut, CheckpointFolder(folder / "cut", "f", say=print), stop)
    return whole, expected, *run(config, inputs, folder / "cut")
