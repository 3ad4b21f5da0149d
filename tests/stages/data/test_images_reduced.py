"""Decoding at a reduced scale: the same picture on fewer pixels, never shifted."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from stages.data.images import ImageError, decode, decode_reduced
from tests.conftest import encode, smooth_pixels


@pytest.mark.parametrize("reduced", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_pixel_is_the_mean_of_its_block(reduced: int, mode: str) -> None:
    data = encode(Image.fromarray(smooth_pixels(163, 101)).convert(mode), quality=95)
    pixels, got = decode_reduced(data, reduced)
    assert got == reduced
    assert pixels.shape == (-(-101 // reduced), -(-163 // reduced), 3)
    height, width = 101 // reduced, 163 // reduced
    whole = decode(data)[: height * reduced, : width * reduced]
    wanted = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels[:height, :width].astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(160, 96), (161, 97)])
def test_turned_images_come_upright_or_whole(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth_pixels(*size), quality=95, exif=exif)
    pixels, reduced = decode_reduced(data, 4)
    assert reduced == (1 if orientation > 1 and size[0] % 4 else 4)
    height, width = (side // reduced for side in decode(data).shape[:2])
    whole = decode(data)[: height * reduced, : width * reduced]
    wanted = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels[:height, :width].astype(int) - wanted).max() <= 3


def test_other_formats_come_whole_and_damage_is_an_error() -> None:
    pixels, reduced = decode_reduced(encode(smooth_pixels(64, 48), "PNG"), 4)
    assert (pixels.shape, reduced) == ((48, 64, 3), 1)
    jpeg = encode(smooth_pixels(64, 48))
    with pytest.raises(ImageError):
        decode_reduced(jpeg[: len(jpeg) // 2], 4)
    with pytest.raises(ImageError, match="max_pixels"):
        decode_reduced(jpeg, 4, max_pixels=100)
