"""The `measure_similarity` stage: maps of how much each patch is like all others of its image (FLSL's ASS).

Source: docs/methods.md#aggregated-similarity. The computations are in `similarity_score.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from pipeline.errors import SourceError, UsageError
from pipeline.stage import Context, Feed, Input, Outcome, StageConfig
from stages.data.requirements import Mismatch, lacking, single_class
from stages.evaluate.frozen import Evaluation
from stages.models.planned import backbone_of, undivided

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.data.mask_classes import MaskClasses, MaskLabels
    from stages.data.units import Units
    from stages.models.inference import RGB

_SHOWN_LAYERS = 4


class MeasureSimilarityConfig(StageConfig):
    """Which images, at which size and layers."""

    images: Input["images"] = Field(description="with masks")
    encoder: Input["encoder"]
    split: str = Field("val", description="the images that are measured")
    size: int = Field(448, gt=0, description="side in pixels that a whole image is resized to")
    layers: list[str] | None = Field(
        None,
        min_length=1,
        description="in the picture: c1 to c5 of a ResNet, block_0 and on of a ViT, map of others and of a filter; "
        "default: four, evenly spaced, with the last",
    )
    shown: int = Field(6, ge=1, description="images in the picture")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, ge=0, description="of the random encoder")


class _SeenImage(NamedTuple):
    """An image as the encoder sees it."""

    image_id: int
    key: str
    pixels: RGB  # (size, size, 3)
    truth: MaskLabels  # (H, W)


class _LayerScores:
    """What one encoder's maps score, layer by layer."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.units: dict[str, Units] = {}
        self.brightness: dict[str, list[float]] = {}

    def add(self, image: _SeenImage, maps: Mapping[str, NDArray[np.float32]]) -> None:
        """One image: its maps by layer, (h, w) each."""
        from stages.data.units import Units
        from stages.evaluate.patch_labels import class_pixels
        from stages.evaluate.similarity_score import area_correlation

        for layer, score_hw in maps.items():
            labels = class_pixels(image.truth, score_hw.shape, self.classes).argmax(dim=1)
            labels[labels == self.classes] = -1  # void
            correlation = area_correlation(score_hw, labels.reshape(score_hw.shape).numpy())
            units = self.units.setdefault(layer, Units())
            self.brightness.setdefault(layer, []).append(float(score_hw.mean()))
            # Without a correlation it is a unit of no weight, so that all encoders have the same units.
            units.add(image.key, {"area_correlation": 100 * (correlation or 0.0)}, weight=correlation is not None)

    def columns(self) -> dict[str, list[float | None]]:
        """Of the table, a value a layer."""
        return {
            "area_correlation": [
                units.metrics()["area_correlation"] if any(units.weights) else None for units in self.units.values()
            ],
            "brightness": [sum(values) / len(values) for values in self.brightness.values()],
        }


class MeasureSimilarity(Evaluation[MeasureSimilarityConfig]):
    """images + encoder -> metric area_correlation of the last layer, in per cent; a row a layer, and the maps."""

    packages = ("timm",)
    units = {"area_correlation": "%"}
    objectives = {"area_correlation": "max"}
    Config = MeasureSimilarityConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Images without masks, or with masks of one class; a size that does not split into patches."""
        yield from undivided(backbone_of(feeds.get("encoder")), {"size": self.config.size})
        yield from lacking(feeds["images"], "masks", {"split": self.config.split})
        yield from single_class(feeds["images"], {"split": self.config.split})

    def run(self, context: Context) -> Outcome:
        """Measures every image at every layer, and draws the maps of some.

        Raises: SourceError for a split without usable masks, or whose images show one region each; UsageError for a
            layer that the encoder does not have.
        """
        import pyarrow as pa

        from stages.data.mask_classes import MaskClasses
        from stages.data.units import write
        from stages.evaluate.stored_features import masked_ids
        from stages.models.encoder import Encoder
        from stages.models.inference import default_device, require_size

        config, images = self.config, context.inputs["images"]
        classes = MaskClasses.of(images)
        [ids] = masked_ids(context.name, images, {"split": config.split}).values()
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.size, f"stages.{context.name}.size")
        encoders = {"": encoder} | ({"_random": encoder.untrained_twin(config.seed)} if config.random_baseline else {})
        for one in encoders.values():
            one.to(default_device()).eval().requires_grad_(False)
        found = {suffix: _LayerScores(len(classes.names)) for suffix in encoders}
        problems: list[dict[str, str]] = []
        shown: list[RGB] = []
        picked = {ids[int(len(ids) * i / config.shown)] for i in range(min(config.shown, len(ids)))}
        names: list[str] = []
        for done, image in enumerate(self._seen(context, classes, ids, problems), 1):
            for suffix, one in encoders.items():
                maps = _score_maps(one, image.pixels)
                found[suffix].add(image, maps)
                if not suffix:
                    names = names or self._shown_layers(context.name, list(maps))
                    if image.image_id in picked or not shown:
                        shown += [image.pixels, *(_thermal(maps[name]) for name in names)]
            context.report_progress(done, len(ids), "images")
        last = self._last(context.name, found[""].units, problems)
        units, metrics = found[""].units[last], dict[str, float]()
        table: dict[str, Any] = {"layer": list(found[""].units)}
        for suffix, scores in found.items():
            columns = scores.columns()
            table |= {name + suffix: values for name, values in columns.items()}
            if (value := columns["area_correlation"][-1]) is not None:
                metrics["area_correlation" + suffix] = value
        context.output.put_table(0, pa.table(table))
        write(context.output, config, metrics, units)
        context.output.put_file("preview.png", _picture(shown, names))
        counts = {"images": len(units.names), "without_regions": units.weights.count(0.0), "unusable": len(problems)}
        return Outcome(metrics=metrics, counts=counts, problems=problems, notes={"layer": last}, preview="preview.png")

    def _seen(
        self, context: Context, classes: MaskClasses, ids: list[int], problems: list[dict[str, str]]
    ) -> Iterator[_SeenImage]:
        """The images; those that show one region, or cannot be used, are named and left out."""
        import numpy as np

        from stages.data.images import ImageError, decode
        from stages.data.prepared import prepared
        from stages.models.inference import squeeze

        def prepare(row: Mapping[str, Any]) -> _SeenImage:
            pixels = decode(row["image"])
            truth = classes.labels(row["mask"], pixels.shape[:2])
            if len(np.unique(truth[truth >= 0])) < 2:
                raise ImageError("its mask shows one class: nothing compares")
            side = self.config.size
            return _SeenImage(row["image_id"], str(row["key"]), squeeze(pixels, side, side), truth)

        columns = ["key", "image", "mask"]
        yield from prepared(context.inputs["images"], columns, prepare, set(ids), problems=problems)

    def _shown_layers(self, stage: str, layers: list[str]) -> list[str]:
        asked = self.config.layers
        if asked is None:
            count = min(_SHOWN_LAYERS, len(layers))
            return [layers[(i + 1) * len(layers) // count - 1] for i in range(count)]
        if unknown := [name for name in asked if name not in layers]:
            raise UsageError(
                f"stages.{stage}.layers: the encoder has no layer {', '.join(unknown)}; it has {', '.join(layers)}"
            )
        return asked

    def _last(self, stage: str, units: Mapping[str, Units], problems: list[dict[str, str]]) -> str:
        last = list(units)[-1] if units else ""
        if not last or not any(units[last].weights):
            first = f"; the first problem is {problems[0]['key']}: {problems[0]['reason']}" if problems else ""
            raise SourceError(
                f"{stage}: no image of split {self.config.split!r} has patches of regions of two sizes{first}"
            )
        return last


def _score_maps(encoder: Any, pixels: RGB) -> dict[str, NDArray[np.float32]]:
    """The aggregated similarity of one image at every layer, (h, w) each."""
    import torch

    from stages.evaluate.layer_maps import layer_maps
    from stages.evaluate.similarity_score import aggregated_similarity

    device = next(encoder.parameters()).device
    with torch.inference_mode():
        image_13HW = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255
        maps = layer_maps(encoder, encoder.normalise(image_13HW))
        return {name: aggregated_similarity(map_1Dhw[0]).cpu().numpy() for name, map_1Dhw in maps.items()}


def _thermal(score_hw: NDArray[np.float32]) -> RGB:
    """Brighter for a higher score; a patch is at least a few pixels, so that the picture does not blur it."""
    import cv2
    import numpy as np

    grey = (np.clip(score_hw, 0, 1) * 255).round().astype(np.uint8)
    coloured = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)[..., ::-1]
    times = max(1, -(-224 // max(score_hw.shape)))
    return np.ascontiguousarray(coloured.repeat(times, 0).repeat(times, 1))


def _picture(shown: list[RGB], layers: list[str]) -> bytes:
    from stages.data.pictures import grid

    rows = len(shown) // (1 + len(layers))
    title = "Aggregated similarity (bright: high)"
    return grid(shown, columns=1 + len(layers), captions=["image", *layers] * rows, title=title, cell=200)
