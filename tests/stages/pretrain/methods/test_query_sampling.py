"""FLSL's queries: one a window, at random or its top left token, whatever the number of ranks."""

from __future__ import annotations

import torch

from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.flsl.query_sampling import sample_queries
from tests.stages.pretrain.methods.tiny import share


def test_one_query_a_window_by_row_of_the_global_batch() -> None:
    ids = torch.arange(64)
    batch = Batch(ids, torch.zeros_like(ids), {}, {}, neighbor_ids=-torch.ones_like(ids), seed=7)
    crops = [(8, 3), (4, 2)]
    large, small = sample_queries(batch, crops, random=True)
    assert (large.shape, small.shape) == ((64, 4), (64, 4))
    four = {(0, 0), (0, 1), (1, 0), (1, 1)}
    for row in torch.stack([large // 8, large % 8], dim=-1):  # 3 x 3 windows, anchored at a corner of 8 x 8 tokens
        shifted = [(row - torch.tensor(anchor)) for anchor in ((0, 0), (0, 2), (2, 0), (2, 2))]
        assert any({(int(y), int(x)) for y, x in at.div(3, rounding_mode="floor")} == four for at in shifted)
    assert {int(i) for i in small.flatten()} == set(range(16))  # any token of a window can be its query
    fixed = sample_queries(batch, crops, random=False)
    assert torch.equal(fixed[1], torch.tensor([0, 2, 8, 10]).expand(64, 4))
    assert {int(i) for i in fixed[0][:, 0]} == {0, 2, 16, 18}  # four corners to anchor at
    for ranks in (2, 4):
        parts = [sample_queries(share(batch, rank, ranks), crops, random=True) for rank in range(ranks)]
        assert torch.equal(torch.cat([part[0] for part in parts]), large)
        assert torch.equal(torch.cat([part[1] for part in parts]), small)
