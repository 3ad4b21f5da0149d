"""Windows that slide over an image."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.data.windows import window_corners


@given(st.integers(8, 40), st.integers(8, 40), st.integers(1, 8))
def test_windows_cover_the_image_and_end_at_its_borders(height: int, width: int, stride: int) -> None:
    corners = window_corners(height, width, 8, stride)
    covered = np.zeros((height, width), int)
    for top, left in corners:
        assert 0 <= top <= height - 8
        assert 0 <= left <= width - 8
        covered[top : top + 8, left : left + 8] += 1
    assert covered.min() >= 1
    assert len(set(corners)) == len(corners)
