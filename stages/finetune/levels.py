"""The four maps of an encoder that decoders and necks read."""

from __future__ import annotations

from pipeline.errors import UsageError
from stages.models.encoder import Encoder


def four_widths(encoder: Encoder) -> list[int]:
    """Channels of the maps of `Encoder.levels`, from fine to coarse.

    Raises:
        UsageError: for a backbone that gives fewer maps.
    """
    if len(encoder.level_widths) != 4:
        raise UsageError(
            f"backbone {encoder.backbone.name}: it has maps at {len(encoder.level_widths)} levels, and this needs four "
            "(choose another backbone, or a decoder that reads the encoder's own map)"
        )
    return encoder.level_widths
