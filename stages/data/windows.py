"""Windows that slide over an image, for networks that see a square of one size."""

from __future__ import annotations


def window_corners(height: int, width: int, side: int, stride: int) -> list[tuple[int, int]]:
    """Top left corners of windows that cover an image, `stride` apart; the last ones end at its borders.

    Args:
        height: of the image in pixels, `side` at least.
        width: likewise.
        side: of a window.
        stride: from one window to the next.
    """

    def starts(length: int) -> list[int]:
        return [*range(0, length - side, stride), length - side]

    return [(top, left) for top in starts(height) for left in starts(width)]
