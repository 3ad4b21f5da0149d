"""D3SSL against the golden files: losses with gradients, cut-outs, the composition, and its two measures."""

from __future__ import annotations

import math

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


def successor_cutout(boxes: NDArray[np.float64], ratio: float, size: int, draws: list[float]) -> NDArray[np.bool_]:
    """The later project's cut-out, whose restore rule is the evidence for PRC's default threshold (methods.md 4.4).

    Order and rule are PRC's: large boxes first, one ratio for all and as the threshold. Pixels differ: corners are
    inclusive, and a rectangle is placed between pixels first and rounded afterwards.
    """
    kept_map, numbers = np.ones((size, size), bool), iter(draws)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for x0, y0, x1, y1 in boxes[np.argsort(-areas, kind="stable")].tolist():
        left, top = round(x0 * size), round(y0 * size)
        right, bottom = min(round(x1 * size), size - 1), min(round(y1 * size), size - 1)
        mine = kept_map[top : bottom + 1, left : right + 1]
        covered = 1 - mine.sum() / mine.size
        if covered > ratio:
            mine[:], covered = True, 0.0
        height, width = mine.shape
        share = ratio - covered
        w, h = math.sqrt(share * mine.size * width / height), math.sqrt(share * mine.size * height / width)
        if w == 0 or h == 0:
            continue
        x = next(numbers) * (right - left - w) + left
        y = next(numbers) * (bottom - top - h) + top
        end_x, end_y = min(round(x + w - 1), right), min(round(y + h - 1), bottom)
        kept_map[round(y) : end_y + 1, round(x) : end_x + 1] = False
    assert next(numbers, None) is None
    return kept_map


@pytest.mark.parametrize("s", range(4))
def test_the_successors_rule(s: int) -> None:
    golden = load("rcc_successor")
    ratio, size, boxes = float(golden["ratio"]), int(golden["view"]), golden[f"boxes{s}"]
    kept_map = successor_cutout(boxes, ratio, size, golden[f"draws{s}"].tolist())
    np.testing.assert_array_equal(kept_map, golden[f"keep{s}"])
