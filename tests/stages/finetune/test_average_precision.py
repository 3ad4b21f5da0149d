"""Average precision: the kept units give pycocotools' own numbers, and the bootstrap those of the drawn images."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stages.finetune.average_precision import MatchedImages, _scores, class_precisions, match

IMAGES, CLASSES = 12, 3


def scene(seed: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Images, objects (some of them crowds), and detections near them, near nothing, and some of the wrong class."""
    rng = np.random.default_rng(seed)
    images, objects, detections = [], [], []
    for image in range(IMAGES):
        images.append((f"{image}.jpg", 100, 80))
        for _ in range(int(rng.integers(0, 5))):
            x, y, w, h = (float(v) for v in (*rng.uniform(0, 50, 2), *rng.uniform(8, 30, 2)))
            category = int(rng.integers(0, CLASSES))
            crowd = int(rng.random() < 0.15)
            box = [x, y, w, h]
            objects.append({"image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": crowd})
            for _ in range(int(rng.integers(0, 3))):
                moved = [x + rng.normal(0, 2), y + rng.normal(0, 2), w * rng.uniform(0.8, 1.2), h]
                guess = category if rng.random() < 0.8 else int(rng.integers(0, CLASSES))
                score = float(rng.random())
                detections.append({"image_id": image, "category_id": guess, "bbox": moved, "score": score})
        for _ in range(int(rng.integers(0, 3))):
            box = [float(v) for v in (*rng.uniform(0, 60, 2), *rng.uniform(5, 20, 2))]
            category = int(rng.integers(0, CLASSES))
            detections.append({"image_id": image, "category_id": category, "bbox": box, "score": float(rng.random())})
    return images, objects, detections


def by_pycocotools(images: list[Any], objects: list[Any], detections: list[Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "width": w, "height": h} for i, (_, w, h) in enumerate(images)],
            "categories": [{"id": i, "name": str(i)} for i in range(CLASSES)],
            "annotations": [{"id": i + 1, **one} for i, one in enumerate(objects)],
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(4))
def test_the_units_give_what_pycocotools_gives(seed: int) -> None:
    images, objects, detections = scene(seed)
    units = match(images, objects, detections, ["a", "b", "c"], masks=False)
    evaluation = by_pycocotools(images, objects, [dict(one) for one in detections])
    found = units.metrics()
    assert [found["ap"], found["ap50"], found["ap75"]] == pytest.approx((100 * evaluation.stats[:3]).tolist(), abs=1e-9)
    precision_TRK = evaluation.eval["precision"][:, :, :, 0, 2]
    per_class = [100 * precision_TRK[:, :, k].mean() for k in range(CLASSES)]
    assert class_precisions(units, CLASSES).tolist() == pytest.approx(per_class, abs=1e-9)


def test_an_image_that_is_drawn_twice_counts_twice() -> None:
    images, objects, detections = scene(7)
    times = np.random.default_rng(1).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES))
    units = match(images, objects, detections, ["a", "b", "c"], masks=False)
    drawn = {name: value[0] for name, value in _scores(units.table(), times[None]).items()}
    again = [image for image, count in enumerate(times) for _ in range(count)]
    copied_objects = [
        {**one, "image_id": new} for new, old in enumerate(again) for one in objects if one["image_id"] == old
    ]
    copied = [{**one, "image_id": new} for new, old in enumerate(again) for one in detections if one["image_id"] == old]
    whole = match([images[old] for old in again], copied_objects, copied, ["a", "b", "c"], masks=False).metrics()
    assert drawn == pytest.approx(whole, abs=0.5)  # detections of equal scores come in another order


def test_perfect_detections_have_100_and_none_have_0() -> None:
    images, objects, _ = scene(3)
    perfect = [
        {"image_id": o["image_id"], "category_id": o["category_id"], "bbox": o["bbox"], "score": 0.9}
        for o in objects
        if not o["iscrowd"]
    ]
    assert match(images, objects, perfect, ["a", "b", "c"], masks=False).metrics()["ap"] == pytest.approx(100)
    assert match(images, objects, [], ["a", "b", "c"], masks=False).metrics()["ap"] == 0


def test_no_images_keep_no_units() -> None:
    assert MatchedImages().table().num_rows == 0
