"""DAVIS label propagation against the golden file."""

from __future__ import annotations

import torch

from stages.evaluate.label_propagation import propagate_labels, stretch_labels
from tests.golden.golden import assert_close, tensors


def test_propagation() -> None:
    golden = tensors("davis_label_propagation")
    segs = golden["segs"]
    height, width = segs.shape[2:]
    target = golden["feat_tar"].T.reshape(-1, height, width)
    context = golden["feat_src"].reshape(len(segs), -1, height, width)
    options = {"topk": int(golden["topk"]), "temperature": golden["temperature"].item()}
    radius = int(golden["radius"])
    assert_close(propagate_labels(target, context, segs, radius=radius, **options)[None], golden["seg_out"], 1e-5)
    assert_close(stretch_labels(golden["seg_out"][0]), golden["seg_norm"], 1e-5)


def test_window() -> None:
    """Alike everywhere, so that the weights of a token are its window: the neighbourhood of the file."""
    golden = tensors("davis_label_propagation")
    height, width = golden["segs"].shape[2:]
    tokens = height * width
    same = torch.ones(1, height, width)
    own = torch.eye(tokens).reshape(1, tokens, height, width)  # every context token has a label of its own
    seen = propagate_labels(same, same[None], own, radius=int(golden["radius"])).reshape(tokens, tokens)
    assert_close((seen > 0).T.float(), golden["neighbourhood"], 0)
