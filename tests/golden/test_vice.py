"""ViCE against the golden files: pooling, swapped prediction, representatives, queue, mutual regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.methods.vice.losses.region_pool import coherence, pool_regions, region_means, representatives
from stages.pretrain.methods.vice.losses.swapped_prediction import pushed, swapped_prediction
from stages.pretrain.methods.vice.regions import clip_centre, common_rectangle, mutual, mutual_regions, square
from tests.golden.golden import assert_close, load, tensors


def test_region_pool() -> None:
    golden = tensors("vice_region_pool")
    feat = golden["feat"].requires_grad_()
    kept = golden["kept_ids"]  # the official code drops region 0: its `drop_region_zero`
    number = torch.full((int(golden["ids"].max()) + 2,), -1)
    number[kept] = torch.arange(len(kept))
    index = number[golden["ids"]][None]
    pooled = region_means(feat.permute(0, 2, 3, 1).reshape(-1, feat.shape[1]), index.reshape(-1), len(kept))
    assert_close(pooled, golden["pooled"], 1e-12)
    z = pool_regions(feat, index, len(kept))
    assert_close(z, golden["proj"], 1e-12)
    scores = z @ golden["prototypes"].T
    assert_close(scores, golden["scores"], 1e-12)
    scores.backward(golden["cot"])
    assert_close(feat.grad, golden["grad_feat"], 1e-12)


@pytest.mark.parametrize("queue", [0, 30])
def test_swapped_loss(queue: int) -> None:
    golden = tensors("vice_swapped_loss")
    views, images = int(golden["n_views"]), int(golden["n_images"])
    raw = {(m, i): golden[f"z_v{m}_i{i}"].requires_grad_() for m in range(views) for i in range(images)}
    z_VRD = torch.stack([torch.cat([functional.normalize(raw[m, i]) for i in range(images)]) for m in range(views)])
    scores_VRK = z_VRD @ golden["prototypes"].T
    balanced = scores_VRK[0].detach()
    if queue:
        balanced = torch.cat([balanced, golden["queue_emb"] @ golden["prototypes"].T])
    targets = sinkhorn(balanced, epsilon=golden["epsilon"].item(), iterations=int(golden["iters"]))[: len(z_VRD[0])]
    assert_close(targets, golden[f"assign_queue{queue}"], 1e-6)
    loss = swapped_prediction(scores_VRK[1:], targets, temperature=golden["temperature"].item())
    assert_close(loss, golden[f"loss_queue{queue}"], 2e-5)
    loss.backward()
    for (m, i), z in raw.items():
        gradient = torch.zeros_like(z) if z.grad is None else z.grad  # view 0 is the target: no gradient
        assert_close(gradient, golden[f"grad_q{queue}_v{m}_i{i}"], 2e-5)
        assert (m == 0) == (not gradient.abs().sum() > 0)


def test_representatives_and_coherence() -> None:
    golden = tensors("vice_coherence_path")
    prototypes, regions = golden["prototypes"], 4
    pixels = {(m, i): golden[f"proj_v{m}_i{i}"].requires_grad_() for m in range(3) for i in range(2)}
    index = torch.cat(
        [
            torch.where(ids < 0, -1, ids + regions * n)
            for n, ids in enumerate(golden[f"ids_v{m}_i{i}"][:, 0] for m, i in pixels)
        ]
    )
    unit = torch.cat(list(pixels.values()))
    z = representatives(unit, index, len(pixels) * regions, prototypes)
    assert_close(z, torch.cat([golden[f"rep_v{m}_i{i}"] for m, i in pixels]), 1e-12)
    scores_VRK = (z @ prototypes.T).view(3, 2 * regions, -1)
    swapped = swapped_prediction(scores_VRK[1:], sinkhorn(scores_VRK[0].detach()))
    total = (coherence(unit, index, z).mean() + swapped) / 2
    assert_close(total, golden["loss"], 1e-5)
    total.backward()
    for (m, i), value in pixels.items():
        assert_close(value.grad, golden[f"grad_v{m}_i{i}"], 1e-5)


def test_queue() -> None:
    golden = tensors("vice_queue")
    assert_close(pushed(golden["before"], golden["new"]), golden["after"], 0)


def test_mutual_regions() -> None:
    golden = load("vice_mutual_regions")
    maps, rects = golden["maps"].astype(np.int32), golden["rects"].reshape(3, 4)
    kept = mutual(list(maps), rects, int(maps.max()) + 1)
    for map_, expected in zip(maps, golden["out"], strict=True):
        np.testing.assert_array_equal(np.where(np.append(kept, False)[map_], map_, -1), expected)
    # What training gets are the same regions under the names 0..n-1, in the order of their ids.
    numbered, count = mutual_regions(list(maps), kept)
    names = np.append(np.flatnonzero(kept), -1)
    assert count == kept.sum()
    np.testing.assert_array_equal(names[numbered], golden["out"])


def test_centres_and_common_rectangle() -> None:
    golden = load("vice_mutual_regions")
    height, width = (int(side) for side in golden["clip_HW"])
    for (x, y, side), expected in zip(golden["clip_in"], golden["clip_out"], strict=True):
        assert clip_centre(int(x), int(y), side, width, height) == tuple(expected)
    squares = [
        square(int(x), int(y), side) for (x, y), side in zip(golden["rect_centers"], golden["rect_sizes"], strict=True)
    ]
    np.testing.assert_array_equal(common_rectangle(squares), golden["common_rect"].ravel())
