"""Decode + views: our data path against the `lightly` DINO transform in a torch DataLoader: same images, same crops.

    python -m tests.benchmarks.data_path                 # data/boxes (about 512x383), then data/objects (224x224)
    python -m tests.benchmarks.data_path --write         # and put the section into tests/benchmarks/RESULTS.md

Both sides get the encoded bytes from memory or a mapped table, use the same number of processes started the same way,
and deliver normalised float batches. Repeats are interleaved; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
import pyarrow as pa
import torch
from lightly.transforms import DINOTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.store.store import ArtifactStore
from stages.data.images import decode, decode_reduced, probe
from stages.data.tables import SCHEMAS, Table
from stages.pretrain.data.loader import ImageSource, TrainData
from stages.pretrain.views import render_cpu
from stages.pretrain.views.draw import draw_views, generator, reduction
from stages.pretrain.views.plan import Photometric, ViewPlan, ViewSpec
from stages.training.loader import worker_context
from tests.benchmarks.images import find_images
from tests.benchmarks.results import write_section

BATCH = 32
CROPS = {  # name: (global size, local size, local views)
    "2x224 + 6x96": (224, 96, 6),
    "2x224 + 4x96": (224, 96, 4),
    "2x96 + 4x48": (96, 48, 4),
}


def our_plan(size: int, small: int, count: int) -> ViewPlan:
    """What `DINOTransform` does by default (its second global view jitters twice as much: it forgets cj_strength)."""

    def colours(blur_p: float, solarize_p: float = 0.0, strength: float = 0.5) -> Photometric:
        jitter = (0.8 * strength, 0.8 * strength, 0.4 * strength, 0.2 * strength)
        return Photometric(jitter, 0.8, gray_p=0.2, blur_p=blur_p, solarize_p=solarize_p)

    return ViewPlan(
        (
            ViewSpec("global", size, 2, (0.4, 1.0), flip_p=0.5, photometric=(colours(1.0), colours(0.1, 0.2))),
            ViewSpec("local", small, count, (0.05, 0.4), flip_p=0.5, photometric=colours(0.5)),
        )
    )


class Lightly(Dataset[list[Tensor]]):
    def __init__(self, images: list[bytes], crops: tuple[int, int, int]) -> None:
        self.images = images
        size, small, count = crops
        self.transform = DINOTransform(global_crop_size=size, local_crop_size=small, n_local_views=count)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.open(io.BytesIO(self.images[index])).convert("RGB"))


def run_lightly(images: list[bytes], crops: tuple[int, int, int], workers: int, steps: int) -> Iterator[int]:
    """One number a batch: its images."""
    options = (
        {"multiprocessing_context": worker_context("stages.pretrain.data.loader"), "prefetch_factor": 2}
        if workers
        else {}
    )
    order = [i % len(images) for i in torch.randperm(steps * BATCH).tolist()]
    loader = DataLoader(Lightly(images, crops), BATCH, sampler=order, num_workers=workers, drop_last=True, **options)
    for views in loader:
        yield len(views[0])


def run_ours(table: Table, crops: tuple[int, int, int], workers: int, steps: int) -> Iterator[int]:
    data = TrainData([ImageSource(table)], our_plan(*crops), global_batch=BATCH, seed=0, workers=workers, device="cpu")
    for batch in data.batches(0, steps):
        yield len(batch)


def speed(batches: Callable[[int], Iterator[int]], steps: int, warm_up: int, clock: Callable[[], float]) -> float:
    """Images/s after `warm_up` batches: the first ones wait for the processes, and come all at once."""
    run = batches(steps + warm_up)
    for _ in range(warm_up):
        next(run)
    start = clock()
    images = sum(run)
    return images / (clock() - start)


def phases(images: list[bytes], crops: tuple[int, int, int]) -> dict[str, float]:
    """Milliseconds an image spends in each phase of our path, in one process."""
    plan, spent = our_plan(*crops), dict.fromkeys(("draw", "decode", "cut", "colour", "to float"), 0.0)
    clock = time.process_time
    for i, data in enumerate(images):
        at = clock()
        header = probe(data)
        draws = draw_views(plan.views, generator(0, 0, 0, i), header.width, header.height)
        spent["draw"] += (now := clock()) - at
        pixels, reduced = decode_reduced(data, reduction(draws)) if reduction(draws) > 1 else (decode(data), 1)
        spent["decode"] += (at := clock()) - now
        cuts = [render_cpu.cut(pixels, item, reduced) for item in draws]
        spent["cut"] += (now := clock()) - at
        views = [render_cpu.recolour(cut, item.colour) for cut, item in zip(cuts, draws, strict=True)]
        spent["colour"] += (at := clock()) - now
        for view in views:
            out = torch.empty(3, *view.shape[:2])
            out.copy_(torch.from_numpy(np.ascontiguousarray(view)).permute(2, 0, 1)).mul_(0.017).add_(-2.0)
        spent["to float"] += clock() - at
    return {name: seconds / len(images) * 1e3 for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="worker processes of each side; 0: only in process")
    parser.add_argument("--images", type=int, default=160, help="different images")
    parser.add_argument("--steps", type=int, default=8, help=f"batches of {BATCH} a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the section into RESULTS.md")
    args = parser.parse_args()
    files = {"boxes": find_images("boxes", "images/train/*.jpg"), "objects": find_images("objects", "train/*/*.jpg")}
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    lines = [
        f"| images | crops | processes | ours, images/s | lightly, images/s | ratio (median of {args.repeats}) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    with tempfile.TemporaryDirectory() as scratch:
        store = ArtifactStore(scratch)
        for number, (name, paths) in enumerate(files.items()):
            images = [path.read_bytes() for path in paths[:: max(1, len(paths) // args.images)][: args.images]]
            table = make_table(store, images, f"{number:024d}")
            for crops_name, crops in CROPS.items():
                measured = {0: time.process_time} | ({args.processes: time.perf_counter} if args.processes else {})
                for workers, clock in measured.items():
                    pairs = []
                    for _ in range(args.repeats):  # interleaved: what else the machine does hits both alike
                        ours = speed(partial(run_ours, table, crops, workers), args.steps, 1 + workers, clock)
                        theirs = speed(partial(run_lightly, images, crops, workers), args.steps, 1 + workers, clock)
                        pairs.append((ours, theirs))
                    ratio = statistics.median(a / b for a, b in pairs)
                    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
                    where = f"{workers} (wall time)" if workers else "in process (CPU time)"
                    lines.append(f"| {name} | {crops_name} | {where} | {ours:.0f} | {theirs:.0f} | {ratio:.1f} |")
                    print(lines[-1], flush=True)
                spent = phases(images, crops)
                told = ", ".join(f"{phase} {ms:.2f}" for phase, ms in spent.items())
                notes.append(f"- {name}, {crops_name}: {told} ms an image")
                print(notes[-1], flush=True)
    text = "\n".join([*lines, "", "Where our time goes (one process, CPU time):", *notes])
    if args.write:
        write_section("Data path: decode + views", "python -m tests.benchmarks.data_path --write", text)


def make_table(store: ArtifactStore, images: list[bytes], fingerprint: str) -> Table:
    writer = store.begin("images", fingerprint)
    rows = []
    for i, data in enumerate(images):
        header = probe(data)
        row = dict.fromkeys(SCHEMAS["images"].names) | {"image_id": i, "key": f"{i}.jpg", "image": data}
        rows.append(row | {"width": header.width, "height": header.height})
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    return Table.open(writer.commit(), ["key", "image", "width", "height"])


if __name__ == "__main__":
    main()
