"""Overlap boxes of multi-crops against Leopart's own function (docs/methods.md#views-and-overlap)."""

from __future__ import annotations

import torch

from stages.pretrain.views.geometry import crop_affine, overlap
from tests.golden.golden import assert_close, tensors


def test_leopart_tables() -> None:
    golden = tensors("leopart_crop_boxes")
    crops, (n_global, n_local) = golden["crops"], golden["nmb_crops"].tolist()
    size_global, size_local = golden["size_crops"].tolist()
    globals_ = crop_affine(crops[:n_global], size_global)
    locals_ = crop_affine(crops[n_global:], size_local)
    assert len(locals_) == n_local

    tables = [(globals_, size_global), (locals_, size_local)]
    in_global, in_crop = [], []
    for affines, size in tables:
        a, b, valid = overlap(globals_[:, None], affines[None], size_global, size)
        assert valid.all()
        in_global.append(a)
        in_crop.append(b)
    assert_close(torch.cat(in_global, 1), golden["gc"], 1e-4)
    assert_close(torch.cat(in_crop, 1).transpose(0, 1), golden["all"], 1e-4)
