"""D3SSL against the golden files: losses with gradients, cut-outs, the composition, and its two measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

from stages.evaluate.coupling import coupling_rate, mean_cosine_similarity
from stages.pretrain.methods.d3ssl.losses.d3ssl_loss import decoupling_loss, depositioning_loss
from stages.pretrain.methods.d3ssl.proposals import proposal_cutout
from stages.pretrain.methods.d3ssl.region_masks import compose, kept, union
from tests.golden.golden import assert_close, load, tensors


def test_losses_and_gradients() -> None:
    golden = tensors("d3ssl_losses")
    raw = {name: golden[f"raw_{name}"].requires_grad_() for name in ("s1", "s2", "s3", "t1", "t2")}
    z = {name: functional.normalize(value, dim=1) for name, value in raw.items()}
    bank, temperature = functional.normalize(golden["negatives"], dim=1), golden["tau"].item()
    dc = decoupling_loss(z["s1"], z["s2"], z["t1"], z["t2"], bank, temperature=temperature)
    dp = depositioning_loss(z["s3"], z["t1"], z["t2"], bank, temperature=temperature)
    assert_close(dc, golden["L_dc"], 1e-10)
    assert_close(dp, golden["L_dp"], 1e-10)
    total = (dc + dp).mean()
    assert_close(total, golden["loss_total"], 1e-10)
    total.backward()
    for name in ("s1", "s2", "s3"):
        assert_close(raw[name].grad, golden[f"grad_{name}"], 1e-10)
    assert raw["t1"].grad is None
    assert raw["t2"].grad is None
    assert len(dc) == golden["B"] * golden["K"]


@pytest.mark.parametrize(("name", "threshold"), [("thr05", 0.5), ("thr01", 0.1)])
def test_proposal_cutout_replays(name: str, threshold: float) -> None:
    golden = load("d3ssl_prc_replay")
    size, cuts = int(golden["size"]), golden[f"cuts_{name}"]
    operations = proposal_cutout(golden["boxes"], golden["draws"], size, threshold)
    np.testing.assert_array_equal(operations[1::2], cuts[:, 1:])
    restored = [tuple(box) for box in operations[::2].tolist() if any(box)]
    assert set(restored) <= {tuple(box) for box in golden["boxes"].tolist()}
    mask = kept(torch.from_numpy(operations)[None], size)[0]
    np.testing.assert_array_equal(mask.numpy(), golden[f"mask_{name}"].astype(bool))


def test_composition() -> None:
    golden = load("d3ssl_composition")
    x2, background = (torch.from_numpy(golden[name])[None] for name in ("x2", "xb"))
    boxes, offset, size = golden["boxes"], golden["t"], golden["x2"].shape[-1]
    shifted = boxes + np.tile(offset, 2)
    np.testing.assert_array_equal(shifted, golden["boxes_shifted"])
    operations = proposal_cutout(shifted, golden["draws"], size, 0.5)

    def mask(rectangles: NDArray[np.int64]) -> torch.Tensor:
        return union(torch.from_numpy(rectangles)[None], size)

    np.testing.assert_array_equal(mask(boxes)[0], golden["mask"].astype(bool))
    np.testing.assert_array_equal(mask(shifted)[0], golden["mask_shifted"].astype(bool))
    cut = mask(shifted) & kept(torch.from_numpy(operations)[None], size)
    np.testing.assert_array_equal(cut[0], golden["mask_shifted_prc"].astype(bool))
    x3 = compose(x2, background, cut, torch.from_numpy(offset)[None])
    np.testing.assert_array_equal(x3[0], golden["x3"])


def test_coupling_rate_and_position_bias() -> None:
    golden = tensors("d3ssl_cr_mcs")
    assert_close(coupling_rate(golden["A1"], golden["A2"], golden["B"]), golden["CR"], 1e-12)
    assert_close(mean_cosine_similarity(golden["grid"]), golden["MCS"], 1e-12)


# A function that says which rectangle to cut from box number k, given the fraction of its area still to be cut.
Place = Callable[[int, float], tuple[int, int, int, int] | None]


def plain_cutout(
    boxes: NDArray[np.int64], order: NDArray[np.int64], ratio: float, size: int, place: Place
) -> NDArray[np.bool_]:
    """The rule of PRC alone: boxes in turn; one that others have cut too much of is whole again before its own cut."""
    kept_map = np.ones((size, size), bool)
    for k in order.tolist():
        x0, y0, x1, y1 = boxes[k]
        inside = kept_map[y0:y1, x0:x1]
        covered = 1 - inside.mean()
        if covered > ratio:
            inside[:], covered = True, 0.0
        if (rectangle := place(k, ratio - covered)) is not None:
            left, top, right, bottom = rectangle
            kept_map[top:bottom, left:right] = False
    return kept_map


def largest_first(boxes: NDArray[Any]) -> NDArray[np.int64]:
    return np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")


@pytest.mark.parametrize("s", range(4))
def test_the_restore_rule_is_the_successors(s: int) -> None:
    """The later project's cut-out is the evidence for PRC's default threshold, a box's own fraction
    (docs/methods.md#d3ssl-region-augmentations).

    It rounds otherwise (corners are inclusive; a rectangle is placed between pixels first): one plain rule gives its
    masks with its rounding, and ours with ours.
    """
    golden = load("rcc_successor")
    ratio, size, unit_boxes = float(golden["ratio"]), int(golden["view"]), golden[f"boxes{s}"]
    numbers = iter(golden[f"draws{s}"].tolist())
    last = np.minimum(np.rint(unit_boxes[:, 2:] * size), size - 1)
    boxes = np.concatenate([np.rint(unit_boxes[:, :2] * size), last + 1], axis=1).astype(np.int64)

    def theirs(k: int, share: float) -> tuple[int, int, int, int] | None:
        x0, y0, x1, y1 = boxes[k].tolist()
        w, h = math.sqrt(share) * (x1 - x0), math.sqrt(share) * (y1 - y0)
        if share == 0:
            return None
        x, y = next(numbers) * (x1 - 1 - x0 - w) + x0, next(numbers) * (y1 - 1 - y0 - h) + y0
        return round(x), round(y), min(round(x + w - 1), x1 - 1) + 1, min(round(y + h - 1), y1 - 1) + 1

    kept_map = plain_cutout(boxes, largest_first(unit_boxes), ratio, size, theirs)
    np.testing.assert_array_equal(kept_map, golden[f"keep{s}"])
    assert next(numbers, None) is None

    draws = np.random.default_rng(s).random((len(boxes), 3))
    draws[:, 0] = ratio

    def ours(k: int, share: float) -> tuple[int, int, int, int] | None:
        (x0, y0, x1, y1), (_, u, v) = boxes[k].tolist(), draws[k].tolist()
        w, h = round((x1 - x0) * math.sqrt(share)), round((y1 - y0) * math.sqrt(share))
        x, y = x0 + int(u * (x1 - x0 - w + 1)), y0 + int(v * (y1 - y0 - h + 1))
        return (x, y, x + w, y + h) if w and h else None

    kept_map = plain_cutout(boxes, largest_first(boxes), ratio, size, ours)
    operations = proposal_cutout(boxes, draws, size)
    np.testing.assert_array_equal(kept(torch.from_numpy(operations)[None], size)[0].numpy(), kept_map)
