"""The error of bytes that are no usable image. A file of its own, so that listing a source imports no decoder."""

from __future__ import annotations


class ImageError(Exception):
    """These bytes cannot be used as an image; the message is the reason in plain words."""
