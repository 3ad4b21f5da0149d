"""A tiny ViT, fake batches and a step for tests of methods: real modules, small sizes, geometry that is known."""

from __future__ import annotations

import torch

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Method, Step
from stages.training.loop import compute_total, update

HEAD = {"prototypes": 12, "hidden": 24, "bottleneck": 16}
CROPS = {
    "global_crops": {"size": 32, "count": 2, "scale": (0.25, 1.0)},
    "local_crops": {"size": 16, "count": 2, "scale": (0.05, 0.25)},
}


def tiny_encoder(seed: int = 0, *, resnet: bool = False) -> Encoder:
    torch.manual_seed(seed)
    if resnet:
        return Encoder.build(Backbone(name="resnet10t", output_stride=16))
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return Encoder.build(Backbone(name="vit_tiny_patch16_224", patch_size=4, img_size=32, drop_path=0.1, kwargs=kwargs))


def fake_batch(count: int = 8, *, seed: int = 0, neighbors: bool = True, flips: bool = False) -> Batch:
    """Crops of 64 x 64 pixel noise images: rectangles in general position, globals overlap everything a little."""
    generator = torch.Generator().manual_seed(seed)

    def views(kinds: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.randn(kinds, count, 3, size, size, generator=generator)
        side = 36 + 20 * torch.rand(kinds, count, generator=generator)
        corner = (64 - side)[..., None] * torch.rand(kinds, count, 2, generator=generator)
        affine = torch.zeros(kinds, count, 2, 3)
        affine[..., 0, 0] = affine[..., 1, 1] = side / size
        affine[..., 2] = corner
        if flips:
            mirrored = torch.rand(kinds, count, generator=generator) < 0.5
            affine[..., 0, 2] = torch.where(mirrored, corner[..., 0] + side, corner[..., 0])
            affine[..., 0, 0] *= torch.where(mirrored, -1, 1)
        return pixels, affine

    global_, local, neighbor = views(2, 32), views(2, 16), views(1, 32)
    names = {"global": global_, "local": local} | ({"neighbor": neighbor} if neighbors else {})
    return Batch(
        image_ids=torch.arange(count),
        source=torch.arange(count) % 2,
        views={name: pixels for name, (pixels, _) in names.items()},
        affines={name: affine for name, (_, affine) in names.items()},
        neighbor_ids=(torch.arange(count) + 1) % count,
        seed=7,
    )


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """What one rank of several would get of a global batch."""
    size = len(batch) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    assert batch.neighbor_ids is not None
    has_neighbor = batch.neighbor_ids >= 0
    before, mine = int(has_neighbor[: rows.start].sum()), int(has_neighbor[rows].sum())
    views = {name: view[:, rows] for name, view in batch.views.items()}
    affines = {name: affine[:, rows] for name, affine in batch.affines.items()}
    if "neighbor" in views:
        views["neighbor"] = batch.views["neighbor"][:, before : before + mine]
        affines["neighbor"] = batch.affines["neighbor"][:, before : before + mine]
    return Batch(
        image_ids=batch.image_ids[rows],
        source=batch.source[rows],
        views=views,
        affines=affines,
        extras={name: extra[rows] for name, extra in batch.extras.items()},
        neighbor_ids=batch.neighbor_ids[rows],
        seed=batch.seed,
        offset=rows.start,
    )


def train_step(method: Method, batch: Batch, optimizer: torch.optim.Optimizer, step: Step) -> dict[str, float]:
    """One step as the loop makes it, with all terms weighing 1; the terms."""
    method.start_step(step)
    terms, total = compute_total(method, batch, {}, precision="fp32")
    torch.autograd.backward(total)
    method.before_update(step)
    update(method, optimizer, step)
    return {name: term.item() for name, term in terms.items()}
