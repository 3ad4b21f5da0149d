"""Encoded bytes to pixels and back: limits, orientation, colour. The only place that decodes an image.

`decode` gives what a person sees (upright, sRGB as stored, transparency over white); `decode_mask` gives the numbers
that were written (class indices, never colours). Both refuse what is too large before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from stages.data.errors import ImageError as ImageError  # what every function here raises

MAX_PIXELS = 64_000_000  # our own limit, below the 89 million where PIL starts to warn

_EXIF_ORIENTATION = 0x0112
_JPEG_COLOUR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG_REDUCED = {  # the flags' grey bits carry the scale; IMREAD_COLOR_RGB makes it colour
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | _JPEG_COLOUR,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | _JPEG_COLOUR,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | _JPEG_COLOUR,
}
_OTHER_FORMATS = {  # found within the first 12 bytes
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"ftyphe": "HEIC",
    b"ftypmif": "HEIC",
    b"ftypavif": "AVIF",
}
# What each EXIF orientation asks for to come upright; views, so only the last step copies.
_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@dataclass(frozen=True)
class Probe:
    """What the header says."""

    width: int  # upright, after EXIF
    height: int
    format: str  # "JPEG", "PNG", "WEBP" or "BMP"
    mode: str  # PIL's word for the pixel layout: "RGB", "L", "P", "I;16", "CMYK", ...


@dataclass(frozen=True)
class _Header:
    """As stored, before orientation. `channels` and `exif` are known for JPEG only."""

    format: str
    width: int
    height: int
    channels: int = 0
    exif: bytes | None = None


# ------------------------------------------------------------------------------------------------------- to pixels
def probe(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Probe:
    """Size, format and mode from the header alone. Raises ImageError (not an image, damaged header, too large)."""
    header = _header(data, max_pixels)
    with _open(data, header) as image:
        width, height = header.width, header.height
        if _orientation(image, data) >= 5:
            width, height = height, width
        return Probe(width, height, header.format, image.mode)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, upright, contiguous.

    16-bit channels keep their high byte; transparency is composed over white; grey is repeated; CMYK is converted
    without a colour profile (profiles are ignored throughout, as training code commonly does). Only the first frame
    of an animation. Raises ImageError: not an image, too large, truncated or damaged.
    """
    header = _header(data, max_pixels)
    if header.channels in (1, 3):  # JPEG without CMYK: OpenCV's decoder is the faster way to the same pixels
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _JPEG_COLOUR)
        if pixels is not None:
            return _turn(pixels, _exif_orientation(header.exif))
        # OpenCV gives no reason; PIL below says what is wrong, or reads the few files that OpenCV does not
    with _open(data, header) as image:
        _load(image)
        return _turn(_to_rgb(image), _orientation(image, data))


def decode_reduced(data: bytes, reduced: int, *, max_pixels: int = MAX_PIXELS) -> tuple[NDArray[np.uint8], int]:
    """As `decode`, at 1/`reduced` (1, 2, 4 or 8) of the size where the format allows it cheaply (JPEG), else whole.

    Returns the pixels and the reduction they have; pixel i is the mean of stored pixels [i*r, (i+1)*r), sides are
    rounded up. Saves most of the decoding time of photographs much larger than their views. Raises ImageError.
    """
    if reduced > 1:
        header = _header(data, max_pixels)
        # A turned image whose sides do not divide would have its partial pixel on the wrong side.
        upright = _exif_orientation(header.exif) == 1 or not (header.width % reduced or header.height % reduced)
        if header.channels in (1, 3) and upright:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _JPEG_REDUCED[reduced])
            if pixels is not None:
                return _turn(pixels, _exif_orientation(header.exif)), reduced
    return decode(data, max_pixels=max_pixels), 1


def conversions(data: bytes) -> list[str]:
    """What `decode` loses of an image, in words, from its header alone; empty for an ordinary photograph."""
    header = _read_header(data)
    found = []
    if header.channels == 4:
        found.append("CMYK, converted without its colour profile")
    if header.format == "PNG" and data[24] == 16:
        found.append("16 bits a channel, of which the high 8 count")
    if (header.format == "PNG" and b"acTL" in data[: data.find(b"IDAT")]) or (
        header.format == "WEBP" and data[12:16] == b"VP8X" and data[20] & 2
    ):
        found.append("an animation, of which the first frame counts")
    return found


def decode_ids(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint32]:
    """(H, W) segment ids of a panoptic PNG, which writes them as R + 256 G + 65536 B. Raises ImageError."""
    header = _header(data, max_pixels)
    with _open(data, header) as image:
        if header.format != "PNG" or image.mode != "RGB":
            raise ImageError(f"a panoptic mask is an RGB PNG of segment ids, this is {header.format} {image.mode}")
        _load(image)
        red, green, blue = np.moveaxis(np.asarray(image).astype(np.uint32), 2, 0)
    ids: NDArray[np.uint32] = red + (green << 8) + (blue << 16)
    return ids


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """(H, W) uint8, or uint16 where the file has 16 bits: the values as written; a palette's indices, not its colours.

    Raises ImageError, also for JPEG (lossy: its values are not the ones that were written) and for colour images.
    """
    header = _header(data, max_pixels)
    if header.format not in ("PNG", "BMP"):
        raise ImageError(f"a mask is a PNG of class indices, this is {header.format}")
    with _open(data, header) as image:
        if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
            raise ImageError(f"a mask has one channel of class indices, this has mode {image.mode}")
        _load(image)
        values = np.asarray(image)
    if image.mode in ("1", "L", "P"):
        return values.astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("a mask holds class indices of at most 16 bits")
    return values.astype(np.uint16)


# -------------------------------------------------------------------------------------------------------- to bytes
def encode_mask(mask: NDArray[Any]) -> bytes:
    """(H, W) class indices 0..65535 to a PNG of one channel, 8 bits where they suffice. Raises ValueError."""
    if mask.ndim != 2 or mask.dtype.kind not in "uib" or (mask.size and (mask.min() < 0 or mask.max() > 65535)):
        raise ValueError(f"a mask is (H, W) integers 0..65535, not {mask.shape} {mask.dtype}")
    dtype = np.uint8 if not mask.size or mask.max() < 256 else np.uint16
    return _encode(".png", mask.astype(dtype), [cv2.IMWRITE_PNG_COMPRESSION, 6])


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) uint8 RGB to PNG."""
    return _encode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 6])


def encode_jpeg(pixels: NDArray[np.uint8], quality: int = 90) -> bytes:
    """(H, W, 3) uint8 RGB to JPEG."""
    return _encode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])


def _encode(suffix: str, pixels: NDArray[Any], options: list[int]) -> bytes:
    done, buffer = cv2.imencode(suffix, np.ascontiguousarray(pixels), options)
    if not done:
        raise ValueError(f"cannot write {pixels.shape} {pixels.dtype} as {suffix}")
    return bytes(buffer.tobytes())


# --------------------------------------------------------------------------------------------------------- headers
def _header(data: bytes, max_pixels: int) -> _Header:
    """Format and stored size by our own reading, so that the limit comes before any decoder sees the bytes."""
    if not data:
        raise ImageError("the file is empty")
    try:
        header = _read_header(data)
    except (struct.error, IndexError):
        raise ImageError("the file ends inside its header") from None
    if header.width < 1 or header.height < 1:
        raise ImageError(f"the header says {header.width}x{header.height} pixels")
    if header.width * header.height > max_pixels:
        raise ImageError(f"{header.width}x{header.height} pixels are more than the limit of {max_pixels} (max_pixels)")
    return header


def _read_header(data: bytes) -> _Header:
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg_header(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        if data[12:16] != b"IHDR":
            raise ImageError("a PNG without a header")
        return _Header("PNG", *struct.unpack_from(">II", data, 16))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _Header("WEBP", *_webp_size(data))
    if data[:2] == b"BM":
        if struct.unpack_from("<I", data, 14)[0] == 12:  # the OS/2 header
            return _Header("BMP", *struct.unpack_from("<HH", data, 18))
        width, height = struct.unpack_from("<ii", data, 18)
        return _Header("BMP", width, abs(height))  # negative: rows from the top
    if other := next((name for start, name in _OTHER_FORMATS.items() if start in data[:12]), None):
        raise ImageError(f"a {other} file, which is not read: convert it to JPEG, PNG, WebP or BMP")
    raise ImageError("not an image of a known format (JPEG, PNG, WebP, BMP)")


def _jpeg_header(data: bytes) -> _Header:
    """Walks the segments up to the frame header; a few steps, whatever the size of the file."""
    exif, at = None, 2
    while True:
        while data[at] != 0xFF:  # stray bytes between segments are tolerated by every decoder
            at += 1
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in (0x01, 0xD8) or 0xD0 <= marker <= 0xD7 or marker == 0x00:  # no length follows
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            _, _, height, width, channels = struct.unpack_from(">HBHHB", data, at + 2)
            return _Header("JPEG", width, height, channels, exif)
        elif marker in (0xD9, 0xDA):
            raise ImageError("a JPEG without a frame header")
        else:
            length = struct.unpack_from(">H", data, at + 2)[0]
            if marker == 0xE1 and exif is None and data[at + 4 : at + 10] == b"Exif\0\0":
                exif = data[at + 4 : at + 2 + length]
            at += 2 + max(length, 2)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


# ----------------------------------------------------------------------------------------------------- through PIL
def _open(data: bytes, header: _Header) -> Image.Image:
    # MPO: the JPEG of many cameras, with more pictures behind the first
    formats = ("JPEG", "MPO") if header.format == "JPEG" else (header.format,)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Exception as error:
        raise ImageError(_reason(error)) from None
    if image.size != (header.width, header.height):  # two headers: the limit was checked on the other one
        raise ImageError(f"damaged: two sizes in one file, {header.width}x{header.height} and {image.size}")
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:
        raise ImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """PIL's message, without the memory addresses that would differ from run to run."""
    words = str(error).strip()
    if isinstance(error, UnidentifiedImageError) or not words or " at 0x" in words:
        return "damaged: its header cannot be read"
    return f"damaged: {words}"


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey: the high byte, as PIL itself does for 16-bit colour
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG" and "exif" not in image.info and b"eXIf" in data:
        _load(image)  # the chunk may stand behind the pixels
    return _exif_orientation(image.info.get("exif"))


def _exif_orientation(exif: bytes | None) -> int:
    """1 (upright as stored) to 8; what cannot be read counts as 1, as in every viewer."""
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        value = tags.get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in _UPRIGHT else 1


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    return np.ascontiguousarray(turn(pixels) if turn else pixels)
