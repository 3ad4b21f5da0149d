"""Tracking: squares that move over a plain ground, and videos that cannot be tracked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import encode_mask
from stages.data.tables import SCHEMAS
from stages.data.units import keys_of
from stages.evaluate.track_objects import TrackObjects
from tests.conftest import encode
from tests.stages.evaluate.conftest import RunStage

FRAMES = 6
Video = tuple[Artifact, Artifact]


def row_of(image_id: int, sequence: str, frame: int, mask: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
    shown = np.where(mask[:, :, None] > 0, 200, 30).astype(np.uint8).repeat(3, axis=2)
    row |= {"image_id": image_id, "key": f"{sequence}/{frame}.png", "image": encode(shown, "PNG"), "sha256": ""}
    return row | {"width": 80, "height": 64, "mask": encode_mask(mask), "sequence": sequence, "frame": frame}


@pytest.fixture
def videos(store: ArtifactStore) -> Video:
    """Two objects that move a patch a frame; a video without objects; one of two frames. Rows are not in order."""
    rows, maps = [], []
    frames = [("two", i) for i in range(FRAMES)] + [("empty", i) for i in range(3)] + [("short", i) for i in range(2)]
    for image_id, (sequence, frame) in enumerate(reversed(frames)):
        mask = np.zeros((64, 80), np.uint8)
        if sequence != "empty":
            mask[8:24, 8 * frame : 8 * frame + 16] = 1
            mask[40:56, 72 - 8 * frame - 16 : 72 - 8 * frame] = 2
        rows.append(row_of(image_id, sequence, frame, mask))
        kinds = np.eye(3, dtype=np.float16)[mask[4::8, 4::8]]
        maps.append(
            {"image_id": image_id, "key": rows[-1]["key"], "grid_height": 8, "grid_width": 10}
            | {"patches": kinds.ravel(), "vector": kinds.mean(axis=(0, 1))}
        )
    images = store.begin("images", "videos")
    images.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    features = store.begin("features", "videos")
    features.put_table(0, pa.Table.from_pylist(maps, schema=SCHEMAS["features"]))
    return images.commit(), features.commit()


def test_objects_are_followed_and_videos_that_cannot_be_are_named(run_frozen: RunStage, videos: Video) -> None:
    images, features = videos
    outcome, artifact = run_frozen(TrackObjects, images=images, given=features)
    assert outcome.metrics["j"] > 85  # the border of an object runs through the enlarged patches
    assert outcome.metrics["j_and_f"] == pytest.approx((outcome.metrics["j"] + outcome.metrics["f"]) / 2)
    assert keys_of(artifact) == ["two/1", "two/2"]
    assert outcome.problems == [
        {"key": "empty", "reason": "the mask of its first frame is empty"},
        {"key": "short", "reason": "it has fewer than three frames"},
    ]
    assert outcome.counts == {"videos": 1, "objects": 2, "unusable": 2}


def test_a_window_that_is_too_small_loses_them(run_frozen: RunStage, videos: Video) -> None:
    images, features = videos
    near, _ = run_frozen(TrackObjects, images=images, given=features, radius=0, context=1)
    far, _ = run_frozen(TrackObjects, images=images, given=features, fingerprint="m2")
    assert near.metrics["j"] < far.metrics["j"] - 20


def test_images_that_are_no_video_are_refused(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match=r"the images hold no video \(ingest with layout: davis\)"):
        run_frozen(TrackObjects)
