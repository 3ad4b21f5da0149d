"""The `measure_coupling` stage: how much objects change each other's features, and how much position does (D3SSL).

Source: docs/methods.md#coupling-and-position-bias.

Reading order: this file wires, `coupling_views.py` makes the pictures and pools them, `coupling.py` has the measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Input, Outcome, StageConfig
from stages.data.requirements import Mismatch, lacking
from stages.evaluate.frozen import Evaluation
from stages.models.planned import backbone_of, undivided

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.evaluate.coupling_views import LayerEncoder
    from stages.evaluate.object_bank import SplitObjects
    from stages.models.inference import RGB

_SHOWN = 4


class MeasureCouplingConfig(StageConfig):
    """Which objects are put beside each other; the paper names no numbers."""

    images: Input["images"] = Field(description="with object boxes")
    encoder: Input["encoder"]
    split: str = Field("val", description="the images whose objects are used")
    pairs: int = Field(500, ge=2, description="of objects of different classes, drawn at random")
    tile: int = Field(96, ge=16, description="pixels that an object is stretched to (a multiple of the patch)")
    smallest: int = Field(32, ge=1, description="pixels; objects with a shorter side are not used")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, ge=0, description="of the pairs and of the random encoder")


class _Layer(NamedTuple):
    """What the pairs give at one layer; NaN where a pair is left out."""

    coupling: NDArray[np.float64]  # (N,)
    position: NDArray[np.float64]  # (N,)


class MeasureCoupling(Evaluation[MeasureCouplingConfig]):
    """images + encoder -> metrics coupling_rate, mean_cosine_similarity of the last layer; a row a layer."""

    packages = ("timm",)
    units = {"coupling_rate": "", "mean_cosine_similarity": ""}
    objectives = {"coupling_rate": "min", "mean_cosine_similarity": "max"}
    Config = MeasureCouplingConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Images without boxes, a tile that does not split into patches."""
        yield from undivided(backbone_of(feeds.get("encoder")), {"tile": self.config.tile})
        yield from lacking(feeds["images"], "objects", {"split": self.config.split})

    def run(self, context: Context) -> Outcome:
        """Draws the pairs and measures them at every layer.

        Raises: SourceError for objects of fewer than two classes, or where no pair can be measured; UsageError for a
            tile that does not split into patches.
        """
        from stages.evaluate.coupling_views import LayerEncoder, object_tiles
        from stages.models.encoder import Encoder
        from stages.models.inference import require_size

        config = self.config
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.tile, f"stages.{context.name}.tile")
        objects, pairs = self._pairs(context)
        problems: list[dict[str, str]] = []
        tiles = object_tiles(context.inputs["images"], objects, set(pairs.ravel().tolist()), config.tile, problems)
        pairs = pairs[[all(int(row) in tiles for row in pair) for pair in pairs]]
        if not len(pairs):
            raise SourceError(
                f"{context.name}: no object can be decoded; {problems[0]['key']}: {problems[0]['reason']}"
            )
        encoders = {"": LayerEncoder(encoder)}
        if config.random_baseline:
            encoders["_random"] = LayerEncoder(encoder.untrained_twin(config.seed))
        found = {suffix: self._measure(context, one, pairs, tiles) for suffix, one in encoders.items()}
        return self._write(context, found, objects, pairs, tiles, problems)

    def _pairs(self, context: Context) -> tuple[SplitObjects, NDArray[np.int64]]:
        """The objects that are large enough, and the rows of the pairs, (N, 2)."""
        import numpy as np

        from stages.evaluate.coupling_views import draw_pairs
        from stages.evaluate.object_bank import read_objects

        config = self.config
        listed = read_objects(context.name, context.inputs["images"], "split", config.split)
        sides = (listed.boxes[:, 2:] - listed.boxes[:, :2]).min(axis=1)
        objects = listed.taken(np.flatnonzero(sides >= config.smallest))
        classes = len(np.unique(objects.labels))
        if classes < 2:
            raise SourceError(
                f"{context.name}: objects of two classes are put beside each other, and those of split "
                f"{config.split!r} with sides of {config.smallest} pixels or more are of {classes} (of {len(listed)} "
                f"objects, {len(objects)} are large enough): lower stages.{context.name}.smallest, or name another "
                "split"
            )
        return objects, draw_pairs(objects.labels, config.pairs, config.seed)

    def _measure(
        self, context: Context, encoder: LayerEncoder, pairs: NDArray[np.int64], tiles: Mapping[int, RGB]
    ) -> dict[str, _Layer]:
        """Coupling and position bias of every pair by layer; the position bias is that of the pair's first object."""
        import numpy as np

        from stages.evaluate.coupling import coupling_rate, mean_cosine_similarity
        from stages.evaluate.coupling_views import pair_boxes, side_by_side, tile_boxes, tiled

        side, step = self.config.tile, context.resources.batch_size or 16
        rates: dict[str, list[float]] = {}
        similarities: dict[str, list[float]] = {}
        for start in range(0, len(pairs), step):
            chosen = [(tiles[int(a)], tiles[int(b)]) for a, b in pairs[start : start + step]]
            together = encoder([side_by_side(a, b) for a, b in chosen], pair_boxes(side))
            alone = encoder([side_by_side(a, None) for a, _ in chosen], pair_boxes(side))
            grids = encoder([tiled(a) for a, _ in chosen], tile_boxes(side))
            for layer, both in together.items():
                for i in range(len(chosen)):
                    rate = coupling_rate(both[i, :1], alone[layer][i, :1], both[i, 1:])
                    rates.setdefault(layer, []).append(float(rate[0]) if len(rate) else np.nan)
                similarities.setdefault(layer, []).extend(mean_cosine_similarity(grids[layer]).tolist())
            context.report_progress(min(start + step, len(pairs)), len(pairs), "pairs")
        return {
            layer: _Layer(np.array(rates[layer]), np.where(np.isnan(rates[layer]), np.nan, similarities[layer]))
            for layer in rates
        }

    def _write(
        self,
        context: Context,
        found: Mapping[str, Mapping[str, _Layer]],
        objects: SplitObjects,
        pairs: NDArray[np.int64],
        tiles: Mapping[int, RGB],
        problems: list[dict[str, str]],
    ) -> Outcome:
        import numpy as np
        import pyarrow as pa

        from stages.data.units import Units, write

        units, last = Units(), list(found[""])[-1]
        measured = found[""][last]
        for (a, b), rate, similarity in zip(pairs.tolist(), measured.coupling, measured.position, strict=True):
            name = "/".join(f"{objects.keys[int(objects.images[row])]}#{objects.places[row]}" for row in (a, b))
            skipped = bool(np.isnan(rate))  # a unit all the same, of no weight: all encoders have the same units
            values = {"coupling_rate": rate, "mean_cosine_similarity": similarity}
            units.add(name, dict.fromkeys(values, 0.0) if skipped else values, weight=1.0 - skipped)
        if not any(units.weights):
            raise SourceError(
                f"{context.name}: no pair has features that are not orthogonal: the encoder is degenerate"
            )
        metrics = units.metrics()
        table: dict[str, Any] = {"layer": list(found[""])}
        for suffix, layers in found.items():
            columns = _summary(layers)
            table |= {name + suffix: values for name, values in columns.items()}
            if suffix:
                metrics |= {name + suffix: columns[name][-1] for name in units.values}
        context.output.put_table(0, pa.table(table))
        write(context.output, self.config, metrics, units)
        context.output.put_file("preview.png", _picture(pairs, tiles))
        counts = {"pairs": len(pairs), "skipped": units.weights.count(0.0), "unusable": len(problems)}
        return Outcome(metrics=metrics, counts=counts, problems=problems, notes={"layer": last}, preview="preview.png")


def _summary(layers: Mapping[str, _Layer]) -> dict[str, list[float]]:
    """Columns of the table, a value a layer."""
    import numpy as np

    columns: dict[str, list[float]] = {}
    for layer in layers.values():
        used = ~np.isnan(layer.coupling)
        row = {
            "coupling_rate": layer.coupling[used].mean() if used.any() else np.nan,
            "coupling_rate_median": np.median(layer.coupling[used]) if used.any() else np.nan,
            "mean_cosine_similarity": layer.position[used].mean() if used.any() else np.nan,
            "pairs": used.sum(),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(float(value))
    return columns


def _picture(pairs: NDArray[np.int64], tiles: Mapping[int, RGB]) -> bytes:
    """What the encoder saw of some pairs."""
    from stages.data.pictures import grid
    from stages.evaluate.coupling_views import side_by_side, tiled

    pictures = []
    for a, b in pairs[:_SHOWN].tolist():
        pictures += [side_by_side(tiles[a], tiles[b]), side_by_side(tiles[a], None), tiled(tiles[a])]
    captions = ["A beside B", "A alone", "A at nine places"] * (len(pictures) // 3)
    return grid(pictures, columns=3, captions=captions, title="What the encoder saw of some pairs", cell=200)
