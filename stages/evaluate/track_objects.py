"""The `track_objects` stage: the first frame's masks carried through a video by feature similarity (DAVIS).

Source: docs/methods.md#label-propagation. `label_propagation.py` carries, `video_scores.py` scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Mismatch
from stages.evaluate.frozen import FeatureConfig, FeatureStage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOWN = 4  # sequences in the preview
_VOID = 255


class TrackObjectsConfig(FeatureConfig):
    """The protocol's numbers; defaults are DINO's script."""

    split: str | None = Field(None, description="the videos of this split only; default: all")
    radius: int = Field(
        12, ge=-1, description="in patches: how far an object may move from one frame to another; -1: any"
    )
    topk: int = Field(5, ge=1, description="patches of the context that a patch takes its label from")
    temperature: float = Field(0.1, gt=0, description="a patch of the context weighs exp(cosine / temperature)")
    context: int = Field(7, ge=1, description="previous frames beside the first")


class TrackObjects(FeatureStage[TrackObjectsConfig]):
    """images + features -> metrics j_and_f, j, f in per cent, one row an object of a video."""

    units = dict.fromkeys(("j_and_f", "j", "f"), "%")
    whole_images = True
    Config = TrackObjectsConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Also images that are no frames."""
        yield from super().mismatches(feeds)
        images = feeds["images"]
        if images.counts is not None and not images.counts.get("sequences", 1):
            yield "images", f"{images.stage} has no videos", "ingest with layout: davis"

    def run(self, context: Context) -> Outcome:
        """Tracks every video.

        Raises: SourceError where no video has objects in its first frame.
        """
        import pyarrow as pa

        from stages.data.units import Units, write

        frames = self._frames(context)
        found = Units()
        problems: list[dict[str, str]] = []
        shown: list[tuple[str, int, NDArray[np.int64]]] = []
        rows: list[dict[str, Any]] = []
        for done, (sequence, ids) in enumerate(frames.items(), 1):
            reason = (
                "it has fewer than three frames" if len(ids) < 3 else self._track(context, sequence, ids, rows, shown)
            )
            if reason:
                problems.append({"key": sequence, "reason": reason})
            context.report_progress(done, len(frames), "videos")
        for row in rows:
            j, f = 100 * row["j"], 100 * row["f"]
            found.add(f"{row['sequence']}/{row['object']}", {"j_and_f": (j + f) / 2, "j": j, "f": f})
        if not rows:
            first = f": {problems[0]['key']}: {problems[0]['reason']}" if problems else ""
            raise SourceError(f"{context.name}: none of {len(frames)} videos can be tracked{first}")
        context.output.put_table(0, pa.Table.from_pylist(rows))
        write(context.output, self.config, found.metrics(), found)
        context.output.put_file("preview.png", _picture(context, shown))
        counts = {"videos": len(frames) - len(problems), "objects": len(rows), "unusable": len(problems)}
        return Outcome(metrics=found.metrics(), counts=counts, problems=problems, preview="preview.png")

    def _frames(self, context: Context) -> dict[str, list[int]]:
        """Ids of the frames of each video, in their order."""
        from stages.data.rows import iter_rows

        numbered: dict[str, list[tuple[int, int]]] = {}
        for row in iter_rows(context.inputs["images"], ["sequence", "frame", "split"]):
            if row["sequence"] is not None and self.config.split in (None, row["split"]):
                numbered.setdefault(row["sequence"], []).append((row["frame"], row["image_id"]))
        if not numbered:
            which = f" of split {self.config.split!r}" if self.config.split else ""
            raise SourceError(f"{context.name}: the images hold no video{which} (ingest with layout: davis)")
        return {name: [image_id for _, image_id in sorted(frames)] for name, frames in sorted(numbered.items())}

    def _track(
        self, context: Context, sequence: str, ids: list[int], rows: list[dict[str, Any]], shown: list[Any]
    ) -> str:
        """Carry one video's masks on and add a row an object; returns why it cannot be done, or ""."""
        import numpy as np

        from stages.data.images import decode_mask
        from stages.data.rows import iter_rows
        from stages.evaluate.stored_features import iter_features
        from stages.evaluate.video_scores import score_object

        masks = {
            row["image_id"]: None if row["mask"] is None else decode_mask(row["mask"])
            for row in iter_rows(context.inputs["images"], ["mask"], ids=set(ids))
        }
        if any(masks[image_id] is None for image_id in ids):
            return "a frame has no mask"
        truth_THW = np.stack([np.asarray(masks[image_id]) for image_id in ids])
        objects = [int(value) for value in np.unique(truth_THW[0]) if value not in (0, _VOID)]
        if not objects:
            return "the mask of its first frame is empty"
        maps = {image.image_id: image.map for image in iter_features(context.inputs["features"], set(ids))}
        if len(maps) < len(ids):
            return f"{len(ids) - len(maps)} of its frames have no features"
        found_THW = self._carried([maps[image_id] for image_id in ids], truth_THW[0], objects, truth_THW.shape[1:])
        for number in objects:
            scores = score_object(truth_THW == number, found_THW == number)
            rows.append({"sequence": sequence, "object": number, "j": scores.j.mean(), "f": scores.f.mean()})
        if len(shown) < _SHOWN:
            middle = len(ids) // 2
            shown.append((sequence, ids[middle], found_THW[middle]))
        return ""

    def _carried(
        self, maps: list[Any], first_HW: NDArray[Any], objects: list[int], size: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """Object numbers of every pixel of every frame, (T, H, W); 0 is the background."""
        import cv2
        import numpy as np
        import torch
        from torch.nn import functional

        from stages.evaluate.label_propagation import propagate_labels, stretch_labels

        config = self.config
        height, width = maps[0].shape[:2]
        numbers = np.array([0, *objects])
        small = cv2.resize(first_HW.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        labels = [torch.from_numpy((small == numbers[:, None, None]).astype(np.float32))]
        features = [torch.from_numpy(one).permute(2, 0, 1) for one in maps]
        found = [first_HW.astype(np.int64)]
        for frame in range(1, len(maps)):
            before = [0, *range(max(1, frame - config.context), frame)]
            labels.append(
                propagate_labels(
                    features[frame],
                    torch.stack([features[i] for i in before]),
                    torch.stack([labels[i] for i in before]),
                    radius=config.radius,
                    topk=config.topk,
                    temperature=config.temperature,
                )
            )
            enlarged = functional.interpolate(labels[-1][None], size, mode="bilinear")[0]
            found.append(numbers[stretch_labels(enlarged).argmax(dim=0).numpy()])
        return np.stack(found)


def _picture(context: Context, shown: list[tuple[str, int, NDArray[np.int64]]]) -> bytes:
    """The middle frame of some videos, beside the objects found in it."""
    from stages.data.images import decode
    from stages.data.pictures import colour_mask, grid
    from stages.data.rows import iter_rows

    wanted = {image_id: (sequence, found) for sequence, image_id, found in shown}
    pictures, captions = [], []
    for row in iter_rows(context.inputs["images"], ["image"], ids=wanted.keys()):
        sequence, found = wanted[row["image_id"]]
        names = [str(number) for number in range(int(found.max()) + 1)]
        pictures += [decode(row["image"]), colour_mask(found, names)]
        captions += [sequence, "objects found"]
    return grid(pictures, columns=2, captions=captions)
