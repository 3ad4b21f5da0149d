"""Every way an image can be stored comes out as the pixels a person sees, and nothing unsafe is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stages.data.images import (
    ImageError,
    Probe,
    decode,
    decode_mask,
    decode_reduced,
    encode_jpeg,
    encode_mask,
    encode_png,
    probe,
)
from tests.conftest import encode, smooth_pixels

PIXELS = smooth_pixels(40, 28)


def by_pil(data: bytes) -> NDArray[np.uint8]:
    """The slow, obvious way that `decode` must agree with."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def far(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [("JPEG", {"quality": 95}, 24), ("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0)],
)
def test_formats(format: str, options: dict[str, object], tolerance: int) -> None:
    data = encode(PIXELS, format, **options)
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert far(pixels, PIXELS) <= tolerance
    assert probe(data) == Probe(40, 28, format, "RGB")


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("exif", [True, False])
def test_webp_sizes(lossless: bool, exif: bool) -> None:
    """The three kinds of WebP header: VP8, VP8L and VP8X (which carries EXIF)."""
    options = {"exif": _exif(1)} if exif else {}
    data = encode(smooth_pixels(37, 51), "WEBP", lossless=lossless, **options)
    assert (probe(data).width, probe(data).height) == (37, 51)
    assert far(decode(data), by_pil(data)) == 0


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"optimize": True}]
)
def test_fast_jpeg_path_equals_pil(options: dict[str, object]) -> None:
    """Both stand on libjpeg-turbo with the same settings; 2 grey levels are left for another build of it."""
    data = encode(smooth_pixels(161, 83), "JPEG", **options)
    assert far(decode(data), by_pil(data)) <= 2


def test_fast_jpeg_path_equals_pil_on_photographs(quickstart_data: Path) -> None:
    files = sorted(quickstart_data.glob("images/*/*.jpg"))
    assert len(files) == 52
    for file in files:
        data = file.read_bytes()
        assert far(decode(data), by_pil(data)) <= 2


def test_grey_jpeg() -> None:
    data = encode(Image.fromarray(PIXELS[:, :, 0]), "JPEG", quality=95)
    pixels = decode(data)
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()
    assert far(pixels[:, :, 0], PIXELS[:, :, 0]) <= 8


def test_cmyk_jpeg() -> None:
    """A red that has no black in it stays red: inverted (Adobe) inks would come out as cyan or black."""
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    data = encode(red, "JPEG", quality=95)
    assert probe(data).mode == "CMYK"
    assert far(decode(data), np.full((32, 32, 3), (255, 0, 0), np.uint8)) <= 4


def _exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(format: str, orientation: int) -> None:
    data = encode(PIXELS, format, exif=_exif(orientation))
    pixels = decode(data)
    assert far(pixels, by_pil(data)) <= 2
    assert pixels.shape[:2] == ((40, 28) if orientation >= 5 else (28, 40))
    assert (probe(data).height, probe(data).width) == pixels.shape[:2]


def test_exif_behind_the_pixels_of_a_png() -> None:
    plain = encode(PIXELS, "PNG")
    tags = _exif(6).removeprefix(b"Exif\0\0")
    body = b"eXIf" + tags
    chunk = struct.pack(">I", len(tags)) + body + struct.pack(">I", zlib.crc32(body))
    data = plain[:-12] + chunk + plain[-12:]  # before IEND, after IDAT
    assert decode(data).shape[:2] == (40, 28)
    assert (probe(data).width, probe(data).height) == (28, 40)


def test_unreadable_exif_is_upright() -> None:
    broken = b"Exif\0\0II*\0\xff\xff\xff\xff"
    assert far(decode(encode(PIXELS, "JPEG", quality=95, exif=broken)), PIXELS) <= 24


def test_sixteen_bit_png() -> None:
    high = PIXELS.astype(np.uint16) * 256 + 17
    _, grey = cv2.imencode(".png", high[:, :, 0])
    assert far(decode(grey.tobytes())[:, :, 1], PIXELS[:, :, 0]) == 0
    _, colour = cv2.imencode(".png", high[:, :, ::-1])
    assert far(decode(colour.tobytes()), PIXELS) == 0


def test_palette_png() -> None:
    image = Image.fromarray(PIXELS).quantize(64)
    data = encode(image, "PNG")
    assert probe(data).mode == "P"
    assert far(decode(data), np.asarray(image.convert("RGB"))) == 0


def test_transparency_is_composed_over_white() -> None:
    alpha = np.zeros((28, 40), np.uint8)
    alpha[:, 20:] = 255
    pixels = decode(encode(Image.fromarray(np.dstack([PIXELS, alpha])), "PNG"))
    assert (pixels[:, :20] == 255).all()
    assert far(pixels[:, 20:], PIXELS[:, 20:]) == 0


def test_transparent_palette_entry() -> None:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(1, (4, 0, 8, 4))
    pixels = decode(encode(image, "PNG", transparency=0))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (10, 20, 30)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_anywhere_is_an_error(format: str) -> None:
    data = encode(smooth_pixels(96, 80), format)
    assert decode(data).shape == (80, 96, 3)
    end = len(data) - (32 if format == "PNG" else 1)  # a PNG's last bytes hold no pixels
    for length in [*range(0, end, max(len(data) // 40, 1)), end]:
        with pytest.raises(ImageError):
            decode(data[:length])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9" * 4, b"BM", b"GIF89a" * 9])
def test_other_bytes_are_an_error(data: bytes) -> None:
    for function in (probe, decode, decode_mask):
        with pytest.raises(ImageError):
            function(data)


def _bomb_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be huge."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, body, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_bombs_are_refused_by_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a decoder saw the bytes of an image over the limit")

    monkeypatch.setattr(cv2, "imdecode", never)
    monkeypatch.setattr(Image, "open", never)
    for data in (_bomb_png(60_000, 60_000), _jpeg_with_size(65_000, 65_000)):
        with pytest.raises(ImageError, match="more than the limit of 64000000"):
            decode(data)


def _jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encode(PIXELS, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def test_two_headers_cannot_pass_the_limit() -> None:
    small, large = _bomb_png(8, 8), _bomb_png(9_000, 9_000)
    with pytest.raises(ImageError):
        decode(small[:33] + large[8:])


def test_the_limit_is_inclusive() -> None:
    data = encode(PIXELS, "JPEG")
    assert decode(data, max_pixels=40 * 28).shape == (28, 40, 3)
    with pytest.raises(ImageError, match="40x28"):
        probe(data, max_pixels=40 * 28 - 1)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535), (np.int64, 300)])
def test_masks_round_trip(dtype: type[np.integer], top: int) -> None:
    values = np.random.default_rng(0).integers(0, top, (13, 17), endpoint=True).astype(dtype)
    assert (decode_mask(encode_mask(values)) == values).all()


def test_palette_masks_give_indices() -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(values, "L").convert("L")
    palette = Image.new("P", (4, 3))
    palette.putpalette([200, 10, 10] * 16)  # all one colour: only the index tells them apart
    palette.putdata(image.get_flattened_data())
    assert (decode_mask(encode(palette, "PNG")) == values).all()


def test_masks_that_cannot_be_trusted_are_refused() -> None:
    with pytest.raises(ImageError, match="JPEG"):
        decode_mask(encode(Image.new("L", (8, 8)), "JPEG"))
    with pytest.raises(ImageError, match="mode RGB"):
        decode_mask(encode(PIXELS, "PNG"))
    with pytest.raises(ValueError, match=r"0\.\.65535"):
        encode_mask(np.full((2, 2), -1))


def test_encoders() -> None:
    assert far(decode(encode_png(PIXELS)), PIXELS) == 0
    assert far(decode(encode_jpeg(PIXELS, 95)), PIXELS) <= 24


# -- decoding at a reduced scale: the same picture on fewer pixels, never shifted


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
