"""Labelled batches: a function of the step, whatever the number of ranks and the step at which reading starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import Table
from stages.finetune.classification import ClassificationConfig
from stages.finetune.classification_work import CropWithLabel
from stages.finetune.data.examples import ExampleChunks, LabelledData, normalised
from stages.training.loader import Share
from stages.training.sampler import Sampler
from tests.stages.finetune.conftest import write_squares

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def data(images: Artifact, ids: list[int], **share: Any) -> LabelledData:
    config = ClassificationConfig.model_validate({"images": "i", "encoder": "e", "steps": 1, "size": 16})
    sampler = Sampler([len(ids)], [1.0], 6, 0)
    chunks = ExampleChunks(Table.open(images), ids, CropWithLabel(config), sampler, 0)
    return LabelledData(chunks, Share(6, **share), MEAN, STD)


def test_ranks_share_the_batches_that_one_process_sees(squares: Artifact) -> None:
    ids = list(range(24))
    whole = list(data(squares, ids).batches(0, 6))
    halves = [list(data(squares, ids, rank=rank, world_size=2).batches(0, 6)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        both = [half[step] for half in halves]
        assert torch.equal(batch.image_ids, torch.cat([half.image_ids for half in both]))
        assert torch.equal(batch.images, torch.cat([half.images for half in both]))
        assert torch.equal(batch.stacked("label"), torch.cat([half.stacked("label") for half in both]))
    again = next(data(squares, ids).batches(4, 5))
    assert torch.equal(again.images, whole[4].images)
    assert not torch.equal(whole[0].images, whole[4].images)


def test_the_label_is_that_of_the_image(squares: Artifact) -> None:
    for batch in data(squares, list(range(24))).batches(0, 4):
        assert batch.stacked("label").tolist() == [image_id % 3 for image_id in batch.image_ids.tolist()]


@pytest.mark.slow
def test_loader_processes_change_nothing(squares: Artifact) -> None:
    ids = list(range(24))
    alone, beside = (list(data(squares, ids, workers=workers).batches(0, 3)) for workers in (0, 2))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.image_ids, other.image_ids)


def test_where_no_image_can_be_read_training_says_so(store: ArtifactStore) -> None:
    damaged = write_squares(store, "8" * 24, unreadable=tuple(range(36)))
    with pytest.raises(SourceError, match="none of the 4 images tried can be learnt from; the last, "):
        next(data(damaged, [0, 1, 2, 3]).batches(0, 1))


def test_images_of_other_sizes_lie_at_the_top_left() -> None:
    small, large = torch.full((4, 6, 3), 51, dtype=torch.uint8), torch.full((8, 3, 3), 255, dtype=torch.uint8)
    images = normalised([small, large], MEAN, STD, multiple=5)
    assert images.shape == (2, 3, 10, 10)
    assert torch.allclose(images[0, :, :4, :6], torch.tensor([-1.5, -0.8, -1 / 3])[:, None, None].expand(3, 4, 6))
    assert not images[0, :, 4:].any()
    assert not images[1, :, :, 3:].any()
    assert torch.allclose(images[1, 0, :8, :3], torch.tensor(2.5))
