"""What a plan knows of the encoder that a stage will be given: its backbone, and the sizes that it cannot take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.stage import Feed
from stages.models.settings import Backbone, near_multiples


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
    """Sides in pixels that do not split into the patches of a ViT, as `Stage.mismatches` yields it.

    Args:
        backbone: None where it is not known.
        sizes: by the dotted path of their setting.
    """
    patch = backbone.patch if backbone is not None else None
    for path, size in sizes.items():
        if backbone is not None and patch is not None and size % patch:
            what = f"{size} pixels do not split into patches of {patch}, those of {backbone.name}"
            yield path, what, f"set it to {near_multiples(size, patch)}"
