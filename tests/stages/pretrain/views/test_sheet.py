"""The contact sheet of a batch opens, and marks what two views share."""

from __future__ import annotations

import numpy as np
import torch

from stages.data.images import decode
from stages.pretrain.data.batch import Batch
from stages.pretrain.views.geometry import crop_affine
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.pretrain.views.sheet import Panel, view_sheet


def test_a_sheet_shows_every_view_and_the_overlaps() -> None:
    whole = crop_affine(torch.tensor([0.0, 0, 64, 64]), 32)
    part = crop_affine(torch.tensor([16.0, 16, 48, 48]), 16, flip=True)
    views = {"global": torch.zeros(1, 2, 3, 32, 32), "local": torch.zeros(2, 2, 3, 16, 16)}
    views["neighbor"] = torch.ones(1, 1, 3, 32, 32)  # of the second image
    affines = {
        "global": whole.expand(1, 2, 2, 3),
        "local": part.expand(2, 2, 2, 3),
        "neighbor": whole.expand(1, 1, 2, 3),
    }
    ids = torch.arange(2)
    batch = Batch(ids, torch.zeros(2, dtype=torch.int64), views, affines, neighbor_ids=torch.tensor([-1, 5]))
    plan = ViewPlan((ViewSpec("global", 32), ViewSpec("local", 16, 2), ViewSpec("neighbor", 32, of="neighbor")))
    marked = decode(view_sheet(batch, plan, (0, 0, 0), (1, 1, 1)))
    far = crop_affine(torch.tensor([70.0, 70, 90, 90]), 16)
    batch.affines["local"] = far.expand(2, 2, 2, 3)
    plain = decode(view_sheet(batch, plan, (0, 0, 0), (1, 1, 1)))
    assert marked.shape == plain.shape
    assert marked.shape[1] > 4 * 200
    last = plain[:, 3 * marked.shape[1] // 4 + 40 : -40].max(axis=(1, 2)) > 200  # the rows' last cells
    assert not last[60 : marked.shape[0] // 2 - 60].any()  # nothing where there is no neighbour
    assert last[marked.shape[0] // 2 + 60 :].any()
    changed = np.abs(marked.astype(int) - plain).max(2) > 60
    assert changed[:, : marked.shape[1] // 4].any()  # in the first view
    assert changed[:, marked.shape[1] // 4 :].any()  # and in the local ones


def test_panels_show_boxes_lines_around_regions_and_the_rest_dark() -> None:
    views = {"global": torch.full((1, 1, 3, 32, 32), 0.6)}
    affines = {"global": crop_affine(torch.tensor([0.0, 0, 32, 32]), 32).expand(1, 1, 2, 3)}
    batch = Batch(torch.arange(1), torch.zeros(1, dtype=torch.int64), views, affines)
    plan = ViewPlan((ViewSpec("global", 32),))
    regions = torch.full((1, 32, 32), -1)
    regions[:, :, 16:] = 0
    panels = [
        Panel("boxes", views["global"][0], boxes=torch.tensor([[[4.0, 4, 20, 20]]])),
        Panel("regions", views["global"][0], regions=regions),
    ]
    sheet = decode(view_sheet(batch, plan, (0, 0, 0), (1, 1, 1), panels=panels))
    cells = [sheet[20:220, 20 + 212 * i : 220 + 212 * i] for i in range(3)]
    plain, boxes, divided = (cell.reshape(-1, 3).astype(int) for cell in cells)
    assert (np.abs(plain - 153) < 3).all()
    assert 0.01 < (np.abs(boxes - 153) > 60).any(1).mean() < 0.2
    dark, yellow = (np.abs(divided - 54) < 3).all(1), (np.abs(divided - (255, 221, 51)) < 3).all(1)
    assert 0.45 < dark.mean() < 0.55
    assert 0 < yellow.mean() < 0.05


def test_the_first_images_of_a_batch_keep_the_neighbours_that_they_have() -> None:
    views = {"global": torch.arange(4.0).view(1, 4, 1, 1, 1), "neighbor": torch.tensor([7.0, 9]).view(1, 2, 1, 1, 1)}
    affines = {"global": torch.zeros(1, 4, 2, 3), "neighbor": torch.zeros(1, 2, 2, 3)}
    ids = torch.tensor([-1, 7, -1, 9])
    batch = Batch(torch.arange(4), torch.zeros(4), views, affines, neighbor_ids=ids, extras={"count": torch.arange(4)})
    first = batch.first(3)
    assert len(first) == 3
    assert first.views["global"].flatten().tolist() == [0, 1, 2]
    assert first.views["neighbor"].flatten().tolist() == [7]
    assert first.affines["neighbor"].shape[1] == 1
    assert first.neighbor_ids is not None
    assert first.neighbor_ids.tolist() == [-1, 7, -1]
    assert first.extras["count"].tolist() == [0, 1, 2]
