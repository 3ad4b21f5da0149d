"""Checkpoints of a toy training: a broken one is passed over, one of another artifact is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.training.checkpoint import CheckpointFolder, is_complete
from stages.training.loop import train
from tests.stages.training.test_loop import StopAt, curve, make_training


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = train(make_training(checkpoint_every=3), CheckpointFolder(tmp_path / "whole", "f"))
    with pytest.raises(KeyboardInterrupt):
        train(make_training(checkpoint_every=3), StopAt(tmp_path / "cut", 6))
    newest = tmp_path / "cut" / "step-00000006"
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "state.pt").write_bytes(data)
    said: list[str] = []
    assert not is_complete(newest)
    resumed = train(make_training(checkpoint_every=3), CheckpointFolder(tmp_path / "cut", "f", say=said.append))
    assert curve(resumed) == curve(whole)
    assert "step-00000006" in said[0]


def test_a_checkpoint_of_another_artifact_is_refused(tmp_path: Path) -> None:
    train(make_training(3), CheckpointFolder(tmp_path, "f"))
    with pytest.raises(ValueError, match="belongs to f, not to other"):
        train(make_training(3), CheckpointFolder(tmp_path, "other"))
