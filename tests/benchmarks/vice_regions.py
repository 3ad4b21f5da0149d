"""ViCE's pooling and loss against a Python loop over regions.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.vice_regions`. Forward and backward, float32: from the embeddings of all
pixels of 16 views (4 of each of 4 images) of 256 x 256, 128 wide, with about 170 regions each, to the loss and its
gradient. Both give the same loss and gradient (checked here). The loop is the obvious program: one boolean mask a
region, and a loss for every region of every view.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.methods.vice.losses.region_pool import pool_regions
from stages.pretrain.methods.vice.losses.swapped_prediction import swapped_prediction
from stages.pretrain.methods.vice.method import region_index
from tests.benchmarks.results import write_section

VIEWS, IMAGES, SIDE, WIDTH, PROTOTYPES, CELLS = 4, 4, 256, 128, 128, 13  # 13 x 13 = 169 regions


def sample(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings as the network gives them, maps of ragged cells, regions an image, prototypes."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(VIEWS * IMAGES, WIDTH, SIDE, SIDE, generator=generator)
    # Cells whose borders wander by a few pixels; a tenth of the pixels belongs to no mutual region.
    wander = torch.randint(-6, 7, (2, VIEWS, IMAGES, SIDE, SIDE), generator=generator)
    at = torch.arange(SIDE)
    y = (at[:, None] + wander[0]).clamp(0, SIDE - 1) * CELLS // SIDE
    x = (at + wander[1]).clamp(0, SIDE - 1) * CELLS // SIDE
    regions = torch.where(torch.rand(y.shape, generator=generator) < 0.1, -1, y * CELLS + x)
    count = torch.full((IMAGES,), CELLS * CELLS)
    prototypes = functional.normalize(torch.randn(PROTOTYPES, WIDTH, generator=generator), dim=1)
    maps = maps.contiguous(memory_format=torch.channels_last)
    return tuple(value.to(device) for value in (maps, regions, count, prototypes))  # type: ignore[return-value]


def at_once(maps: Tensor, regions: Tensor, count: Tensor, prototypes: Tensor) -> Tensor:
    total = int(count.sum())
    index = region_index(regions, count, total)
    z = pool_regions(maps, index.flatten(0, 1), VIEWS * total).view(VIEWS, total, -1)
    scores = z @ prototypes.T
    return swapped_prediction(scores[1:], sinkhorn(scores[0].detach()))


def loop(maps: Tensor, regions: Tensor, count: Tensor, prototypes: Tensor) -> Tensor:
    """Images are laid out as (HW, D) rows, which is what makes a mask cheap to apply."""
    rows = maps.permute(0, 2, 3, 1).reshape(VIEWS, IMAGES, SIDE * SIDE, WIDTH)
    scores: list[list[Tensor]] = []
    for view in range(VIEWS):
        scores.append([])
        for image in range(IMAGES):
            pixels, names = rows[view, image], regions[view, image].flatten()
            for region in range(int(count[image])):
                mean = pixels[names == region].mean(dim=0)
                scores[view].append(prototypes @ functional.normalize(mean, dim=0))
    targets = sinkhorn(torch.stack([score.detach() for score in scores[0]]))
    losses = [
        -(target * torch.log_softmax(score / 0.1, dim=0)).sum()
        for view in scores[1:]
        for score, target in zip(view, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def measure(run: Callable[..., Tensor], device: str, repeats: int) -> tuple[float, float, Tensor, Tensor]:
    """Best milliseconds of forward and of both passes, the loss, and the gradient of the maps."""
    maps, *rest = sample(device)
    maps.requires_grad_()
    # With one thread, its own CPU time: a busy machine takes slices out of the long runs, not out of the short ones.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    forward, both = [], []
    for _ in range(repeats):
        maps.grad = None
        start = clock()
        loss = run(maps, *rest)
        _wait(device)
        forward.append(clock() - start)
        loss.backward()
        _wait(device)
        both.append(clock() - start)
    assert maps.grad is not None
    return 1e3 * min(forward), 1e3 * min(both), loss.detach(), maps.grad


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    tries = 1 if device == "cpu" else repeats  # of the loop
    fast_forward, fast, loss, gradient = measure(at_once, device, repeats)
    slow_forward, slow, expected, expected_gradient = measure(loop, device, tries)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-9)
    lines = [
        f"- torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, best of {repeats} (loop: {tries})",
        f"- {VIEWS * IMAGES} views of {SIDE} x {SIDE}, {CELLS * CELLS} regions each, D = {WIDTH}",
        f"- forward: {fast_forward:.0f} ms; loop over regions {slow_forward:.0f} ms: {slow_forward / fast_forward:.0f} "
        "times",
        f"- forward and backward: {fast:.0f} ms; loop over regions {slow:.0f} ms: {slow / fast:.0f} times",
    ]
    print("\n".join(lines))
    if arguments.write:
        command = f"OMP_NUM_THREADS=1 python -m tests.benchmarks.vice_regions --device {device}"
        write_section("ViCE pooling and loss", command, "\n".join(lines))


if __name__ == "__main__":
    main()
