"""Turns draws into pixels on a GPU: many views at once, in plain torch operations.

Resampling is two batched matrix products, one along each axis: row i of a view's matrix holds the weights of the image
rows (or columns) that make up its pixel i. The weights are those of render_cpu.py: exact areas where the crop has more
pixels than the view, bilinear or bicubic interpolation where it has fewer.

Shape legend: N views, B images, S side of a view, H and W sides of the padded images, V views of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stages.pretrain.views.draw import shown, visible
from stages.pretrain.views.plan import Draw
from stages.pretrain.views.render_cpu import GRAY, blur_taps


def pad(images: Sequence[Tensor]) -> Tensor:
    """Images (h, w, 3) uint8 of different sizes as one (B, H, W, 3) tensor; `render` never reads the padding."""
    height, width = max(image.shape[0] for image in images), max(image.shape[1] for image in images)
    padded = images[0].new_zeros(len(images), height, width, 3)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return padded


def render(
    images_BHW3: Tensor,
    sizes: Sequence[tuple[int, int]],
    draws: Sequence[Draw],
    image_of: Sequence[int],
    reduced: Sequence[int],
) -> Tensor:
    """Views of one size, cut and coloured.

    Args:
        images_BHW3: uint8, padded (`pad`).
        sizes: (height, width) of each image without its padding.
        draws: N draws of one size.
        image_of: N indices: the image that each draw cuts.
        reduced: B numbers: each image was decoded at 1/reduced of its size.

    Returns:
        (N, 3, S, S) float32 in [0, 255], on the images' device.
    """
    rects = np.array([shown(item) for item in draws]) / np.array([[reduced[b]] for b in image_of])
    # What may be seen of the images: first and last row and column, the last excluded.
    edges = np.array(
        [visible(item, sizes[b][1], sizes[b][0], reduced[b]) for item, b in zip(draws, image_of, strict=True)]
    )
    cubic = np.array([item.interpolation == "bicubic" for item in draws])
    mirrored = np.array([item.affine[0, 0] < 0 for item in draws])
    device, size = images_BHW3.device, draws[0].size
    rows_NSH = _weights(rects[:, 1::2], edges[:, 1::2], cubic, size, images_BHW3.shape[1], device)
    columns_NSW = _weights(rects[:, 0::2], edges[:, 0::2], cubic, size, images_BHW3.shape[2], device)
    columns_NSW = torch.where(_send(mirrored, device)[:, None, None], columns_NSW.flip(1), columns_NSW)

    views = torch.empty(len(draws), 3, size, size, device=device)
    views_of: dict[int, list[int]] = {}
    for n, b in enumerate(image_of):
        views_of.setdefault(b, []).append(n)
    for b, numbers in views_of.items():  # one image at a time: its pixels are read once for all its views
        pixels_HW3 = images_BHW3[b].float()
        index = torch.tensor(numbers, device=device)
        half_VSW3 = torch.einsum("vsh,hwc->vswc", rows_NSH[index], pixels_HW3)
        views[index] = torch.einsum("vxw,vywc->vcyx", columns_NSW[index], half_VSW3)
    return recolour(views.round_().clamp_(0, 255), draws)


def _send(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _weights(
    spans: NDArray[np.float64],
    limits: NDArray[np.int64],
    cubic: NDArray[np.bool_],
    size: int,
    side: int,
    device: torch.device,
) -> Tensor:
    """The weights of an image's pixels in each view pixel, along one axis.

    Args:
        spans: (N, 2) first and last edge of each crop, in image pixels.
        limits: (N, 2) first and last pixel of the image that may be seen, the last excluded.
        cubic: (N,) whether to interpolate bicubically; else bilinearly.
        size: S.
        side: pixels of the image with its padding, H or W.
        device: where the weights are computed.

    Returns:
        (N, S, side) float32.
    """
    inside = (spans[:, 0] > limits[:, 0] - 1e-6) & (spans[:, 1] < limits[:, 1] + 1e-6)
    whole = (np.abs(spans - np.rint(spans)) < 1e-6).all(1) & inside
    # Interpolation near an edge: a crop on whole pixels repeats its own outermost pixels (render_cpu.py resizes such a
    # crop as an array of its own); any other crop repeats the image's.
    low = _send(np.where(whole, np.rint(spans[:, 0]), limits[:, 0]), device)[:, None]
    high = _send(np.where(whole, np.rint(spans[:, 1]), limits[:, 1]) - 1, device)[:, None]
    start, stop = _send(spans[:, 0], device)[:, None], _send(spans[:, 1], device)[:, None]
    first_seen, limit = _send(limits[:, 0], device)[:, None], _send(limits[:, 1], device)[:, None]
    is_cubic = _send(cubic, device)[:, None, None]
    scale = (stop - start) / size
    edges = start + scale * torch.arange(size + 1, device=device)  # (N, S + 1)

    cell = torch.arange(side, device=device, dtype=torch.float64)
    covered = torch.minimum(edges[:, 1:, None], cell + 1) - torch.maximum(edges[:, :-1, None], cell)
    areas = covered.clamp_(min=0) / scale[:, :, None] * ((cell >= first_seen) & (cell < limit))[:, None]

    centre = (edges[:, :-1] + edges[:, 1:]) / 2
    first = (centre - 0.5).floor()
    t = centre - 0.5 - first
    linear = torch.stack([torch.zeros_like(t), 1 - t, t, torch.zeros_like(t)], -1)
    taps = torch.where(is_cubic, torch.stack([_keys(t + 1), _keys(t), _keys(1 - t), _keys(2 - t)], -1), linear)
    taps = taps * ((centre >= first_seen) & (centre <= limit))[..., None]
    at = first[..., None] + torch.arange(-1, 3, device=device)
    at = torch.minimum(torch.maximum(at, low[..., None]), high[..., None]).clamp_(min=0).long()
    interpolated = torch.zeros_like(areas).scatter_add_(2, at, taps)
    return torch.where((scale >= 1)[..., None], areas, interpolated).float()


def _keys(x: Tensor, a: float = -0.75) -> Tensor:
    """R. Keys' bicubic kernel at distance x in [0, 2], with the `a` of OpenCV and torch."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)


# ---------------------------------------------------------------------------------------------------------- colour
def recolour(views_N3SS: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Views after their draws' colour operations; float in [0, 255]."""
    device = views_N3SS.device
    views = views_N3SS
    for k in range(4):  # the k-th operation of every view's own order
        names = [item.colour["order"][k] if k < len(item.colour.get("order", ())) else None for item in draws]
        if not any(names):
            continue
        views = _linear(views, names, draws)
        if hues := [n for n, name in enumerate(names) if name == "hue"]:
            turns = torch.tensor([draws[n].colour["hue"] for n in hues], device=device)
            index = torch.tensor(hues, device=device)
            views = views.index_copy(0, index, _turn_hue(views[index], turns))
    gray = torch.tensor([bool(item.colour.get("gray")) for item in draws], device=device)
    views = torch.where(gray[:, None, None, None], _luma(views)[:, None], views)
    if blurred := [n for n, item in enumerate(draws) if "blur" in item.colour]:
        index = torch.tensor(blurred, device=device)
        views = views.index_copy(0, index, _blur(views[index], [draws[n].colour["blur"] for n in blurred]))
    threshold = torch.tensor([item.colour.get("solarize", 2.0) * 255 for item in draws], device=device)
    return torch.where(views >= threshold[:, None, None, None], 255 - views, views)


def _luma(views_N3SS: Tensor) -> Tensor:
    return torch.einsum("ncyx,c->nyx", views_N3SS, torch.tensor(GRAY, device=views_N3SS.device))


def _linear(views: Tensor, names: Sequence[str | None], draws: Sequence[Draw]) -> Tensor:
    """Brightness, contrast or saturation, which are affine in (r, g, b); a view named otherwise stays as it is."""
    factors = {
        wanted: torch.tensor(
            [item.colour[wanted] if name == wanted else 1.0 for name, item in zip(names, draws, strict=True)],
            device=views.device,
        )[:, None]
        for wanted in ("brightness", "contrast", "saturation")
    }
    eye, gray = torch.eye(3, device=views.device), torch.tensor(GRAY, device=views.device)
    plain = (factors["brightness"] * factors["contrast"] * factors["saturation"])[..., None] * eye
    matrix = plain + (1 - factors["saturation"])[..., None] * gray
    offset = (1 - factors["contrast"]) * _luma(views).mean((1, 2))[:, None]
    return (torch.einsum("nij,njyx->niyx", matrix, views) + offset[..., None, None]).clamp_(0, 255)


def _turn_hue(views: Tensor, turns: Tensor) -> Tensor:
    """Turns hues by fractions of a circle, through HSV with a continuous hue in [0, 6)."""
    red, green, blue = views.unbind(1)
    value, low = views.amax(1), views.amin(1)
    chroma = value - low
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = (hue + turns[:, None, None] * 6) % 6
    # A channel is full up to 60 degrees away from its own hue, and falls to none at 120 degrees.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=views.device)[:, None, None]
    k = (offsets + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(views: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blurs each view by its own sigma: all kernels are as wide as the widest, with zeros outside their own width."""
    radius = max(blur_taps(sigma) for sigma in sigmas) // 2
    x = torch.arange(-radius, radius + 1, device=views.device)
    sigma = torch.tensor(sigmas, device=views.device)[:, None]
    reach = torch.tensor([blur_taps(s) // 2 for s in sigmas], device=views.device)[:, None]
    kernel = torch.exp(-0.5 * (x / sigma) ** 2) * (x.abs() <= reach)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    count, _, side, _ = views.shape
    planes = F.pad(views, (radius,) * 4, mode="reflect").reshape(1, count * 3, side + 2 * radius, side + 2 * radius)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=count * 3)
    return F.conv2d(planes, kernel[:, None, None, :], groups=count * 3).reshape(count, 3, side, side)
