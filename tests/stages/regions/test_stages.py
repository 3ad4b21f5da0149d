"""`selective_search` and `superpixels` from an images artifact to a committed one, on a real Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.stage import Context, edges, unfingerprinted
from pipeline.store.artifact import Artifact
from stages.data.images import decode
from stages.data.tables import SCHEMAS, Table, unpack_labels
from stages.regions.selective_search import SelectiveSearch
from stages.regions.superpixels import Superpixels

STAGES = [SelectiveSearch, Superpixels]


@pytest.fixture
def source(images: Callable[..., Artifact], make_image: Callable[..., Path], tmp_path: Path) -> Artifact:
    """Ten pictures of 120x90 in three shards; the fourth is no picture."""
    paths = [make_image(tmp_path / f"{i}.jpg", 120, 90, i) for i in range(10)]
    files = {path.name: path.read_bytes() for path in paths} | {"3.jpg": b"not a picture"}
    return images(files, [4, 4, 2])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_from_images_to_an_artifact(
    ray_local: None, stage: Any, source: Artifact, context: Callable[..., Context]
) -> None:
    ctx = context(stage.kind, images=source)
    outcome = stage(stage.Config(images="images")).run(ctx)
    made = ctx.output.commit(counts=outcome.counts)
    assert (outcome.counts["images"], outcome.counts["failed"]) == (9, 1)
    assert [problem["key"] for problem in outcome.problems] == ["3.jpg"]
    assert made.manifest.columns == {field.name: str(field.type) for field in SCHEMAS[stage.kind]}
    table = Table.open(made)
    assert table.ids.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert decode(made.read(outcome.preview)).shape[1] > 600
    if stage is SelectiveSearch:
        total = sum(len(table.row(i)["boxes"]) for i in table.ids.tolist())
        assert outcome.metrics["boxes_per_image"] == pytest.approx(total / 9)
        assert outcome.counts["boxes"] == total
    else:
        row = table.row(9)
        assert unpack_labels(row["labels"]).shape == (90, 120)
        assert unpack_labels(row["labels"]).max() == row["count"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twice_is_bit_identical(ray_local: None, stage: Any, source: Artifact, context: Callable[..., Context]) -> None:
    """Content-named shards: the same names are the same bytes."""
    stored = []
    for fingerprint in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        ctx = context(stage.kind, fingerprint, images=source)
        stage(stage.Config(images="images")).run(ctx)
        stored.append([entry.stored for entry in ctx.output.commit().manifest.files])
    assert stored[0] == stored[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_no_usable_image(
    ray_local: None, stage: Any, images: Callable[..., Artifact], context: Callable[..., Context]
) -> None:
    source = images({"a.jpg": b"nothing", "b.jpg": b"at all"})
    with pytest.raises(SourceError, match=r"none of the 2 images .* could be used \(a.jpg: "):
        stage(stage.Config(images="images")).run(context(stage.kind, images=source))


@pytest.mark.parametrize("stage", STAGES)
def test_config(stage: Any) -> None:
    config = stage.Config(images="pictures")
    assert [(edge.path, edge.kinds, edge.stage) for edge in edges(config)] == [("images", ("images",), "pictures")]
    assert unfingerprinted(config) == ["resources"]
    assert stage.packages == ("opencv-contrib-python-headless",)


def test_scales_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_scale 0.9 must be below max_scale 0.8"):
        SelectiveSearch.Config(images="pictures", min_scale=0.9)


def test_planning_imports_nothing_heavy() -> None:
    code = "import sys, stages.regions.selective_search, stages.regions.superpixels; print([m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("'cv2'", "'ray'", "'torch'", "'pyarrow'") if name in loaded]


def test_a_preview_skips_what_cannot_be_read(source: Artifact) -> None:
    from stages.regions.proposals import show_boxes
    from stages.regions.segments import show_superpixels

    for picture in (
        show_boxes(source, SelectiveSearch.Config(images="images"), pictures=10),
        show_superpixels(source, Superpixels.Config(images="images"), pictures=10),
    ):
        assert np.asarray(decode(picture)).ndim == 3
