"""What evaluations cost beside what a user would write instead.

    python -m tests.benchmarks.evaluation [--write]

- the search of `hummingbird` (784 queries, 30 nearest of 100,000 patches of 384) beside a matrix product and `topk`,
  beside FAISS, exact, and beside FAISS's IVF index, which misses some;
- COCO's average precision of boxes on 5,000 synthetic images, beside pycocotools' whole evaluation: Tessera computes
  AP, AP50 and AP75 over objects of all sizes, not their nine breakdowns.

Alternatives run in turn in one process; the best of several rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stages.evaluate.vector_bank import VectorBank
from stages.finetune.average_precision import match
from tests.benchmarks.results import write_section

ROUNDS = 5


def best_seconds(ways: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """The shortest of several rounds; in each round every way runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in seconds.items()}


def search(patches: int = 100_000, queries: int = 784, width: int = 384, k: int = 30) -> list[str]:
    """Rows of a table: the search of a memory."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, width, generator=generator)

    def drawn(count: int) -> torch.Tensor:
        """Patches in clusters, as real ones are."""
        which = torch.randint(len(centres), (count,), generator=generator)
        noise = torch.randn(count, width, generator=generator)
        return torch.nn.functional.normalize(centres[which] + 1.5 * noise, dim=1)

    memory_ND, queries_MD = drawn(patches), drawn(queries)
    exact = faiss.IndexFlatIP(width)
    exact.add(memory_ND.numpy())
    quantizer = faiss.IndexFlatIP(width)
    inverted = faiss.IndexIVFFlat(quantizer, width, 256, faiss.METRIC_INNER_PRODUCT)
    inverted.train(memory_ND.numpy()[::4])
    inverted.add(memory_ND.numpy())
    inverted.nprobe = 16
    with tempfile.TemporaryDirectory() as folder:
        bank = VectorBank(Path(folder) / "bank")
        bank.append(memory_ND)
        truth = (queries_MD @ memory_ND.T).topk(k, dim=1)[1].numpy()
        ways: dict[str, Callable[[], Any]] = {
            "matrix product and topk": lambda: (queries_MD @ memory_ND.T).topk(k, dim=1)[1].numpy(),
            "matrix product alone": lambda: queries_MD @ memory_ND.T,
            "`hummingbird`'s, from a file": lambda: bank.nearest(queries_MD, k)[1].numpy(),
            "FAISS, exact": lambda: exact.search(queries_MD.numpy(), k)[1],
            "FAISS, IVF 256, 16 probes": lambda: inverted.search(queries_MD.numpy(), k)[1],
        }
        seconds = best_seconds(ways)
        rows = []
        for name, way in ways.items():
            found = way()
            recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(truth, found, strict=True)])
            shown = "" if name == "matrix product alone" else f"{100 * recall:.1f} %"
            first = seconds["matrix product and topk"]
            rows.append(f"| {name} | {seconds[name]:.2f} | {first / seconds[name]:.2f} | {shown} |")
    return rows


def detections(images: int = 5000, classes: int = 80) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO's ground truth and results: boxes, and guesses near most of them and elsewhere."""
    generator = np.random.default_rng(0)
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(images):
        for _ in range(int(generator.poisson(7))):
            x, y, width, height = *generator.uniform(0, 400, 2), *np.exp(generator.uniform(2, 5.3, 2))
            category = int(generator.integers(classes))
            box = [float(x), float(y), float(width), float(height)]
            truth.append(
                {"id": len(truth) + 1, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
                | {"area": box[2] * box[3]}
            )
            for _ in range(int(generator.integers(0, 4))):
                shifted = np.array(box) + generator.normal(0, 0.15, 4) * [width, height, width, height]
                guess = category if generator.random() < 0.8 else int(generator.integers(classes))
                shifted[2:] = np.maximum(shifted[2:], 1)
                score = float(generator.random())
                results.append({"image_id": image, "category_id": guess, "bbox": shifted.tolist(), "score": score})
    names = [{"id": number, "name": str(number)} for number in range(classes)]
    pictures = [{"id": image, "width": 640, "height": 640} for image in range(images)]
    return {"images": pictures, "annotations": truth, "categories": names, "info": {}}, results


def by_pycocotools(truth: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    """AP, AP50 and AP75, as its users get them."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes([dict(one) for one in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * float(value) for value in evaluation.stats[:3]]


def by_tessera(truth: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    """The same, with what a bootstrap needs of every image."""
    images = [(str(one["id"]), one["width"], one["height"]) for one in truth["images"]]
    classes = [one["name"] for one in truth["categories"]]
    found = match(images, truth["annotations"], results, classes, masks=False).metrics()
    return [found["ap"], found["ap50"], found["ap75"]]


def main() -> None:
    """Measure and print, or write into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    lines = ["Search of 784 queries among 100,000 patches of 384, 30 nearest, float32, 2 threads:", ""]
    lines += ["| way | seconds | times faster | of the 30 nearest found |", "| --- | --- | --- | --- |", *search()]
    truth, results = detections()
    ways = {"theirs": lambda: by_pycocotools(truth, results), "ours": lambda: by_tessera(truth, results)}
    seconds = best_seconds(ways, rounds=2)
    apart = np.abs(np.subtract(ways["theirs"](), ways["ours"]())).max()
    images, objects = len(truth["images"]), len(truth["annotations"])
    lines += [
        "",
        f"COCO's average precision of boxes, {images} images, {objects} objects, {len(results)} guesses: "
        f"pycocotools {seconds['theirs']:.1f} s, Tessera {seconds['ours']:.1f} s, "
        f"{seconds['theirs'] / seconds['ours']:.1f} times faster (target: 3); values differ by {apart:.1g} at most.",
    ]
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section("Evaluation beside other ways", "python -m tests.benchmarks.evaluation --write", text)


if __name__ == "__main__":
    main()
