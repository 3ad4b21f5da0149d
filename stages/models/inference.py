"""From decoded pixels to features of frozen encoders: sizing, normalisation, batches, device and precision.

Shape legend: B images, S side of the input, D width, h w rows and columns of the feature map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UsageError
from stages.models.encoder import Encoder, Features

RGB = NDArray[np.uint8]  # (H, W, 3)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def centre_square(pixels: RGB, resize: int, crop: int) -> RGB:
    """The crop of ImageNet evaluations: short side resized to `resize`, then the central `crop` x `crop` pixels."""
    height, width = pixels.shape[:2]
    scale = resize / min(height, width)
    resized = squeeze(pixels, max(crop, round(height * scale)), max(crop, round(width * scale)))
    top, left = (resized.shape[0] - crop) // 2, (resized.shape[1] - crop) // 2
    return np.ascontiguousarray(resized[top : top + crop, left : left + crop])


def squeeze(pixels: RGB, height: int, width: int) -> RGB:
    """The whole image at another size: area averages where it shrinks (no aliasing), bicubic where it grows."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = height * width < pixels.shape[0] * pixels.shape[1]
    resized: RGB = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized


def require_size(encoder: Encoder, size: int, place: str) -> None:
    """Raises UsageError for sides in pixels that the encoder cannot take; `place` is the config's key to name."""
    if (refusal := encoder.refuses(size)) is not None:
        raise UsageError(f"{place}: {': '.join(refusal)}")


class Inference:
    """A frozen encoder in eval mode: `Inference(encoder)([pixels, ...])` gives features in float32 on its device."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        device: torch.device | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.device = device or default_device()
        self.encoder = encoder.to(self.device).eval().requires_grad_(False)
        self.precision = precision
        self._mean = torch.tensor(encoder.mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(encoder.std, device=self.device).view(1, 3, 1, 1) * 255

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[RGB], *, layer: int | None = None) -> Features:
        """B images of one size, (S, S', 3) uint8 RGB -> vector (B, D) and map (B, D, h, w).

        With `layer` the map is that of one tap of `Encoder.levels`, and the vector its mean.
        """
        stacked_B3HW = torch.from_numpy(np.stack(pixels)).to(self.device).permute(0, 3, 1, 2)
        autocast: Any = contextlib.nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with autocast:
            normalised_B3HW = (stacked_B3HW.float() - self._mean) / self._std
            if layer is None:
                features = self.encoder(normalised_B3HW)
            else:
                [map_BDhw] = self.encoder.levels(normalised_B3HW, [layer])
                features = Features(map_BDhw.mean(dim=(2, 3)), map_BDhw)
        return Features(features.vector.float(), features.map.float())

    def pooled(self, pixels: Sequence[RGB], pooling: Literal["cls", "mean"]) -> Tensor:
        """L2-normalised (B, D): [CLS] (the token mean where there is none), or the mean over the map."""
        features = self(pixels)
        vector = features.vector if pooling == "cls" else features.map.mean(dim=(2, 3))
        return torch.nn.functional.normalize(vector, dim=1, eps=1e-12)
