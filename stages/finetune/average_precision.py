"""COCO's average precision: pycocotools matches, and what it found of each image is kept, so that images can be drawn.

Shape legend: N images, R draws, D detections, T overlaps (IoU), K classes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.data.units import FILE, Units

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

OVERLAPS_T = np.linspace(0.5, 0.95, 10)  # a detection is right at an overlap of at least this
RECALLS = np.linspace(0, 1, 101)  # where precision is read
COUNTED = 100  # detections of an image and a class that count
SUFFIXES = {"bbox": "", "segm": "_mask"}
DRAWS_AT_ONCE = 50


class MatchedImages(Units):
    """The test images, each with its detections and which of them are right: the units of an average precision."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: dict[str, list[Any]] = {}

    def table(self) -> pa.Table:
        """A row an image: of each detection class, score and two bits an overlap, and the classes of its objects."""
        kinds = {"scores": pa.float32(), "classes": pa.int32(), "right": pa.int32(), "left_out": pa.int32()}
        columns: dict[str, Any] = {"unit": self.names}
        for name, values in self.columns.items():
            columns[name] = pa.array(values, pa.list_(kinds.get(name.removesuffix("_mask"), pa.int32())))
        return pa.table(columns)

    def metrics(self) -> dict[str, float]:
        """AP over all overlaps, at 0.5 and at 0.75, in per cent."""
        once = np.ones((1, len(self.names)), np.int64)
        return {name: float(value[0]) for name, value in _scores(self.table(), once).items()}


def match(
    images: Sequence[tuple[str, int, int]],
    objects: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    *,
    masks: bool,
) -> MatchedImages:
    """Which detections are right, by pycocotools.

    Args:
        images: key, width and height of each test image; their places are the ids that the others name.
        objects: COCO's annotations: image_id, category_id, bbox, area, iscrowd and, with masks, segmentation.
        detections: COCO's results: image_id, category_id, bbox, score and, with masks, segmentation.
        classes: names by category_id.
        masks: compare masks too.
    """
    units = MatchedImages()
    units.names = [key for key, _, _ in images]
    for kind in ("bbox", "segm") if masks else ("bbox",):
        found = _evaluated(images, objects, detections, len(classes), kind)
        _collect(units, found, len(classes), SUFFIXES[kind])
    return units


def _evaluated(
    images: Sequence[tuple[str, int, int]],
    objects: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    classes: int,
    kind: str,
) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth, results = COCO(), COCO()
        listed = [{"id": i, "width": w, "height": h} for i, (_, w, h) in enumerate(images)]
        categories = [{"id": i, "name": str(i)} for i in range(classes)]
        numbered = [{"id": i + 1, **one} for i, one in enumerate(objects)]
        found = [
            {"id": i + 1, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], **one}
            for i, one in enumerate(detections)
        ]
        for coco, annotations in ((truth, numbered), (results, found)):
            coco.dataset = {"images": listed, "categories": categories, "annotations": annotations}
            coco.createIndex()
        evaluation = COCOeval(truth, results, kind)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [COUNTED]
        evaluation.evaluate()
    return evaluation


def _collect(units: MatchedImages, evaluation: Any, classes: int, suffix: str) -> None:
    """Take over what pycocotools has found of every image; it lists images within classes."""
    names = [f"{name}{suffix}" for name in ("scores", "classes", "right", "left_out", "objects")]
    images = len(units.names)
    columns: list[list[list[Any]]] = [[[] for _ in range(images)] for _ in names]
    bits_T = 1 << np.arange(len(OVERLAPS_T))
    for place, one in enumerate(evaluation.evalImgs):
        if one is None:
            continue
        which, image = divmod(place, images)
        right_TD, left_out_TD = np.asarray(one["dtMatches"]) > 0, np.asarray(one["dtIgnore"]).astype(bool)
        columns[0][image] += list(one["dtScores"])
        columns[1][image] += [which] * len(one["dtScores"])
        columns[2][image] += (bits_T @ (right_TD & ~left_out_TD)).tolist()
        columns[3][image] += (bits_T @ left_out_TD).tolist()
        columns[4][image] += [which] * int((1 - np.asarray(one["gtIgnore"])).sum())
    units.columns |= dict(zip(names, columns, strict=True))


def class_precisions(units: MatchedImages, classes: int, suffix: str = "") -> NDArray[np.float64]:
    """AP of each class over all overlaps, in per cent, (K,); NaN for a class without objects."""
    once = np.ones((1, len(units.names)), np.int64)
    return 100 * _precisions(units.table(), once, suffix, classes)[0].mean(axis=0)


def resample(artifact: Artifact, draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Every metric on bootstrap samples of the images, (R,) each; the same images are drawn alike by the same seed.

    Args:
        artifact: of a detection.
        draws: R.
        seed: of the draws.
    """
    if all(entry.name != FILE for entry in artifact.manifest.files):
        return {}
    table = pq.read_table(artifact.local(FILE))
    count = len(table)
    if not count:
        return {}
    generator = np.random.default_rng((seed, count))
    times_RN = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    parts = [_scores(table, times_RN[i : i + DRAWS_AT_ONCE]) for i in range(0, draws, DRAWS_AT_ONCE)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _scores(table: pa.Table, times_RN: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    for suffix in SUFFIXES.values():
        if f"scores{suffix}" not in table.column_names:
            continue
        objects = table[f"objects{suffix}"].combine_chunks().flatten().to_numpy()
        classes = 1 + int(objects.max(initial=-1))
        means_RT = _mean(_precisions(table, times_RN, suffix, classes), axis=2)
        found[f"ap{suffix}"] = 100 * means_RT.mean(axis=1)
        found[f"ap50{suffix}"], found[f"ap75{suffix}"] = 100 * means_RT[:, 0], 100 * means_RT[:, 5]
    return found


def _precisions(table: pa.Table, times_RN: NDArray[np.int64], suffix: str, classes: int) -> NDArray[np.float64]:
    """Average precision, (R, T, K), where image n counts times_RN[r, n] times; NaN for a class without objects."""
    owner_D, columns = _flat(table, [f"{name}{suffix}" for name in ("scores", "classes", "right", "left_out")])
    score_D, class_D, right_D, left_out_D = columns
    owner_of_object, [class_of_object] = _flat(table, [f"objects{suffix}"])
    found = np.full((len(times_RN), len(OVERLAPS_T), classes), np.nan)
    for which in range(classes):
        objects_R = times_RN[:, owner_of_object[class_of_object == which]].sum(axis=1)
        mine = np.flatnonzero(class_D == which)
        mine = mine[np.argsort(-score_D[mine], kind="mergesort")]
        times_RD = times_RN[:, owner_D[mine]].astype(np.float64)
        for t in range(len(OVERLAPS_T)):
            right = (right_D[mine] >> t) & 1
            wrong = (1 - right) * (1 - ((left_out_D[mine] >> t) & 1))
            right_RD, wrong_RD = np.cumsum(times_RD * right, axis=1), np.cumsum(times_RD * wrong, axis=1)
            for r in np.flatnonzero(objects_R):
                found[r, t, which] = _area(right_RD[r], wrong_RD[r], int(objects_R[r]))
    return found


def _area(right_D: NDArray[np.float64], wrong_D: NDArray[np.float64], objects: int) -> float:
    """Mean of the best precision at every recall or beyond it, read at 101 recalls."""
    if not len(right_D):
        return 0.0
    recall_D = right_D / objects
    precision_D = right_D / np.maximum(right_D + wrong_D, np.spacing(1))
    best_D = np.maximum.accumulate(precision_D[::-1])[::-1]
    places = np.searchsorted(recall_D, RECALLS, side="left")
    reached = places < len(best_D)
    return float(best_D[places[reached]].sum() / len(RECALLS))


def _flat(table: pa.Table, names: Sequence[str]) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """Lists of one length a row as flat arrays, and which row each value is from."""
    lists = [table[name].combine_chunks() for name in names]
    counts = np.diff(lists[0].offsets.to_numpy())
    return np.repeat(np.arange(len(table)), counts), [one.flatten().to_numpy() for one in lists]


def _mean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The mean without NaN, and NaN where there is nothing else."""
    there = ~np.isnan(values)
    count = there.sum(axis=axis)
    return np.where(count, np.where(there, values, 0).sum(axis=axis) / np.maximum(count, 1), np.nan)
