"""What a plan knows of the encoder that a stage will be given: its backbone, and the images that it cannot take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.stage import Feed
from stages.models.settings import Backbone


def backbone_of(feed: Feed | None) -> Backbone | None:
    """The backbone that an encoder was built from, through all trainings before it; None where no config names it."""
    if feed is None:
        return None
    own = getattr(feed.config, "backbone", None)
    if isinstance(own, Backbone):
        return own
    return backbone_of(
        next((feed.inputs[path] for path in ("init", "continue", "like", "encoder") if path in feed.inputs), None)
    )


def undivided(backbone: Backbone | None, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    """Sides in pixels that the encoder cannot take, as `Stage.mismatches` yields it.

    They do not split into its patches, or it takes images of one size only.

    Args:
        backbone: None where it is not known.
        sizes: by the dotted path of their setting.
    """
    for path, size in sizes.items():
        if backbone is not None and (refusal := backbone.refuses(size)) is not None:
            what, remedy = refusal
            yield path, what if backbone.name in what else f"{what}, those of {backbone.name}", remedy


def no_layer(backbone: Backbone | None, layer: int | None) -> tuple[str, str] | None:
    """What is wrong with a number of `Encoder.levels`, and what to do; None where it is there, or not known.

    How many blocks a ViT has is known when it is built.
    """
    strides = backbone.strides if backbone is not None else None
    if backbone is None or layer is None or strides is None or len(strides) < 2:
        return None
    count = min(len(strides), 4)
    if 1 <= layer <= count:
        return None
    return f"{backbone.name} has levels 1 to {count}, and no {layer}", "name one of these, or leave it out"


def too_coarse(
    backbone: Backbone | None, sizes: Mapping[str, int], cells: int, use: str
) -> Iterator[tuple[str, str, str]]:
    """Images whose feature map has too few cells, as `Stage.mismatches` yields it.

    Args:
        backbone: None where it is not known.
        sizes: sides in pixels by the dotted path of their setting.
        cells: a side that the map needs.
        use: what it needs them for, in words that go on after "for".
    """
    cell = backbone.cell if backbone is not None else None
    for path, size in sizes.items():
        if backbone is not None and cell is not None and -(-size // cell) < cells:
            has = -(-size // cell)
            what = f"the map of {backbone.name} has {has} x {has} cells at {size} pixels, too few for {use}"
            finer = [stride for stride in backbone.strides or () if -(-size // stride) >= cells]
            level = f", or backbone.stride to {max(finer)}" if finer else ""
            yield path, what, f"raise it to {(cells - 1) * cell + 1} or more{level}"
